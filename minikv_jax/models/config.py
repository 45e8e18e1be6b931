"""What a LLaMA-family model is made of, read from Hugging Face or GGUF metadata."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from minikv_jax.errors import CheckpointError, UnsupportedModelError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}

# What transformers assumes where a config.json is silent, kept only where silence would change the results.
_HF_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
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
                f"Rope scaling of type {self.kind!r} is not supported; supported: 'default', 'linear', 'llama3'."
            )
        needed = ["factor"]
        if self.kind == "llama3":
            needed += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
        for name in needed:
            value = getattr(self, name)
            if not _is_number(value) or value <= 0:
                raise UnsupportedModelError(
                    f"Rope scaling {self.kind!r}: {name} must be a positive number, got {value!r}."
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
                f"Architecture {self.architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}."
            )
        sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"]
        sizes += ["head_dim", "max_position_embeddings"]
        if self.sliding_window is not None:
            sizes.append("sliding_window")
        for name in sizes:
            value = getattr(self, name)
            if not _is_integer(value) or value < 1:
                raise UnsupportedModelError(f"{name} must be a positive integer, got {value!r}.")
        for name in ("rope_theta", "rms_norm_eps"):
            value = getattr(self, name)
            if not _is_number(value) or value <= 0:
                raise UnsupportedModelError(f"{name} must be a positive number, got {value!r}.")
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
        entries = _Entries({**_HF_DEFAULTS[architecture], **config}, "config.json")
        _refuse_hf_features(entries)
        hidden_size = entries.integer("hidden_size")
        num_layers = entries.integer("num_hidden_layers")
        num_heads = entries.integer("num_attention_heads")
        rope_theta, rope_scaling = _hf_rope(entries)
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
            max_position_embeddings=entries.integer("max_position_embeddings"),
            tie_word_embeddings=entries.boolean("tie_word_embeddings", False),
            query_key_value_bias=architecture == "qwen2",
            sliding_window=_hf_sliding_window(entries, architecture, num_layers),
            bos_token_id=entries.optional_integer("bos_token_id"),
            eos_token_ids=token_ids(config.get("eos_token_id"), "config.json: eos_token_id"),
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
        architecture = metadata.get("general.architecture")
        if architecture not in ("llama", "qwen2"):
            raise UnsupportedModelError(
                f"GGUF architecture {architecture!r} is not supported; supported: 'llama' (also Mistral), 'qwen2'."
            )
        prefix = f"{architecture}."
        own = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
        entries = _Entries(own, f"GGUF metadata ({prefix}*)")
        if entries.integer("expert_count", 0):
            raise UnsupportedModelError("Mixture-of-experts models are not supported; expected expert_count 0.")
        hidden_size = entries.integer("embedding_length")
        num_heads = entries.integer("attention.head_count")
        head_dim = entries.integer("attention.key_length", _default_head_dim(hidden_size, num_heads))
        for key in ("attention.value_length", "rope.dimension_count"):
            if entries.integer(key, head_dim) != head_dim:
                raise UnsupportedModelError(
                    f"{prefix}{key} is {own[key]}, but only models where it equals the head size ({head_dim}) "
                    "are supported."
                )
        tokens = metadata.get("tokenizer.ggml.tokens")
        return cls(
            vocab_size=entries.integer("vocab_size", len(tokens) if isinstance(tokens, list) else None),
            hidden_size=hidden_size,
            intermediate_size=entries.integer("feed_forward_length"),
            num_layers=entries.integer("block_count"),
            num_heads=num_heads,
            num_kv_heads=entries.integer("attention.head_count_kv", num_heads),
            head_dim=head_dim,
            rope_theta=entries.number("rope.freq_base", 10000.0),
            rope_scaling=_gguf_rope_scaling(entries),
            # Stored as float32: 1e-5 comes back as 9.99999974e-06.
            rms_norm_eps=float(f"{entries.number('attention.layer_norm_rms_epsilon'):.4g}"),
            max_position_embeddings=entries.integer("context_length"),
            tie_word_embeddings=True,
            query_key_value_bias=architecture == "qwen2",
            sliding_window=entries.optional_integer("attention.sliding_window") or None,
            bos_token_id=_Entries(metadata, "GGUF metadata").optional_integer("tokenizer.ggml.bos_token_id"),
            eos_token_ids=_gguf_ends(metadata),
            architecture=architecture,
        )

    def replace(self, **changes: Any) -> Self:
        """The same configuration with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)


def token_ids(value: Any, source: str) -> tuple[int, ...]:
    """One id, a list of ids or None, as a tuple.

    Raises:
        CheckpointError: for anything else; `source` names where it was found.
    """
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(_is_integer(i) and i >= 0 for i in ids):
        raise CheckpointError(f"{source} must be a token id or a list of token ids, got {value!r}.")
    return tuple(ids)


class _Entries:
    """Typed look-ups that name the entry and its source when something is wrong. JSON null counts as absent."""

    def __init__(self, values: Mapping[str, Any], source: str):
        self.values = values
        self.source = source

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.optional_integer(key)
        if value is not None:
            return value
        if default is None:
            raise CheckpointError(f"{self.source} has no {key!r}; a model cannot be built without it.")
        return default

    def optional_integer(self, key: str) -> int | None:
        value = self.get(key)
        if value is not None and not _is_integer(value):
            raise self.wrong(key, "an integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None:
            if default is None:
                raise CheckpointError(f"{self.source} has no {key!r}; a model cannot be built without it.")
            return default
        if not _is_number(value):
            raise self.wrong(key, "a finite number")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def wrong(self, key: str, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: {key} must be {expected}, got {self.get(key)!r}.")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    if _is_integer(value):
        return abs(value) < 2**63
    return isinstance(value, float) and math.isfinite(value)


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
            f"config.json describes a model of type {config.get('model_type')!r} (architectures: {classes!r}); "
            f"supported: {supported}."
        )
    if given is not None and given != ARCHITECTURES[model_type]:
        raise UnsupportedModelError(
            f"config.json names the class {given!r}, which is not a plain language model; supported: {supported}."
        )
    return model_type


def _refuse_hf_features(entries: _Entries) -> None:
    """Refuses switches that change the computation in ways the model does not have."""
    expected = {
        "hidden_act": ("silu", "other activations are not implemented"),
        "attention_bias": (False, "it adds a bias to the output projection, which is not implemented"),
        "mlp_bias": (False, "biases in the feed-forward part are not implemented"),
        "partial_rotary_factor": (1.0, "rotating only a part of each head is not implemented"),
        "quantization_config": (None, "convert the checkpoint to plain bfloat16 or float16 safetensors first"),
    }
    for key, (value, reason) in expected.items():
        given = entries.get(key)
        if given is not None and given != value:
            raise UnsupportedModelError(f"config.json: {key} is {given!r}, but only {value!r} is supported ({reason}).")


def _hf_rope(entries: _Entries) -> tuple[float, RopeScaling | None]:
    """Base and scaling. transformers 5 keeps both in `rope_parameters`, 4 in `rope_theta` and `rope_scaling`."""
    for key in ("rope_parameters", "rope_scaling"):
        if entries.get(key) is not None and not isinstance(entries.get(key), dict):
            raise entries.wrong(key, "an object or null")
    parameters = entries.get("rope_parameters") or entries.get("rope_scaling") or {}
    if any(isinstance(value, dict) for value in parameters.values()):
        raise UnsupportedModelError(
            f"config.json: rotary parameters that differ between layers ({', '.join(parameters)}) are not supported."
        )
    rope = _Entries(parameters, "config.json: rope parameters")
    theta = rope.number("rope_theta", entries.number("rope_theta", 10000.0))
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        raise UnsupportedModelError(
            f"config.json: partial_rotary_factor is {rope.get('partial_rotary_factor')!r}, but only 1.0 is supported."
        )
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", rope.number("factor"))
    if kind != "llama3":
        raise UnsupportedModelError(
            f"Rope scaling of type {kind!r} is not supported; supported: 'default', 'linear', 'llama3'."
        )
    return theta, RopeScaling(
        "llama3",
        rope.number("factor"),
        rope.number("low_freq_factor"),
        rope.number("high_freq_factor"),
        rope.integer("original_max_position_embeddings"),
    )


def _hf_sliding_window(entries: _Entries, architecture: str, num_layers: int) -> int | None:
    if architecture == "llama":
        return None
    window = entries.optional_integer("sliding_window")
    if architecture == "mistral" or window is None:
        return window
    if not entries.boolean("use_sliding_window", False):
        return None
    full_layers = min(entries.integer("max_window_layers", 28), num_layers)
    layer_types = entries.get("layer_types")
    if isinstance(layer_types, list):  # transformers 5 writes the outcome of max_window_layers out
        full_layers = layer_types.count("full_attention")
    if full_layers == num_layers:
        return None
    if full_layers == 0:
        return window
    raise UnsupportedModelError(
        f"config.json: {full_layers} of {num_layers} layers use full attention and the others a sliding window of "
        f"{window}; supported: all layers alike (use_sliding_window false, or max_window_layers 0)."
    )


def _gguf_ends(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """End of text, and end of turn where a chat model has its own token for that."""
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    return tuple(dict.fromkeys(i for key in keys for i in token_ids(metadata.get(key), key)))


def _gguf_rope_scaling(entries: _Entries) -> RopeScaling | None:
    kind = entries.get("rope.scaling.type") or "none"
    factor = entries.number("rope.scaling.factor", entries.number("rope.scale_linear", 0.0))
    if "rope.scaling.type" not in entries.values and factor not in (0.0, 1.0):
        kind = "linear"  # before the type key existed, a lone factor meant this
    if kind == "none":
        return None
    if kind != "linear":
        raise UnsupportedModelError(
            f"GGUF rope scaling of type {kind!r} is not supported; supported: 'none', 'linear', and llama3 factors "
            "stored as the tensor rope_freqs.weight."
        )
    return RopeScaling("linear", factor)
