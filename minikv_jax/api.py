"""Every public name. `minikv_jax` gives them when the first of them is used."""

from minikv_jax import presets
from minikv_jax.cache import KVCache, nbytes
from minikv_jax.codec import Codec
from minikv_jax.config import Allocation, CacheConfig, Method, Rank
from minikv_jax.decode import decode_step
from minikv_jax.errors import (
    CheckpointError,
    ConfigError,
    MiniKVError,
    MissingExtraError,
    PromptError,
    UnsupportedModelError,
)
from minikv_jax.extend import extend, prefill_in_chunks
from minikv_jax.generate import generate, stream
from minikv_jax.models import load
from minikv_jax.prefill import bucket, empty_cache, forward, prefill
from minikv_jax.report import cache_report
from minikv_jax.sampling import Sampling, Written
from minikv_jax.saved import load_cache, save, saved_tokens
from minikv_jax.slots import fork, insert, reset, share, to_device, to_host
from minikv_jax.surgery import concatenate, draft_limit, rollback, rollback_limit, take

__all__ = [
    "Allocation",
    "CacheConfig",
    "CheckpointError",
    "Codec",
    "ConfigError",
    "KVCache",
    "Method",
    "MiniKVError",
    "MissingExtraError",
    "PromptError",
    "Rank",
    "Sampling",
    "UnsupportedModelError",
    "Written",
    "bucket",
    "cache_report",
    "concatenate",
    "decode_step",
    "draft_limit",
    "empty_cache",
    "extend",
    "fork",
    "forward",
    "generate",
    "insert",
    "load",
    "load_cache",
    "nbytes",
    "prefill",
    "prefill_in_chunks",
    "presets",
    "reset",
    "rollback",
    "rollback_limit",
    "save",
    "saved_tokens",
    "share",
    "stream",
    "take",
    "to_device",
    "to_host",
]
