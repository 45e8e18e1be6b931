"""Published model shapes by name: what a cache of them weighs can be said without their weights."""

from minikv_jax.errors import ConfigError
from minikv_jax.models.config import ModelConfig

SHAPES: dict[str, ModelConfig] = {
    "smollm2-135m": ModelConfig(49152, 576, 1536, 30, 9, 3, 64, 1e5, max_position_embeddings=8192),
    "llama2-7b": ModelConfig(32000, 4096, 11008, 32, 32, 32, 128, max_position_embeddings=4096),
    "llama3-8b": ModelConfig(128256, 4096, 14336, 32, 32, 8, 128, 5e5, max_position_embeddings=131072),
    "mistral-7b": ModelConfig(32000, 4096, 14336, 32, 32, 8, 128, 1e6, max_position_embeddings=32768),
    "qwen2.5-1.5b": ModelConfig(151936, 1536, 8960, 28, 12, 2, 128, 1e6, max_position_embeddings=32768).replace(
        tie_word_embeddings=True, query_key_value_bias=True
    ),
}


def shape_of(name: str) -> ModelConfig:
    """The shape called `name`; a ConfigError lists the known ones."""
    if name not in SHAPES:
        raise ConfigError(f"Unknown model shape {name!r}: choose one of {', '.join(SHAPES)}.")
    return SHAPES[name]
