"""What a model is made of: sizes and switches, the same whatever files say them."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from minikv_jax.errors import UnsupportedModelError, shortened
from minikv_jax.models import gguf_config, hf_config
from minikv_jax.models.entries import is_integer, is_number
from minikv_jax.models.experts import Experts
from minikv_jax.models.families import FAMILIES
from minikv_jax.models.rope import RopeScaling


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a decoder of LLaMA's kind. Hashable, so it can be static under `jax.jit`.

    `sliding_window` counts the keys a query may see, itself included, in every layer; None means all of them.
    `query_key_value_bias` puts a bias on these three projections (Qwen2); no other projection has one.
    `experts` are in every layer in place of one feed-forward part, whose `intermediate_size` then means nothing.
    `query_key_norm` normalises every head's query and key before rotary embedding (Qwen3).

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
    query_key_norm: bool = False
    experts: Experts | None = None
    sliding_window: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    architecture: str = "llama"

    def __post_init__(self) -> None:
        if self.architecture not in FAMILIES:
            raise UnsupportedModelError(
                f"Architecture {shortened(self.architecture)} is not supported; supported: {', '.join(FAMILIES)}."
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
        return cls(**hf_config.fields(config))

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
        return cls(**gguf_config.fields(metadata))

    def replace(self, **changes: Any) -> Self:
        """The same configuration with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)
