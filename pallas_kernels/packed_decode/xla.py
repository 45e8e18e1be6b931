"""Decode attention in plain XLA: the reference, the CPU and TPU path, and the path on GPUs older than Ampere.

It walks over the keys in chunks with a running softmax, so that at most one chunk is ever unpacked, and stops at the
longest sequence of the batch, so that unused capacity costs nothing.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.packed_decode.layout import BLOCK, PackedTensor, dequantize
from pallas_kernels.partial import Partial

# Unpacked floats of one chunk, per tensor: small enough to stay in a CPU's second-level cache, large enough that the
# loop's own cost disappears.
_CHUNK_ELEMENTS = 1 << 18


def _chunk_tokens(capacity: int, rows: int, head_size: int) -> int:
    tokens = max(_CHUNK_ELEMENTS // (rows * head_size) // BLOCK, 1) * BLOCK
    return min(tokens, capacity)


def _attend(
    query: Float[Array, "B K M H"],
    read: Callable[[Int[Array, ""]], tuple[Float[Array, "B K C H"], Float[Array, "B K C H"]]],
    visible: Int[Array, "B K M"],
    capacity: int,
    chunk: int,
) -> tuple[Float[Array, "B K M H"], Float[Array, "B K M"], Float[Array, "B K M"]]:
    """Running softmax over chunks of tokens; row m of a sequence sees its first `visible` tokens."""

    def step(i: Int[Array, ""], carry):
        output, maximum, total = carry
        # The last chunk is moved back to end at the capacity; what an earlier chunk has seen is masked.
        start = jnp.minimum(i * chunk, capacity - chunk)
        key, value = read(start)
        position = start + jnp.arange(chunk)
        seen = (position >= i * chunk) & (position < visible[..., None])
        logits = jnp.einsum("bkmh,bkch->bkmc", query, key, preferred_element_type=jnp.float32)
        logits = jnp.where(seen, logits, -jnp.inf)
        new_maximum = jnp.maximum(maximum, logits.max(axis=-1))
        reference = jnp.where(jnp.isneginf(new_maximum), 0.0, new_maximum)
        p = jnp.exp(logits - reference[..., None])
        rescale = jnp.exp(maximum - reference)
        # Rows past the end may hold anything, NaN included, and 0 * NaN is NaN.
        value = jnp.where((position < visible.max(axis=-1, keepdims=True))[..., None], value, 0)
        update = jnp.einsum("bkmc,bkch->bkmh", p.astype(value.dtype), value, preferred_element_type=jnp.float32)
        return output * rescale[..., None] + update, new_maximum, total * rescale + p.sum(axis=-1)

    start = (
        jnp.zeros(query.shape, jnp.float32),
        jnp.full(query.shape[:-1], -jnp.inf, jnp.float32),
        jnp.zeros(query.shape[:-1], jnp.float32),
    )
    if chunk == capacity:
        return step(jnp.int32(0), start)
    return jax.lax.fori_loop(0, (visible.max() + chunk - 1) // chunk, step, start)


def _rows(query: Float[Array, "B T N H"], heads: int, scale: float) -> Float[Array, "B K M H"]:
    """Query rows of a key/value head together, M = T G, in float32 with the softmax scale applied."""
    b, t, n, h = query.shape
    grouped = query.astype(jnp.float32).reshape(b, t, heads, n // heads, h) * scale
    return jnp.swapaxes(grouped, 1, 2).reshape(b, heads, t * (n // heads), h)


def _unrows(x: Float[Array, "B K M ..."], queries: int) -> Float[Array, "B T N ..."]:
    b, k, m = x.shape[:3]
    split = jnp.swapaxes(x.reshape(b, k, queries, m // queries, *x.shape[3:]), 1, 2)
    return split.reshape(b, queries, k * (m // queries), *x.shape[3:])


def _partial(result, queries: int) -> Partial:
    return Partial(*(_unrows(x, queries) for x in result))


def packed_decode_attention(
    query: Float[Array, "B T N H"],
    keys: PackedTensor,
    values: PackedTensor,
    lengths: Int[Array, "B K"],
    *,
    scale: float,
) -> Partial:
    b, t, _n, h = query.shape
    heads = keys.codes.shape[1]
    chunk = _chunk_tokens(keys.capacity, b * heads, h)

    def read(start):
        def blocks(x):
            return jax.lax.dynamic_slice_in_dim(x, start // BLOCK, chunk // BLOCK, axis=2)

        return tuple(dequantize(jax.tree.map(blocks, packed)) for packed in (keys, values))

    rows = _rows(query, heads, scale)
    visible = jnp.broadcast_to(lengths[:, :, None], rows.shape[:-1])
    return _partial(_attend(rows, read, visible, keys.capacity, chunk), t)


def dense_decode_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    lengths: Int[Array, "B T K"],
    *,
    scale: float,
) -> Partial:
    b, t, n, h = query.shape
    _, heads, capacity, _ = key.shape
    chunk = _chunk_tokens(capacity, b * heads, h)

    def read(start):
        return tuple(jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=2) for x in (key, value))

    # float32 queries times bfloat16 keys would convert the keys: round the query instead, as a GPU would.
    rows = _rows(query, heads, scale).astype(key.dtype)
    visible = jnp.repeat(jnp.swapaxes(lengths, 1, 2), n // heads, axis=2)
    return _partial(_attend(rows, read, visible, capacity, chunk), t)
