"""Attention of a few new tokens over one segment of a cache, packed or dense."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation, first_that_accepts
from pallas_kernels.packed_decode import triton, xla
from pallas_kernels.packed_decode.layout import PackedTensor
from pallas_kernels.partial import Partial

_PACKED = {"triton": triton.packed_decode_attention, "xla": xla.packed_decode_attention}
_DENSE = {"xla": xla.dense_decode_attention}
_PACKED_DEFAULT = ("triton", "xla")
_DENSE_DEFAULT = ("xla",)


def packed_decode_attention(
    query: Float[Array, "B T N H"],
    keys: PackedTensor,
    values: PackedTensor,
    lengths: Int[Array, "B"] | Int[Array, "B K"],
    *,
    scale: float | None = None,
    implementation: Implementation = None,
) -> Partial:
    """Partial attention over packed keys and values: every query sees the first `lengths` tokens of its sequence.

    Codes are unpacked on the way; no dequantised copy of the segment exists. What lies beyond a length is never read
    into a result.

    Args:
        query: [B, T, N, H], T new tokens; any float dtype. N is a multiple of K.
        keys: packed keys, layout of `layout.py`.
        values: packed values.
        lengths: tokens held, per sequence or per sequence and key/value head; 0 <= length <= capacity.
        scale: of the logits; default H ** -0.5.
        implementation: None, "triton", "xla", or a sequence of names to try; None is Triton on a CUDA device where it
            accepts the format, else XLA.

    Returns:
        Float32 `Partial`, to be joined with other segments by `merge_partials`.

    Raises:
        ValueError: shapes that contradict each other.
        NotImplementedError: a named implementation cannot run these arguments.
    """
    b, _, n, h = query.shape
    heads = _check("keys", keys, h)
    if _check("values", values, h) != heads or keys.codes.shape[:3] != values.codes.shape[:3]:
        raise ValueError(f"keys {keys.codes.shape} and values {values.codes.shape} must agree in [B, K, blocks].")
    if keys.codes.shape[0] != b or n % heads:
        raise ValueError(f"query {query.shape} does not fit keys of batch {keys.codes.shape[0]} and {heads} heads.")
    if lengths.shape not in ((b,), (b, heads)):
        raise ValueError(f"lengths {lengths.shape} must be [B]={(b,)} or [B, K]={(b, heads)}.")
    lengths = jnp.broadcast_to(lengths.reshape(b, -1), (b, heads))
    scale = h**-0.5 if scale is None else scale
    return first_that_accepts(
        "packed_decode_attention", _PACKED, implementation, _PACKED_DEFAULT, query, keys, values, lengths, scale=scale
    )


def dense_decode_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    lengths: Int[Array, "B"] | Int[Array, "B T"] | Int[Array, "B T K"],
    *,
    scale: float | None = None,
    implementation: Implementation = None,
) -> Partial:
    """Partial attention over dense keys and values; query t of a sequence sees the first `lengths[b, t]` rows.

    Args:
        query: [B, T, N, H].
        key: [B, K, S, H], head-major, the layout of a cache.
        value: as key.
        lengths: visible rows, per sequence, per query or per query and key/value head; 0 <= length <= S.
        scale: of the logits; default H ** -0.5.
        implementation: None, "xla", or a sequence of names to try.

    Returns:
        Float32 `Partial`.

    Raises:
        ValueError: shapes that contradict each other.
        NotImplementedError: a named implementation cannot run these arguments.
    """
    b, t, n, h = query.shape
    heads = key.shape[1]
    if key.shape != value.shape or key.shape[0] != b or key.shape[3] != h or n % heads:
        raise ValueError(f"query {query.shape}, key {key.shape} and value {value.shape} do not fit together.")
    if lengths.shape not in ((b,), (b, t), (b, t, heads)):
        raise ValueError(f"lengths {lengths.shape} must be [B], [B, T] or [B, T, K] for query {query.shape}.")
    lengths = lengths.reshape(*lengths.shape, *(1,) * (3 - lengths.ndim))
    lengths = jnp.broadcast_to(lengths, (b, t, heads))
    scale = h**-0.5 if scale is None else scale
    return first_that_accepts(
        "dense_decode_attention", _DENSE, implementation, _DENSE_DEFAULT, query, key, value, lengths, scale=scale
    )


def _check(name: str, packed: PackedTensor, head_size: int) -> int:
    if packed.head_size != head_size:
        raise ValueError(f"{name} have head size {packed.head_size}, the query {head_size}.")
    if packed.scale.shape != packed.zero.shape or packed.scale.shape[:3] != packed.codes.shape[:3]:
        raise ValueError(
            f"{name}: codes {packed.codes.shape}, scale {packed.scale.shape} and zero {packed.zero.shape} "
            "must agree in [B, K, blocks]."
        )
    return packed.codes.shape[1]
