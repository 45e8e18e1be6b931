"""The methods, one row each. A row is a value: change a knob with the arguments, anything else with `.replace`."""

import inspect
from collections.abc import Callable

from minikv_jax.config import Allocation, CacheConfig, Codec, Rank
from minikv_jax.errors import ConfigError


def full() -> CacheConfig:
    """Everything, in the model's dtype: what the others are measured against."""
    return CacheConfig(name="full")


def minikv(
    heavy: float = 0.25,
    recent: float = 0.25,
    bits: int = 2,
    group_size: int = 16,
    residual: int = 128,
    pyramid_depth: float | None = None,
) -> CacheConfig:
    """MiniKV (arXiv 2411.18077, Algorithm 1): heavy hitters and recent tokens in 2 bits, fixed after the prompt.

    Args:
        heavy: share of the prompt kept for the attention it received.
        recent: share of the prompt kept because it is newest.
        bits: of keys and values; 16 keeps them dense.
        group_size: tokens (keys) or channels (values) that share a scale.
        residual: tokens of the window that is encoded as one when it is full.
        pyramid_depth: None: the same budget in every layer; 7 is the paper's pyramid.
    """
    return CacheConfig(
        name="minikv" if pyramid_depth is None else "minikv_pyramid",
        rank=Rank(by="attention"),
        allocation=Allocation(heavy=heavy, recent=recent, pyramid_depth=pyramid_depth),
        codec=Codec(key_bits=bits, value_bits=bits, key_group=group_size, value_group=group_size),
        window=None if bits == 16 else residual,
    )


def minikv_pyramid(
    heavy: float = 0.25, recent: float = 0.25, bits: int = 2, group_size: int = 16, residual: int = 128
) -> CacheConfig:
    """MiniKV with the layer-wise pyramid of its section 3.2, depth 7: early layers keep more."""
    return minikv(heavy, recent, bits, group_size, residual, pyramid_depth=7)


METHODS: dict[str, Callable[..., CacheConfig]] = {"full": full, "minikv": minikv, "minikv_pyramid": minikv_pyramid}


def by_name(name: str, **knobs) -> CacheConfig:
    """The preset called `name`, with some knobs changed.

    Raises:
        ConfigError: an unknown name, an unknown knob, or a value out of range.
    """
    if name not in METHODS:
        raise ConfigError(f"Unknown method {name!r}: choose one of {', '.join(METHODS)}.")
    known = inspect.signature(METHODS[name]).parameters
    unknown = sorted(set(knobs) - set(known))
    if unknown:
        raise ConfigError(f"{name} has no knob {', '.join(unknown)}: it has {', '.join(known) or 'none'}.")
    return METHODS[name](**knobs)
