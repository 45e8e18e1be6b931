"""LLaMA-family models: what they are made of, their weights and their tokenizers."""

import os
from typing import TYPE_CHECKING, Any

from jax.typing import DTypeLike

from minikv_jax.models.checkpoint import Checkpoint
from minikv_jax.models.config import ModelConfig
from minikv_jax.models.hub import locate
from minikv_jax.models.rope import RopeScaling
from minikv_jax.models.tokenizer import load_tokenizer
from minikv_jax.models.weights import Progress, load_model, open_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from minikv_jax.models.llama import Llama

__all__ = [
    "Checkpoint",
    "Llama",
    "ModelConfig",
    "RopeScaling",
    "load",
    "load_model",
    "load_tokenizer",
    "locate",
    "open_checkpoint",
]


def load(
    path_or_name: str | os.PathLike[str], dtype: DTypeLike | None = None, progress: Progress | None = None
) -> "tuple[Llama, PreTrainedTokenizerFast]":
    """Loads a model and its tokenizer.

    Args:
        path_or_name: a Hugging Face folder, a GGUF file, a known name (`smollm2`, which is downloaded once), or a model
            of the Hugging Face Hub, as `Qwen/Qwen3-8B` or `Qwen/Qwen3-8B@REVISION`; see `locate`.
        dtype: float32, bfloat16 or float16; by default float32 on CPU and bfloat16 on other devices.
        progress: called with the bytes of weights loaded so far and in all.

    Returns:
        `(model, tokenizer)`.

    Raises:
        CheckpointError: if files are missing, damaged or pickles, or a download fails.
        UnsupportedModelError: if the model or its tokenizer is of a kind this library cannot run.
    """
    path = locate(path_or_name)
    tokenizer = load_tokenizer(path)  # first: its mistakes show in a second, not after all weights are read
    return load_model(path, dtype, progress), tokenizer


def __getattr__(name: str) -> Any:
    # Flax is imported with the model class, and only where that is needed.
    if name == "Llama":
        from minikv_jax.models.llama import Llama

        return Llama
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
