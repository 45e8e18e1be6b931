"""The cache: segments of keys and values per layer, and how prompts and new tokens get into them.

    KVCache
      layers[l]: LayerCache
        segment   DenseSegment | PackedSegment     what the prompt leaves, and where encoded new tokens go
        window    DenseSegment | None              the newest tokens, until enough of them can be encoded together

Rows of a segment are in the order they were written. A row is not a position: keys carry their rotary position from
before they were cached, so attention never needs to know where in the text a row comes from.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from minikv_jax import quantize, rank
from minikv_jax.config import CacheConfig, Codec
from minikv_jax.quantize import Codes
from pallas_kernels.packed_decode.layout import BLOCK, PackedTensor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseSegment:
    """Keys and values in a float dtype, head-major. Rows at and past `length` are meaningless."""

    key: Float[Array, "B K S H"]
    value: Float[Array, "B K S H"]
    length: Int[Array, "B"]

    @property
    def capacity(self) -> int:
        return self.key.shape[2]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedSegment:
    """Keys and values as packed codes. Tokens at and past `length` are meaningless."""

    keys: PackedTensor
    values: PackedTensor
    length: Int[Array, "B"]

    @property
    def capacity(self) -> int:
        return self.keys.capacity


Segment = DenseSegment | PackedSegment


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    segment: Segment
    window: DenseSegment | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The whole state of B sequences between two calls of `decode_step`.

    Attributes:
        layers: one LayerCache a layer; their capacities may differ.
        lengths: int32 [B], tokens read so far: the rotary position of the next one.
        room: int32 [B], tokens that may still follow. Where it is 0, `decode_step` stores nothing and returns NaN.
        config: the method (static).
    """

    layers: tuple[LayerCache, ...]
    lengths: Int[Array, "B"]
    room: Int[Array, "B"]
    config: CacheConfig = dataclasses.field(metadata={"static": True})


def nbytes(cache: KVCache | LayerCache | Segment) -> int:
    """Bytes of every array the cache holds: codes, scales, minima, windows and counters."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))


def compress(
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    scores: Float[Array, "B K T"],
    lengths: Int[Array, "B"],
    heavy: Int[Array, "B"],
    recent: Int[Array, "B"],
    config: CacheConfig,
    kept_capacity: int,
) -> LayerCache:
    """One layer's keys and values of the prompt, as the method keeps them.

    Args:
        key, value: of the prompt, after rotary embedding.
        scores: attention received; ignored where the method does not rank by it.
        lengths: true prompt lengths.
        heavy, recent: tokens to keep (`allocate.budgets`).
        kept_capacity: static bound of heavy + recent.
    """
    key, value = (jnp.swapaxes(x, 1, 2) for x in (key, value))
    if config.needs_scores:
        rows = rank.select(scores, lengths, heavy, recent, kept_capacity)
        key, value = (jnp.take_along_axis(x, rows[..., None], axis=2, mode="clip") for x in (key, value))
    else:
        key, value = (_fit(x, kept_capacity) for x in (key, value))
    kept = heavy + recent
    # Rows past the kept ones are padding of unknown content; zeros keep NaN out of everything stored.
    present = (jnp.arange(kept_capacity) < kept[:, None])[:, None, :, None]
    key, value = (jnp.where(present, x, 0) for x in (key, value))
    dtype = config.dtype or key.dtype
    if config.codec.dense:
        capacity = kept_capacity + config.generated_capacity
        rows = (_fit(x, capacity).astype(dtype) for x in (key, value))
        return LayerCache(DenseSegment(*rows, kept), None)

    # Tokens that do not fill a group cannot be encoded yet: they start the window.
    group = config.codec.token_group
    whole = kept // group * group
    tail = whole[:, None] + jnp.arange(config.window)
    window_key, window_value = (
        jnp.take_along_axis(x, tail[:, None, :, None], axis=2, mode="fill", fill_value=0).astype(dtype)
        for x in (key, value)
    )
    capacity = packed_capacity(config, kept_capacity)
    keys, values = (
        quantize.to_packed(codes, *shape)
        for codes, shape in zip(
            _encode(config.codec, _fit(key, capacity), _fit(value, capacity)), _layouts(config.codec)
        )
    )
    return LayerCache(PackedSegment(keys, values, whole), DenseSegment(window_key, window_value, kept - whole))


def packed_capacity(config: CacheConfig, kept_capacity: int) -> int:
    """Tokens a packed segment has room for: whole blocks, and never fewer than one encoding of the window touches."""
    tokens = max(kept_capacity + config.generated_capacity, _touched_blocks(config.window) * BLOCK)
    return -(-tokens // BLOCK) * BLOCK


def append(
    layer: LayerCache,
    key: Float[Array, "B 1 K H"],
    value: Float[Array, "B 1 K H"],
    accept: Bool[Array, "B"],
    codec: Codec,
) -> LayerCache:
    """The layer with one more token for the sequences that accept it.

    A window that is full with the new token is encoded at once (MiniKV Algorithm 1: before this step's attention).
    """
    key, value = (jnp.swapaxes(x, 1, 2) for x in (key, value))
    if layer.window is None:
        return LayerCache(_append_dense(layer.segment, key, value, accept), None)
    window = _append_dense(layer.window, key, value, accept)
    full = window.length == window.capacity
    segment, window = jax.lax.cond(
        full.any(), lambda s, w: _flush(s, w, full, codec), lambda s, w: (s, w), layer.segment, window
    )
    return LayerCache(segment, window)


def _append_dense(segment: DenseSegment, key, value, accept) -> DenseSegment:
    # Writing the old row back where nothing is accepted keeps the index in bounds, and XLA the update in place: a
    # scatter that may drop rows copies the whole segment.
    row = jnp.minimum(segment.length, segment.capacity - 1)

    def write(rows, new):
        at = rows.at[jnp.arange(rows.shape[0]), :, row]
        kept = jnp.where(accept[:, None, None], new[:, :, 0].astype(rows.dtype), at.get(mode="promise_in_bounds"))
        return at.set(kept, mode="promise_in_bounds", unique_indices=True)

    # Without the barrier XLA writes the row once for the result and once more, into a copy, for the attention.
    written = jax.lax.optimization_barrier((write(segment.key, key), write(segment.value, value)))
    return DenseSegment(*written, segment.length + accept)


def _flush(
    segment: PackedSegment, window: DenseSegment, full: Bool[Array, "B"], codec: Codec
) -> tuple[PackedSegment, DenseSegment]:
    """Encodes the windows of the sequences that are `full` behind their segment's last token."""
    keys, values = (
        _write(packed, codes, segment.length, full)
        for packed, codes in zip((segment.keys, segment.values), _encode(codec, window.key, window.value))
    )
    moved = jnp.where(full, window.capacity, 0)
    return (
        PackedSegment(keys, values, segment.length + moved),
        dataclasses.replace(window, length=window.length - moved),
    )


def _touched_blocks(tokens: int) -> int:
    """Blocks that a run of tokens can lie in, wherever it starts."""
    return (tokens - 2) // BLOCK + 2 if tokens > 1 else 1


def _write(packed: PackedTensor, new: Codes, start: Int[Array, "B"], accept: Bool[Array, "B"]) -> PackedTensor:
    """Writes codes of consecutive tokens at token `start` of each accepting sequence.

    A run rarely starts on a block boundary and bytes carry tokens that lie far apart, so the blocks it touches are
    unpacked, changed and packed again: a few hundred tokens, however long the segment is.
    """
    tokens = new.codes.shape[2]
    blocks = packed.codes.shape[2]
    count = min(_touched_blocks(tokens), blocks)
    first = jnp.minimum(start // BLOCK, blocks - count)
    index = first[:, None] + jnp.arange(count)
    touched = jax.tree.map(lambda x: jnp.take_along_axis(x, index[:, None, :, None, None], axis=2), packed)
    old = quantize.from_packed(touched)

    def replace(old_rows, new_rows):
        per_row = tokens // new_rows.shape[2]
        row = jnp.arange(old_rows.shape[2]) - ((start - first * BLOCK) // per_row)[:, None]
        inside = (row >= 0) & (row < new_rows.shape[2]) & accept[:, None]
        taken = jnp.take_along_axis(new_rows, row[:, None, :, None], axis=2, mode="clip")
        return jnp.where(inside[:, None, :, None], taken, old_rows)

    changed = quantize.to_packed(
        Codes(*map(replace, old, new)), packed.bits, packed.group_size, packed.group_axis, packed.tokens_last
    )
    sequence = jnp.arange(start.shape[0])[:, None]
    return jax.tree.map(
        lambda x, y: x.at[sequence, :, index].set(jnp.swapaxes(y, 1, 2), mode="promise_in_bounds", unique_indices=True),
        packed,
        changed,
    )


def _encode(codec: Codec, key, value) -> tuple[Codes, Codes]:
    return (
        quantize.encode(key, codec.key_bits, codec.key_group, codec.key_axis, codec.metadata_dtype),
        quantize.encode(value, codec.value_bits, codec.value_group, "channels", codec.metadata_dtype),
    )


def _layouts(codec: Codec):
    """Arguments of `to_packed` for keys and for values."""
    return (
        (codec.key_bits, codec.key_group, codec.key_axis, False),
        (codec.value_bits, codec.value_group, "channels", True),
    )


def _fit(x: Float[Array, "B K S H"], rows: int) -> Float[Array, "B K rows H"]:
    """Cut or filled with zeros to `rows`."""
    x = x[:, :, :rows]
    return jnp.pad(x, ((0, 0), (0, 0), (0, rows - x.shape[2]), (0, 0)))
