"""What a LLaMA-family model is made of, read from Hugging Face or GGUF metadata."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from minikv_jax.errors import CheckpointError, UnsupportedModelError, shortened
from minikv_jax.models.entries import Entries, is_integer, is_number
from minikv_jax.models.wording import listed

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}

# What transformers assumes where a config.json is silent, kept only where silence would change the results.
_HF_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
}

# Settings of a GGUF file that change the computation, and the values with which they do nothing.
_GGUF_NEUTRAL: dict[str, tuple[float, ...]] = {
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "attention.scale": (0,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.temperature_scale": (0,),
    "attention.shared_kv_layers": (0,),
    "attention.sliding_window_pattern": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.yarn_attn_factor": (0, 1),
    "rope.scaling.yarn_ext_factor": (0, -1),
}


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than the pretraining one.

    `linear` divides every frequency by `factor`. `llama3` divides those whose wavelength exceeds
    `original_max_position_embeddings / low_freq_factor`, keeps those below
    `original_max_position_embeddings / high_freq_factor`, and blends in between.

    Raises:
        UnsupportedModelError: for another kind, or values that are missing or not positive.
    """

    kind: Literal["llama3", "linear"]
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("llama3", "linear"):
            raise UnsupportedModelError(
                f"Rope scaling of type {shortened(self.kind)} is not supported; supported: 'default', 'linear', "
                "'llama3'."
            )
        needed = ["factor"]
        if self.kind == "llama3":
            needed += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
        for name in needed:
            value = getattr(self, name)
            if not is_number(value) or value <= 0:
                raise UnsupportedModelError(
                    f"Rope scaling {self.kind!r}: {name} must be a positive number, got {shortened(value)}."
                )
        if self.kind == "llama3" and (self.high_freq_factor or 0) <= (self.low_freq_factor or 0):
            raise UnsupportedModelError(
                f"Rope scaling 'llama3': high_freq_factor ({self.high_freq_factor}) must exceed "
                f"low_freq_factor ({self.low_freq_factor})."
            )


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a LLaMA, Mistral or Qwen2 decoder. Hashable, so it can be static under `jax.jit`.

    `sliding_window` counts the keys a query may see, itself included, in every layer; None means all of them.
    `query_key_value_bias` puts a bias on these three projections (Qwen2); no other projection has one.

    Raises:
        UnsupportedModelError: if sizes are not positive or do not fit together, or the architecture is unknown.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    query_key_value_bias: bool = False
    sliding_window: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    architecture: str = "llama"

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise UnsupportedModelError(
                f"Architecture {shortened(self.architecture)} is not supported; supported: {', '.join(ARCHITECTURES)}."
            )
        sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"]
        sizes += ["head_dim", "max_position_embeddings"]
        if self.sliding_window is not None:
            sizes.append("sliding_window")
        for name in sizes:
            value = getattr(self, name)
            if not is_integer(value) or value < 1:
                raise UnsupportedModelError(f"{name} must be a positive integer, got {shortened(value)}.")
        for name in ("rope_theta", "rms_norm_eps"):
            value = getattr(self, name)
            if not is_number(value) or value <= 0:
                raise UnsupportedModelError(f"{name} must be a positive number, got {shortened(value)}.")
        if self.num_heads % self.num_kv_heads:
            raise UnsupportedModelError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads}): "
                "every key-value head serves the same number of query heads."
            )
        if self.head_dim % 2:
            raise UnsupportedModelError(f"head_dim must be even for rotary embeddings, got {self.head_dim}.")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Reads the content of a `config.json`, as transformers 4 or 5 writes it.

        Args:
            config: the parsed JSON object.

        Raises:
            CheckpointError: if a needed entry is missing or has the wrong type.
            UnsupportedModelError: if the model needs something this library does not have.
        """
        architecture = _hf_architecture(config)
        entries = Entries({**_HF_DEFAULTS[architecture], **config}, "config.json")
        _refuse_hf_features(entries, architecture)
        hidden_size = entries.integer("hidden_size")
        num_layers = entries.integer("num_hidden_layers")
        num_heads = entries.integer("num_attention_heads")
        rope_theta, rope_scaling, longest = _hf_rope(entries)
        return cls(
            vocab_size=entries.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=entries.integer("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=entries.integer("num_key_value_heads", num_heads),
            head_dim=entries.integer("head_dim", _default_head_dim(hidden_size, num_heads)),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            rms_norm_eps=entries.number("rms_norm_eps", 1e-6),
            max_position_embeddings=longest,
            tie_word_embeddings=entries.boolean("tie_word_embeddings", False),
            query_key_value_bias=architecture == "qwen2",
            sliding_window=_hf_sliding_window(entries, architecture, num_layers),
            bos_token_id=next(iter(entries.token_ids("bos_token_id")), None),
            eos_token_ids=entries.token_ids("eos_token_id"),
            architecture=architecture,
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        """Reads the key-value metadata of a GGUF file.

        Three facts are not in the metadata but in the tensors: whether the head is tied (assumed so here), whether
        a `llama` has query, key and value biases (assumed not), and llama3 rope scaling. `open_checkpoint` settles
        them.

        Args:
            metadata: keys as in the file, such as `llama.embedding_length`.

        Raises:
            CheckpointError: if a needed key is missing or has the wrong type.
            UnsupportedModelError: if the model needs something this library does not have.
        """
        whole = Entries(metadata, "GGUF metadata")
        architecture = whole.optional_text("general.architecture")
        if architecture not in ("llama", "qwen2"):
            raise UnsupportedModelError(
                f"GGUF architecture {shortened(architecture)} is not supported; supported: 'llama' (also Mistral), "
                "'qwen2'."
            )
        prefix = f"{architecture}."
        own = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
        entries = Entries(own, f"GGUF metadata ({prefix}*)")
        hidden_size = entries.integer("embedding_length")
        num_heads = entries.integer("attention.head_count")
        head_dim = entries.integer("attention.key_length", _default_head_dim(hidden_size, num_heads))
        _refuse_gguf_features(entries, prefix, head_dim)
        rope_scaling, longest = _gguf_rope(entries)
        ends = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")  # of a text, of a turn in a chat
        return cls(
            vocab_size=entries.integer("vocab_size", whole.optional_count("tokenizer.ggml.tokens")),
            hidden_size=hidden_size,
            intermediate_size=entries.integer("feed_forward_length"),
            num_layers=entries.integer("block_count"),
            num_heads=num_heads,
            num_kv_heads=entries.integer("attention.head_count_kv", num_heads),
            head_dim=head_dim,
            rope_theta=entries.number("rope.freq_base", 10000.0),
            rope_scaling=rope_scaling,
            # Stored as float32: 1e-5 comes back as 9.99999974e-06.
            rms_norm_eps=float(f"{entries.number('attention.layer_norm_rms_epsilon'):.4g}"),
            max_position_embeddings=longest,
            tie_word_embeddings=True,
            query_key_value_bias=architecture == "qwen2",
            sliding_window=entries.optional_integer("attention.sliding_window") or None,
            bos_token_id=whole.optional_integer("tokenizer.ggml.bos_token_id"),
            eos_token_ids=tuple(dict.fromkeys(i for key in ends for i in whole.token_ids(key))),
            architecture=architecture,
        )

    def replace(self, **changes: Any) -> Self:
        """The same configuration with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)


def _default_head_dim(hidden_size: int, num_heads: int) -> int:
    if hidden_size < 1 or num_heads < 1 or hidden_size % num_heads:
        raise UnsupportedModelError(
            f"hidden size {hidden_size} does not divide into {num_heads} heads, and no head size is given."
        )
    return hidden_size // num_heads


def _hf_architecture(config: Mapping[str, Any]) -> str:
    """The model type, from `model_type` or, in old files, from the class name alone."""
    model_type, classes = config.get("model_type"), config.get("architectures")
    given = classes[0] if isinstance(classes, list) and classes else None
    if model_type is None:
        model_type = {cls: name for name, cls in ARCHITECTURES.items()}.get(str(given))
    supported = ", ".join(f"{name!r} ({cls})" for name, cls in ARCHITECTURES.items())
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"config.json describes a model of type {shortened(config.get('model_type'))} (architectures: "
            f"{shortened(classes)}); supported: {supported}."
        )
    if given is not None and given != ARCHITECTURES[model_type]:
        raise UnsupportedModelError(
            f"config.json names the class {shortened(given)}, which is not a plain language model; supported: "
            f"{supported}."
        )
    return model_type


def _refuse_hf_features(entries: Entries, architecture: str) -> None:
    """Refuses switches that change the computation in ways the model does not have."""
    expected: dict[str, tuple[tuple[Any, ...], str]] = {
        "hidden_act": (("silu", "swish"), "other activations are not implemented"),
        "mlp_bias": ((False,), "biases in the feed-forward part are not implemented"),
        "partial_rotary_factor": ((1.0,), "rotating only a part of each head is not implemented"),
        "quantization_config": ((None,), "convert the checkpoint to plain bfloat16 or float16 safetensors first"),
        "per_layer_config": ((None,), "layers of different sizes are not implemented"),
        "text_config": ((None,), "only plain language models are; save the language model by itself"),
    }
    if architecture == "llama":  # Qwen2 has its biases without it, Mistral none with it
        reason = "it adds a bias to the output projection, which is not implemented"
        expected["attention_bias"] = ((False,), reason)
    for key, (allowed, reason) in expected.items():
        given = entries.get(key)
        if given is not None and given not in allowed:
            raise UnsupportedModelError(
                f"config.json: {key} is {shortened(given)}, but only {allowed[0]!r} is supported ({reason})."
            )


def _hf_rope(entries: Entries) -> tuple[float, RopeScaling | None, int]:
    """Base, scaling, and the longest context.

    transformers 4 keeps the first two in `rope_theta` and `rope_scaling`, 5 in `rope_parameters`. Where a file has both
    groups, the whole of `rope_scaling` counts, as in transformers, and what the other says may not differ.
    """
    groups = {
        key: Entries(group, f"config.json: {key}")
        for key in ("rope_scaling", "rope_parameters")
        if (group := entries.optional_object(key))
    }
    places = {**groups, "its top level": entries}

    def agreed[T](key: str, read: Callable[[Entries, str], T | None]) -> T | None:
        return _agreed(entries.source, key, {place: read(group, key) for place, group in places.items()})

    original = agreed("original_max_position_embeddings", Entries.optional_integer)
    longest = entries.integer("max_position_embeddings")
    scaling = _hf_rope_scaling(entries, groups, original or longest)
    theta = agreed("rope_theta", Entries.optional_number)
    counted = [group for key, group in places.items() if key != "rope_parameters" or "rope_scaling" not in groups]
    if theta not in (None, 10000.0) and all(group.get("rope_theta") is None for group in counted):
        raise CheckpointError(
            f"config.json: rope_scaling replaces all of rope_parameters, and with it rope_theta {theta:g}; write "
            "rope_theta into rope_scaling too."
        )
    if scaling is not None and scaling.kind == "linear":
        # The stated length is that of the pretraining. FastChat's models state the stretched one too.
        stretched = int(scaling.factor * (original or longest))
        longest = min(stretched, entries.integer("max_sequence_length", stretched))
    return 10000.0 if theta is None else theta, scaling, longest


def _agreed[T](source: str, key: str, given: Mapping[str, T | None]) -> T | None:
    """The value that some places give, if all of them give the same."""
    values = {place: value for place, value in given.items() if value is not None}
    if len(set(values.values())) > 1:
        said = " and ".join(f"{shortened(value)} in {place}" for place, value in values.items())
        raise CheckpointError(f"{source} gives {key} as {said}; keep the right one.")
    return next(iter(values.values()), None)


def _hf_rope_scaling(entries: Entries, groups: Mapping[str, Entries], original: int) -> RopeScaling | None:
    stated = {key: _hf_scaling_of(group, original) for key, group in groups.items()}
    if stated.get("rope_parameters", ...) is None:
        del stated["rope_parameters"]  # transformers 5 writes its default out, which says nothing
    condensed = entries.number("rope_condense_ratio", 1.0)  # LongChat's name of linear scaling
    if condensed != 1:
        stated["rope_condense_ratio"] = RopeScaling("linear", condensed)
    if len(set(stated.values())) > 1:
        said = " and ".join(f"{key} {shortened(entries.get(key))}" for key in stated)
        raise CheckpointError(f"config.json scales rotary embeddings in two ways, {said}; keep the right one.")
    return next(iter(stated.values()), None)


def _hf_scaling_of(rope: Entries, original: int) -> RopeScaling | None:
    """What one group says; None is no scaling."""
    if any(isinstance(value, dict) for value in rope.values.values()):
        raise UnsupportedModelError(
            f"{rope.source}: rotary parameters that differ between layers ({listed(rope.values)}) are not supported."
        )
    if rope.optional_number("partial_rotary_factor") not in (None, 1.0):
        raise UnsupportedModelError(
            f"{rope.source}: partial_rotary_factor is {shortened(rope.get('partial_rotary_factor'))}, but only 1.0 is "
            "supported."
        )
    kind = _agreed(rope.source, "the kind", {key: rope.optional_text(key) for key in ("rope_type", "type")})
    if kind in (None, "default"):
        if rope.number("factor", 1.0) != 1:
            raise CheckpointError(
                f"{rope.source} has factor {shortened(rope.get('factor'))} but no rope_type that uses it."
            )
        return None
    if kind == "linear":
        return RopeScaling("linear", rope.number("factor"))
    if kind != "llama3":
        raise UnsupportedModelError(
            f"Rope scaling of type {shortened(kind)} is not supported; supported: 'default', 'linear', 'llama3'."
        )
    factors = [rope.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor")]
    return RopeScaling("llama3", *factors, original_max_position_embeddings=original)


def _hf_sliding_window(entries: Entries, architecture: str, num_layers: int) -> int | None:
    window = None if architecture == "llama" else entries.optional_integer("sliding_window")
    if architecture == "qwen2" and not entries.boolean("use_sliding_window", False):
        window = None
    sliding = 0 if window is None else num_layers
    if architecture == "qwen2" and window is not None:
        sliding -= min(max(entries.integer("max_window_layers", 28), 0), num_layers)
    if (types := entries.get("layer_types")) is not None:
        sliding = _hf_listed_sliding(entries, types, num_layers, None if architecture == "qwen2" else sliding)
    if 0 < sliding < num_layers:
        raise UnsupportedModelError(
            f"config.json: {num_layers - sliding} of {num_layers} layers use full attention and the others a sliding "
            f"window of {window}; supported: all layers alike (use_sliding_window false, or max_window_layers 0)."
        )
    if sliding and window is None:
        raise CheckpointError("config.json: layer_types lists sliding_attention, but no sliding window is in use.")
    return window if sliding else None


def _hf_listed_sliding(entries: Entries, types: Any, num_layers: int, expected: int | None) -> int:
    """How many layers `layer_types` gives a sliding window, where that is not settled by the architecture."""
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != num_layers or any(kind not in known for kind in types):
        raise entries.wrong("layer_types", f"a list of {num_layers} entries, each {' or '.join(known)}")
    sliding = types.count("sliding_attention")
    if expected not in (None, sliding):
        raise UnsupportedModelError(
            f"config.json: layer_types gives {sliding} of {num_layers} layers a sliding window, where the model's "
            f"class gives it to {expected}."
        )
    return sliding


def _refuse_gguf_features(entries: Entries, prefix: str, head_dim: int) -> None:
    """Refuses settings that change the computation in ways the model does not have."""
    if entries.integer("expert_count", 0):
        raise UnsupportedModelError("Mixture-of-experts models are not supported; expected expert_count 0.")
    for key in ("attention.value_length", "rope.dimension_count"):
        if entries.integer(key, head_dim) != head_dim:
            raise UnsupportedModelError(
                f"{prefix}{key} is {entries.get(key)}, but only models where it equals the head size ({head_dim}) "
                "are supported."
            )
    for key, neutral in _GGUF_NEUTRAL.items():
        if entries.number(key, neutral[0]) not in neutral:
            raise UnsupportedModelError(
                f"{prefix}{key} is {entries.get(key)}, which changes the computation in a way that is not implemented; "
                f"supported: {' or '.join(map(str, neutral))}."
            )


def _gguf_rope(entries: Entries) -> tuple[RopeScaling | None, int]:
    """Scaling, and the longest context."""
    longest = entries.integer("context_length")
    given = {key: entries.optional_number(key) for key in ("rope.scaling.factor", "rope.scale_linear")}
    # llama.cpp takes 0 for "not set".
    factor = _agreed(entries.source, "the factor", {key: value or None for key, value in given.items()}) or 1.0
    kind = entries.optional_text("rope.scaling.type") or ("none" if factor == 1 else "linear")
    if kind not in ("none", "linear"):
        raise UnsupportedModelError(
            f"GGUF rope scaling of type {shortened(kind)} is not supported; supported: 'none', 'linear', and llama3 "
            "factors stored as the tensor rope_freqs.weight."
        )
    if kind == "none" and factor != 1:
        raise CheckpointError(f"{entries.source}: rope.scaling.type is 'none', but its factor is {factor:g}.")
    if kind == "none":
        return None, longest
    original = entries.optional_integer("rope.scaling.original_context_length")
    return RopeScaling("linear", factor), max(longest, int(factor * (original or 0)))
