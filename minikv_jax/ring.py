"""KIVI's inflow (arXiv 2402.02750, section 4): keys wait until R of them are there, values leave one by one.

tokens     0 ........ packed_values ...... packed_keys ........ position
keys       packed ....................... | window.key (0 to R - 1 rows)
values     packed ........| window.value, a ring of the newest R (and the one that is about to leave)
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minikv_jax import codec
from minikv_jax.cache import LayerCache
from minikv_jax.checks import check_types, require
from minikv_jax.inflow import Inflow
from minikv_jax.segments import DenseSegment
from pallas_kernels import Run, packed_write, quantize
from pallas_kernels.packed_decode.layout import BLOCK
from pallas_kernels.packed_rows import touched_blocks
from pallas_kernels.rows import put_row, row_numbers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KiviWindow:
    """The newest keys and values. The value of token t lies in ring row t % (R + 1).

    The segment's length counts packed values; `packed_keys` counts packed keys, which are never fewer.
    """

    key: Float[Array, "B K R H"]
    value: Float[Array, "B K ring V"]
    packed_keys: Int[Array, "B"]


@dataclasses.dataclass(frozen=True)
class Ring(Inflow):
    """A full window of keys is encoded after attention, and values one by one as they grow older than the window.

    Attributes:
        window: R, keys of a window and values of the ring; a multiple of the codec's groups of tokens.
    """

    window: int = 128

    stays = "a full window of keys has been encoded and stays so"

    def __post_init__(self):
        check_types(self)
        require(self.window >= 1, f"window={self.window}: give at least 1 token.")

    def check(self, method):
        group = method.codec.token_group
        require(not method.codec.dense, f"window={self.window}: only tokens that are encoded together need a window.")
        require(self.window % group == 0, f"window={self.window} must be a multiple of the key group {group}.")
        require(not method.selects, "A ring of values needs every token: let the allocation keep all of them.")
        require(
            not method.codec.key_drop, "A ring of values reads packed keys whole: leave key_drop at 0, or use Block."
        )
        require(method.rest is None, "A ring of values keeps every token in one tier: give no second one.")

    def rows(self, method, kept, left, total, config):
        # What a window encodes touches whole blocks, even at the end of the segment.
        return max(kept + config.generated_capacity, BLOCK * touched_blocks(self.window)), left

    def begin(self, prompt, method):
        """All whole multiples of R of the prompt's keys are packed, and all but the last R of its values."""
        size, lengths = self.window, prompt.lengths
        packed_keys = lengths // size * size
        packed_values = jnp.maximum(lengths - size, 0)
        first = prompt.tier(method.codec, prompt.key, prompt.value, packed_values, prompt.shape.first)
        # Ring row r holds the newest token t with t % (R + 1) == r.
        last = lengths[:, None] - 1
        newest = last - (last - row_numbers(size + 1, axes=2)) % (size + 1)
        key = _rows(prompt.key, packed_keys[:, None] + row_numbers(size, axes=2)).astype(prompt.dtype)
        window = KiviWindow(key, _rows(prompt.value, newest).astype(prompt.dtype), packed_keys)
        return LayerCache(first, method, flow=window)

    def has_row(self, layer, position):
        segment, window, size = layer.first, layer.flow, self.window
        capacity = segment.capacity
        keys_fit = (position + 1 - window.packed_keys < size) | (window.packed_keys + size <= capacity)
        return keys_fit & ((position + 1 - segment.length <= size) | (segment.length < capacity))

    def arrive(self, layer, key, value, position, accept, score=0.0):
        window, heads = layer.flow, key.shape[1]
        window = dataclasses.replace(
            window,
            key=put_row(window.key, _per_head(position - window.packed_keys, heads), key, accept),
            value=put_row(window.value, _per_head(position % (self.window + 1), heads), value, accept),
        )
        return dataclasses.replace(layer, flow=window)

    def newest(self, layer, position):
        """The tokens whose values are not packed yet, with their keys from wherever they are.

        Some of those keys are packed already: the few blocks that hold them are decoded.
        """
        segment, window, ring = layer.first, layer.flow, self.window + 1
        tokens = segment.length[:, None] + row_numbers(ring, axes=2)
        blocks = segment.keys.codes.shape[2]
        count = min(touched_blocks(ring), blocks)
        first = jnp.minimum(segment.length // BLOCK, blocks - count)[:, None]
        near = first + row_numbers(count, axes=2)
        packed = (jax.tree.map(lambda x: x[row_numbers(x.shape[0])[:, None], :, near].swapaxes(1, 2), x)
                  for x in (segment.keys, segment.values))  # fmt: skip
        packed_key, _ = codec.decode(segment.codec, *map(quantize.from_packed, packed), balance=segment.balance)
        packed_key = _rows(packed_key, tokens - first * BLOCK)
        dense_key = _rows(window.key, tokens - window.packed_keys[:, None])
        is_packed = (tokens < window.packed_keys[:, None])[:, None, :, None]
        key = jnp.where(is_packed, packed_key.astype(dense_key.dtype), dense_key)
        return [DenseSegment(key, _rows(window.value, tokens % ring), position + 1 - segment.length)]

    def settle(self, layer, position, accept):
        """Encodes a full window of keys, and the one value that is now older than the window."""
        segment, window, size = layer.first, layer.flow, self.window
        full = accept & (position + 1 - window.packed_keys == size)
        old = accept & (position + 1 - segment.length > size)
        key = Run(window.key, jnp.zeros_like(position), window.packed_keys, full, size)
        value = Run(window.value, segment.length % (size + 1), segment.length, old, 1)
        keys, values = packed_write(key, value, segment.keys, segment.values, options=segment.options)
        segment = dataclasses.replace(segment, keys=keys, values=values, length=segment.length + old.astype(jnp.int32))
        window = dataclasses.replace(window, packed_keys=window.packed_keys + jnp.where(full, size, 0))
        return dataclasses.replace(layer, first=segment, flow=window)

    def ahead(self, layer, position):
        keys = self.window - 1 - (position - layer.flow.packed_keys)
        return jnp.clip(jnp.minimum(keys, self.window - (position - layer.first.length)), 0)

    def behind(self, layer, position):
        return position - layer.flow.packed_keys

    def taken_back(self, layer, counts):
        return layer  # its rows are counted from the tokens read; values that newer ones pushed out stay encoded

    def waiting(self, layer):
        return layer.flow

    def held(self, layer, read):
        return read


def _rows(x: Float[Array, "B K S H"], at: Int[Array, "B R"]) -> Float[Array, "B K R H"]:
    """Rows of each sequence; what lies outside is clipped and never looked at."""
    return jnp.take_along_axis(x, at[:, None, :, None], axis=2, mode="clip")


def _per_head(x: Int[Array, "B"], heads: int) -> Int[Array, "B K"]:
    return jnp.broadcast_to(x[:, None], (x.shape[0], heads))
