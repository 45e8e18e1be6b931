"""KIVI's window (arXiv 2402.02750, section 4): keys wait until R of them are there, values leave one by one.

tokens     0 ........ packed_values ...... packed_keys ........ position
keys       packed ....................... | window.key (0 to R - 1 rows)
values     packed ........| window.value, a ring of the newest R (and the one that is about to leave)
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from minikv_jax import quantize, segments
from minikv_jax.config import CacheConfig
from minikv_jax.segments import DenseSegment, PackedSegment
from pallas_kernels import Run
from pallas_kernels.packed_decode.layout import BLOCK
from pallas_kernels.rows import row_numbers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KiviWindow:
    """The newest keys and values. The value of token t lies in ring row t % (R + 1).

    The segment's length counts packed values; `packed_keys` counts packed keys, which are never fewer.
    """

    key: Float[Array, "B K R H"]
    value: Float[Array, "B K ring H"]
    packed_keys: Int[Array, "B"]


def compress(
    key: Float[Array, "B K T H"],
    value: Float[Array, "B K T H"],
    lengths: Int[Array, "B"],
    config: CacheConfig,
    capacity: int,
    dtype: DTypeLike,
    balance: Float[Array, "B K H"] | None,
    moment: Float[Array, "B K H H"],
) -> tuple[PackedSegment, KiviWindow]:
    """The prompt: all whole multiples of R of its keys are packed, and all but the last R of its values."""
    size = config.window
    packed_keys = lengths // size * size
    segment = segments.build(config.codec, key, value, jnp.maximum(lengths - size, 0), capacity, dtype, balance, moment)
    # Ring row r holds the newest token t with t % (R + 1) == r.
    last = lengths[:, None] - 1
    newest = last - (last - row_numbers(size + 1, axes=2)) % (size + 1)
    rows = _rows(key, packed_keys[:, None] + row_numbers(size, axes=2)), _rows(value, newest)
    return segment, KiviWindow(*(x.astype(dtype) for x in rows), packed_keys)


def _rows(x: Float[Array, "B K S H"], at: Int[Array, "B R"]) -> Float[Array, "B K R H"]:
    """Rows of each sequence; what lies outside is clipped and never looked at."""
    return jnp.take_along_axis(x, at[:, None, :, None], axis=2, mode="clip")


def _per_head(x: Int[Array, "B"], heads: int) -> Int[Array, "B K"]:
    return jnp.broadcast_to(x[:, None], (x.shape[0], heads))


def has_row(segment: PackedSegment, window: KiviWindow, position: Int[Array, "B"]) -> Bool[Array, "B"]:
    """Whether what the next token pushes out of the window, a value or a whole window of keys, has rows to go to."""
    size, capacity = window.key.shape[2], segment.capacity
    keys_fit = (position + 1 - window.packed_keys < size) | (window.packed_keys + size <= capacity)
    return keys_fit & ((position + 1 - segment.length <= size) | (segment.length < capacity))


def arrive(window: KiviWindow, key, value, position: Int[Array, "B"], accept: Bool[Array, "B"]) -> KiviWindow:
    """The window with one more token [B, K, 1, H]."""
    heads, ring = key.shape[1], window.value.shape[2]
    return dataclasses.replace(
        window,
        key=segments.put_row(window.key, _per_head(position - window.packed_keys, heads), key, accept),
        value=segments.put_row(window.value, _per_head(position % ring, heads), value, accept),
    )


def tail(segment: PackedSegment, window: KiviWindow, position: Int[Array, "B"]) -> DenseSegment:
    """The tokens whose values are not packed yet, with their keys from wherever they are.

    Some of those keys are packed already: the few blocks that hold them are decoded.
    """
    ring = window.value.shape[2]
    tokens = segment.length[:, None] + row_numbers(ring, axes=2)
    blocks = segment.keys.codes.shape[2]
    count = min(segments.touched_blocks(ring), blocks)
    first = jnp.minimum(segment.length // BLOCK, blocks - count)[:, None]
    near = first + row_numbers(count, axes=2)
    packed = (jax.tree.map(lambda x: x[row_numbers(x.shape[0])[:, None], :, near].swapaxes(1, 2), x)
              for x in (segment.keys, segment.values))  # fmt: skip
    packed_key, _ = segments.decode(segment.codec, *map(quantize.from_packed, packed), segment.balance)
    packed_key = _rows(packed_key, tokens - first * BLOCK)
    dense_key = _rows(window.key, tokens - window.packed_keys[:, None])
    is_packed = (tokens < window.packed_keys[:, None])[:, None, :, None]
    key = jnp.where(is_packed, packed_key.astype(dense_key.dtype), dense_key)
    return DenseSegment(key, _rows(window.value, tokens % ring), position + 1 - segment.length)


def settle(
    segment: PackedSegment, window: KiviWindow, position: Int[Array, "B"], accept: Bool[Array, "B"]
) -> tuple[PackedSegment, KiviWindow]:
    """Encodes a full window of keys, and the one value that is now older than the window."""
    size, ring = window.key.shape[2], window.value.shape[2]
    full = accept & (position + 1 - window.packed_keys == size)
    old = accept & (position + 1 - segment.length > size)
    key = Run(window.key, jnp.zeros_like(position), window.packed_keys, full, size)
    value = Run(window.value, segment.length % ring, segment.length, old, 1)
    try:
        segment = segments.write_runs(segment, key, value)
    except NotImplementedError:  # not on this device, or not this codec
        segment = _write(segment, key, value)
    return (
        dataclasses.replace(segment, length=segment.length + old.astype(jnp.int32)),
        dataclasses.replace(window, packed_keys=window.packed_keys + jnp.where(full, size, 0)),
    )


def _write(segment: PackedSegment, key: Run, value: Run) -> PackedSegment:
    heads = key.rows.shape[1]

    def flush(keys):
        codes = segments.encode_new_keys(segment, key.rows)
        return segments.write_codes(keys, codes, _per_head(key.start, heads), key.when)

    keys = jax.lax.cond(key.when.any(), flush, lambda keys: keys, segment.keys)
    codes = segments.encode_values(segment.codec, _rows(value.rows, value.first[:, None]))
    values = segments.write_codes(segment.values, codes, _per_head(value.start, heads), value.when)
    return dataclasses.replace(segment, keys=keys, values=values)
