"""The families of models that load: what files call each, and what sets it apart from LLaMA.

A family is a value here. What a family computes otherwise than LLaMA is a field of `ModelConfig` that its row sets;
what only its files do otherwise (other names, several matrices in one) is undone while they are read.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from minikv_jax.models.entries import Entries, agreed
from minikv_jax.models.experts import Experts
from minikv_jax.models.rope import KINDS

HF_LAYER = {
    "attention_norm": "input_layernorm.weight",
    "query": "self_attn.q_proj.weight",
    "key": "self_attn.k_proj.weight",
    "value": "self_attn.v_proj.weight",
    "output": "self_attn.o_proj.weight",
    "query_bias": "self_attn.q_proj.bias",
    "key_bias": "self_attn.k_proj.bias",
    "value_bias": "self_attn.v_proj.bias",
    "query_norm": "self_attn.q_norm.weight",
    "key_norm": "self_attn.k_norm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "router": "mlp.gate.weight",
    "expert_gate": "mlp.experts.{}.gate_proj.weight",  # of each expert by its number
    "expert_up": "mlp.experts.{}.up_proj.weight",
    "expert_down": "mlp.experts.{}.down_proj.weight",
}
GGUF_LAYER = {
    "attention_norm": "attn_norm.weight",
    "query": "attn_q.weight",
    "key": "attn_k.weight",
    "value": "attn_v.weight",
    "output": "attn_output.weight",
    "query_bias": "attn_q.bias",
    "key_bias": "attn_k.bias",
    "value_bias": "attn_v.bias",
    "query_norm": "attn_q_norm.weight",
    "key_norm": "attn_k_norm.weight",
    "mlp_norm": "ffn_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
    "router": "ffn_gate_inp.weight",
    "expert_gate": "ffn_gate_exps.weight",
    "expert_up": "ffn_up_exps.weight",
    "expert_down": "ffn_down_exps.weight",
}

_NO_OUTPUT_BIAS = "it adds a bias to the output projection, which is not implemented"


@dataclass(frozen=True)
class Family:
    """What sets a family of models apart.

    Attributes:
        hf_class: the class in transformers whose computation is meant.
        models: those that people know it by.
        gguf: the architecture's name in GGUF files; None where files of this family call themselves `llama`.
        defaults: what transformers assumes where a config.json is silent, kept where silence would change the results.
        needs: entries of config.json that would change the computation: their one supported value, and why.
        fields: of `ModelConfig`.
        rope_theta: what transformers assumes where a config.json is silent.
        rope_scalings: the kinds that mean what `RopeScaling` says.
        sliding_window: whether a given window counts: never, always, or as `use_sliding_window` says.
        experts: what a config.json says of a mixture's experts.
        hf_layer, gguf_layer: the stored tensor that holds each of a layer's parameters.
        bias_switch: the entry of config.json that puts a bias on query, key and value, where there is one.
        multipliers: what a config.json and a GGUF file call each of `folding.MULTIPLIERS`, where a family has them.
        interleaved: the formats whose query and key rows are in pairs of neighbours, which `rotary` wants in halves.
    """

    hf_class: str
    models: str
    gguf: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    needs: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    rope_theta: float = 10000.0
    rope_scalings: tuple[str, ...] = KINDS
    sliding_window: Literal["never", "always", "switched"] = "never"
    bias_switch: str | None = None
    multipliers: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    experts: Callable[[Entries], Experts] | None = None
    hf_layer: Mapping[str, str] = field(default_factory=lambda: HF_LAYER)
    gguf_layer: Mapping[str, str] = field(default_factory=lambda: GGUF_LAYER)
    interleaved: tuple[Literal["hf", "gguf"], ...] = ()


def _qwen3_experts(entries: Entries) -> Experts:
    counts = {key: entries.optional_integer(key) for key in ("num_experts", "num_local_experts")}
    return Experts(
        agreed(entries.source, "the number of experts", counts) or 128,
        entries.integer("num_experts_per_tok", 8),
        entries.integer("moe_intermediate_size", 768),
        entries.boolean("norm_topk_prob", False),
    )


def _mixtral_experts(entries: Entries) -> Experts:
    count, chosen = entries.integer("num_local_experts", 8), entries.integer("num_experts_per_tok", 2)
    return Experts(count, chosen, entries.integer("intermediate_size"), renormalised=True)


FAMILIES: dict[str, Family] = {
    "llama": Family(
        hf_class="LlamaForCausalLM",
        models="Llama 2 to 3.3, TinyLlama, SmolLM, SmolLM2, CodeLlama, DeepSeek-LLM and -Coder, R1-Distill-Llama, Yi",
        gguf="llama",
        defaults={"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
        needs={"attention_bias": (False, _NO_OUTPUT_BIAS)},
        interleaved=("gguf",),
    ),
    "mistral": Family(
        hf_class="MistralForCausalLM",
        models="Mistral 7B, Mistral-Nemo, Mistral-Small-2501, Ministral-8B-2410",
        defaults={
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        sliding_window="always",
    ),
    "qwen2": Family(
        hf_class="Qwen2ForCausalLM",
        models="Qwen2, Qwen2.5, R1-Distill-Qwen",
        gguf="qwen2",
        defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
        fields={"query_key_value_bias": True},
        sliding_window="switched",
    ),
    "qwen3": Family(
        hf_class="Qwen3ForCausalLM",
        models="Qwen3 0.6B to 32B",
        gguf="qwen3",
        defaults={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "sliding_window": 4096,
        },
        needs={"attention_bias": (False, _NO_OUTPUT_BIAS)},
        fields={"query_key_norm": True},
        sliding_window="switched",
    ),
    "phi3": Family(
        hf_class="Phi3ForCausalLM",
        models="Phi-4, Phi-3-mini-4k, Phi-3-medium-4k",
        gguf="phi3",
        defaults={
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 32000,
        },
        rope_scalings=(),  # LongRoPE, which this class also calls "su" and "yarn"
        sliding_window="always",
        hf_layer={
            **HF_LAYER,
            **dict.fromkeys(("query", "key", "value"), "self_attn.qkv_proj.weight"),
            **dict.fromkeys(("gate", "up"), "mlp.gate_up_proj.weight"),
        },
        gguf_layer={
            **GGUF_LAYER,
            **dict.fromkeys(("query", "key", "value"), "attn_qkv.weight"),
            **dict.fromkeys(("gate", "up"), "ffn_up.weight"),
        },
    ),
    "granite": Family(
        hf_class="GraniteForCausalLM",
        models="Granite 3.0 to 3.3, 2B and 8B",
        gguf="granite",
        defaults={
            "max_position_embeddings": 2048,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "embedding_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
        needs={"attention_bias": (False, _NO_OUTPUT_BIAS)},
        multipliers={
            "embedding": ("embedding_multiplier", "embedding_scale"),
            "attention": ("attention_multiplier", "attention.scale"),
            "residual": ("residual_multiplier", "residual_scale"),
            "logits": ("logits_scaling", "logit_scale"),
        },
        interleaved=("gguf",),
    ),
    "seed_oss": Family(
        hf_class="SeedOssForCausalLM",
        models="Seed-OSS-36B",
        gguf="seed_oss",
        defaults={
            "max_position_embeddings": 524288,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "attention_bias": True,
        },
        needs={"attention_out_bias": (False, "a bias of the output projection is not implemented")},
        bias_switch="attention_bias",
        gguf_layer={**GGUF_LAYER, "mlp_norm": "post_attention_norm.weight"},
    ),
    "ernie4_5": Family(
        hf_class="Ernie4_5ForCausalLM",
        models="Ernie-4.5-0.3B",
        gguf="ernie4_5",
        defaults={
            "max_position_embeddings": 131072,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        needs={"use_bias": (False, "biases of all projections are not implemented")},
        rope_theta=500000.0,
        interleaved=("hf", "gguf"),
    ),
    "qwen3_moe": Family(
        hf_class="Qwen3MoeForCausalLM",
        models="Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder-30B-A3B",
        gguf="qwen3moe",
        defaults={"max_position_embeddings": 32768, "num_key_value_heads": 4},
        needs={
            "attention_bias": (False, _NO_OUTPUT_BIAS),
            "use_sliding_window": (False, "mixtures with a sliding window are not implemented"),
            "decoder_sparse_step": (1, "layers without experts are not implemented"),
            "mlp_only_layers": ([], "layers without experts are not implemented"),
        },
        fields={"query_key_norm": True},
        experts=_qwen3_experts,
    ),
    "mixtral": Family(
        hf_class="MixtralForCausalLM",
        models="Mixtral 8x7B, 8x22B",
        defaults={
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        rope_theta=1000000.0,
        sliding_window="always",
        experts=_mixtral_experts,
        hf_layer={
            **HF_LAYER,
            "router": "block_sparse_moe.gate.weight",
            "expert_gate": "block_sparse_moe.experts.{}.w1.weight",
            "expert_up": "block_sparse_moe.experts.{}.w3.weight",
            "expert_down": "block_sparse_moe.experts.{}.w2.weight",
        },
        interleaved=("gguf",),
    ),
}


@dataclass(frozen=True)
class Wrapper:
    """A model of more than text, whose language model is of a family above and loads by itself.

    Attributes:
        hf_class: its class in transformers.
        language_model: the family that its `text_config` must name.
        models: those that people know it by.
        left_out: how the names of all other tensors begin.
    """

    hf_class: str
    language_model: str
    models: str
    left_out: tuple[str, ...]


WRAPPERS: dict[str, Wrapper] = {
    "mistral3": Wrapper(
        hf_class="Mistral3ForConditionalGeneration",
        language_model="mistral",
        models="Mistral-Small-3.1 and -3.2 (text; the image part is left out)",
        left_out=("vision_tower.", "multi_modal_projector."),
    ),
}
BY_GGUF = {family.gguf: name for name, family in FAMILIES.items() if family.gguf is not None}


def listing() -> list[dict[str, Any]]:
    """What `minikv models` says of each family: names, architecture in GGUF files, and what is supported."""
    rows: list[dict[str, Any]] = [
        {"family": name, "models": x.models, "class": x.hf_class, "gguf": x.gguf, "supported": _supported(x)}
        for name, x in FAMILIES.items()
    ]
    for name, x in WRAPPERS.items():
        text = f"text, as {x.language_model}"
        rows.append({"family": name, "models": x.models, "class": x.hf_class, "gguf": None, "supported": text})
    return rows


def _supported(family: Family) -> str:
    windows = {
        "never": "",
        "always": "one sliding window for all layers, for texts within it",
        "switched": "use_sliding_window for all layers, for texts within it",
    }
    scalings = f"rope scaling {', '.join(family.rope_scalings)}" if family.rope_scalings else "no rope scaling"
    needed = [f"{key} {str(value).lower()} only" for key, (value, _) in family.needs.items()]
    return "; ".join(x for x in (scalings, windows[family.sliding_window], *needed) if x)
