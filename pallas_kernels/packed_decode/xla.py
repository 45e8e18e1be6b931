"""Decode attention in plain XLA: the reference, the CPU and TPU path, and the path on GPUs older than Ampere.

It walks over the keys in chunks with a running softmax, so that at most one chunk is ever unpacked, and stops at the
longest sequence of the batch, so that unused capacity costs nothing.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.packed_decode.layout import BLOCK, PackedTensor, dequantize, dequantize_blocks
from pallas_kernels.partial import Partial, capped
from pallas_kernels.rows import row_numbers

# Float32 numbers of one chunk, per tensor. A loop over chunks costs a CPU more than it saves until a chunk is this big.
_CHUNK_ELEMENTS = 1 << 20


class _Chunk(NamedTuple):
    """A run of tokens: how queries meet its keys, and how probabilities meet its values."""

    logits: Callable[[Float[Array, "B K M H"]], Float[Array, "B K M C"]]
    output: Callable[[Float[Array, "B K M C"], Bool[Array, "B K C"]], Float[Array, "B K M V"]]


def _chunk_tokens(capacity: int, rows: int, head_size: int) -> int:
    tokens = max(_CHUNK_ELEMENTS // (rows * head_size) // BLOCK, 1) * BLOCK
    return min(tokens, capacity)


def _attend(
    query: Float[Array, "B K M H"],
    read: Callable[[Int[Array, ""]], _Chunk],
    visible: Int[Array, "B K M"],
    capacity: int,
    width: int,
    chunk: int,
    return_logits: bool,
    soft_cap: float | None,
) -> tuple[Array, ...]:
    """Running softmax over chunks of tokens; row m of a sequence sees its first `visible` tokens, values of `width`.

    Returns output [B, K, M, width], maximum and total [B, K, M], and the logits [B, K, M, capacity] where asked for.
    """

    def step(i: Int[Array, ""], carry):
        output, maximum, total, *every = carry
        # The last chunk is moved back to end at the capacity; what an earlier chunk has seen is masked.
        start = jnp.minimum(i * chunk, capacity - chunk)
        tokens = read(start)
        position = start + row_numbers(chunk, axes=3)
        seen = (position >= i * chunk)[:, :, None] & (position[:, :, None] < visible[..., None])
        logits = capped(tokens.logits(query), soft_cap)
        every = [jax.lax.dynamic_update_slice_in_dim(x, logits, start, axis=-1) for x in every]
        logits = jnp.where(seen, logits, -jnp.inf)
        new_maximum = jnp.maximum(maximum, logits.max(axis=-1))
        reference = jnp.where(jnp.isneginf(new_maximum), 0.0, new_maximum)
        p = jnp.exp(logits - reference[..., None])
        rescale = jnp.exp(maximum - reference)
        update = tokens.output(p, position < visible.max(axis=-1, keepdims=True))
        return output * rescale[..., None] + update, new_maximum, total * rescale + p.sum(axis=-1), *every

    # Like the query, so that they vary over a mesh as it does inside `shard_map`.
    start = (
        jnp.zeros_like(query, jnp.float32, shape=(*query.shape[:-1], width)),
        jnp.full_like(query, -jnp.inf, jnp.float32, shape=query.shape[:-1]),
        jnp.zeros_like(query, jnp.float32, shape=query.shape[:-1]),
        *([jnp.zeros_like(query, jnp.float32, shape=(*query.shape[:-1], capacity))] if return_logits else []),
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


def _partial(result, queries: int) -> Partial | tuple[Partial, Array]:
    output, maximum, total, *logits = (_unrows(x, queries) for x in result)
    partial = Partial(output, maximum, total)
    return (partial, logits[0]) if logits else partial


def _without_absent(values: PackedTensor, present: Bool[Array, "B K blocks 128"]) -> PackedTensor:
    """Values whose absent tokens are zero. They may hold anything, NaN included, and 0 * NaN is NaN."""
    if values.group_axis != "channels":
        raise NotImplementedError(f"values must be grouped over channels, not over {values.group_axis}.")
    scale, zero = (jnp.where(present[:, :, :, None], x, 0) for x in (values.scale, values.zero))
    return dataclasses.replace(values, scale=scale, zero=zero)


def packed_decode_attention(
    query: Float[Array, "B T N H"],
    keys: PackedTensor,
    values: PackedTensor,
    lengths: Int[Array, "B"] | Int[Array, "B K"],
    *,
    scale: float,
    return_logits: bool,
    soft_cap: float | None = None,
) -> Partial | tuple[Partial, Array]:
    b, t, _n, h = query.shape
    heads = keys.codes.shape[1]
    chunk = _chunk_tokens(keys.capacity, b * heads, h)

    def read(start):
        def blocks(x):
            return jax.lax.dynamic_slice_in_dim(x, start // BLOCK, chunk // BLOCK, axis=2)

        key = dequantize_blocks(jax.tree.map(blocks, keys)).reshape(b, heads, chunk, h)

        def output(p, present):
            p, present = (x.reshape(*x.shape[:-1], -1, BLOCK) for x in (p, present))
            value = dequantize_blocks(_without_absent(jax.tree.map(blocks, values), present))
            return jnp.einsum("bkmct,bkcht->bkmh", p, value)

        return _Chunk(lambda q: jnp.einsum("bkmh,bksh->bkms", q, key), output)

    rows = _rows(query, heads, scale)
    visible = jnp.broadcast_to(lengths.reshape(b, -1, 1), rows.shape[:-1])
    width = values.head_size
    return _partial(_attend(rows, read, visible, keys.capacity, width, chunk, return_logits, soft_cap), t)


def dense_decode_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S V"],
    lengths: Int[Array, "B"] | Int[Array, "B T"] | Int[Array, "B T K"],
    *,
    scale: float,
    return_logits: bool,
    soft_cap: float | None = None,
) -> Partial | tuple[Partial, Array]:
    b, t, n, h = query.shape
    _, heads, capacity, _ = key.shape
    chunk = _chunk_tokens(capacity, b * heads, h)

    def read(start):
        key_rows, value_rows = (jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=2) for x in (key, value))

        def logits(q):
            return jnp.einsum("bkmh,bksh->bkms", q, key_rows, preferred_element_type=jnp.float32)

        def output(p, present):
            rows = jnp.where(present[..., None], value_rows, 0)
            return jnp.einsum("bkms,bksh->bkmh", p.astype(rows.dtype), rows, preferred_element_type=jnp.float32)

        return _Chunk(logits, output)

    # float32 queries times bfloat16 keys would convert the keys: round the query instead, as a GPU would.
    rows = _rows(query, heads, scale).astype(key.dtype)
    lengths = jnp.broadcast_to(lengths.reshape(*lengths.shape, *(1,) * (3 - lengths.ndim)), (b, t, heads))
    visible = jnp.repeat(jnp.swapaxes(lengths, 1, 2), n // heads, axis=2)
    width = value.shape[-1]
    return _partial(_attend(rows, read, visible, capacity, width, chunk, return_logits, soft_cap), t)


def latent_decode_attention(
    query: Float[Array, "B T N H"],
    keys: PackedTensor | Float[Array, "B 1 S R"],
    values: PackedTensor | Float[Array, "B 1 S V"],
    lengths: Int[Array, "B"],
    rebuilt: Callable[[Float[Array, "B C R"], Int[Array, ""]], Float[Array, "B C K H"]],
    heads: int,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Partial:
    """Partial attention of queries over latents that all heads share; every query sees the first `lengths` rows.

    No more than one chunk's keys are ever rebuilt.

    Beside scores and values a step costs 2 S R K H operations a sequence for the keys, which is R / G of what its
    scores cost.

    Args:
        query: [B, T, N, H], rotated for its position.
        keys: latents of keys, of one head.
        values: latents of values, of one head.
        lengths: rows held, 0 <= length <= S.
        rebuilt: from latents [B, C, R] of rows `first`, `first` + 1, ... to their keys [B, C, K, H], rotated.
        heads: K, key/value heads of the model.
        scale: of the logits; default H ** -0.5.
        soft_cap: c bounds logits x by c tanh(x / c).

    Returns:
        Float32 `Partial` whose output [B, T, N, V] is of latents of values.
    """
    b, t, _, h = query.shape
    capacity = _capacity(keys)
    chunk = _chunk_tokens(capacity, b * heads, h)

    def read(start):
        key, value = (_latents(x, start, chunk) for x in (keys, values))
        all_keys = rebuilt(key, start)

        def logits(q):
            return jnp.einsum("bkmh,bskh->bkms", q, all_keys, preferred_element_type=jnp.float32)

        def output(p, present):
            # What lies past a length may be anything, and 0 * NaN is NaN.
            rows = jnp.where(present[:, 0, :, None], value, 0)
            return jnp.einsum("bkms,bsv->bkmv", p.astype(rows.dtype), rows, preferred_element_type=jnp.float32)

        return _Chunk(logits, output)

    rows = _rows(query, heads, h**-0.5 if scale is None else scale).astype(query.dtype)
    visible = jnp.broadcast_to(lengths[:, None, None], rows.shape[:-1])
    result = _attend(rows, read, visible, capacity, _width(values), chunk, False, soft_cap)
    return Partial(*(_unrows(x, t) for x in result))


def _capacity(x: PackedTensor | Float[Array, "B 1 S R"]) -> int:
    return x.capacity if isinstance(x, PackedTensor) else x.shape[2]


def _width(x: PackedTensor | Float[Array, "B 1 S R"]) -> int:
    return x.head_size if isinstance(x, PackedTensor) else x.shape[3]


def _latents(x: PackedTensor | Float[Array, "B 1 S R"], start: Int[Array, ""], count: int) -> Float[Array, "B C R"]:
    """`count` rows from `start` on; of packed ones both are whole blocks."""
    if isinstance(x, PackedTensor):
        blocks: PackedTensor = jax.tree.map(
            lambda y: jax.lax.dynamic_slice_in_dim(y, start // BLOCK, count // BLOCK, axis=2), x
        )
        return dequantize(blocks)[:, 0]
    return jax.lax.dynamic_slice_in_dim(x, start, count, axis=2)[:, 0]
