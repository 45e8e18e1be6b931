"""Segments: runs of cached keys and values, dense or packed. Each answers one question, partial attention.

Rows of a segment are in the order they were written. A row is not a position: keys carry their rotary position from
before they were cached, so attention never needs to know where in the text a row comes from.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from minikv_jax import channels as narrow
from minikv_jax.codec import Codec, coupling, decode, encode_keys, encode_values, key_layout, value_layout
from pallas_kernels import Part, Partial, partial_attention, quantize
from pallas_kernels.packed_append.api import Options as AppendOptions
from pallas_kernels.packed_append.xla import encode_new_keys, encode_new_values
from pallas_kernels.packed_decode.layout import BLOCK, PackedTensor
from pallas_kernels.packed_rows import take_codes, write_codes
from pallas_kernels.quantize import Codes
from pallas_kernels.rows import put_row, row_numbers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseSegment:
    """Keys and values in a float dtype, head-major. Rows at and past `length` are meaningless.

    Attributes:
        key, value: the rows; keys have the channels `channels` alone, if there are any.
        length: rows held.
        channels: of keys (`Codec.key_drop`).
    """

    key: Float[Array, "B K S C"]
    value: Float[Array, "B K S H"]
    length: Int[Array, "B"]
    channels: Int[Array, "B K C"] | None = None

    @property
    def capacity(self) -> int:
        return self.key.shape[2]

    @property
    def heads(self) -> tuple[int, int]:
        """Key/value heads, and their size."""
        return self.value.shape[1], self.value.shape[3]

    @property
    def stored(self) -> tuple[Array, ...]:
        """The arrays that grow with the tokens held, for reports."""
        return self.key, self.value

    @property
    def codes(self) -> tuple[Array, ...]:
        """The stored numbers, without what they need beside them."""
        return self.key, self.value

    def part(self, query: Float[Array, "B T N H"]) -> Part:
        """The segment for `decode_attention`, and the queries as they meet its keys."""
        return Part(narrow.of_queries(query, self.channels), self.key, self.value, self.length)

    def put(self, slot: Int[Array, "B K"], key, value, accept: Bool[Array, "B"]) -> "DenseSegment":
        """Writes one token [B, K, 1, H] per head into its slot, for the sequences that accept it."""
        return self._put(slot, narrow.of_keys(key, self.channels), value, accept)

    def _put(self, slot: Int[Array, "B K"], key, value, accept: Bool[Array, "B"]) -> "DenseSegment":
        key, value = (put_row(x, slot, new, accept) for x, new in ((self.key, key), (self.value, value)))
        return dataclasses.replace(self, key=key, value=value)

    def take(self, slot: Int[Array, "B K"]) -> tuple[Float[Array, "B K 1 C"], Float[Array, "B K 1 H"]]:
        """Key and value of one token per head, as attention sees them."""
        key, value = (jnp.take_along_axis(x, slot[..., None, None], axis=2) for x in (self.key, self.value))
        return key, value

    def move(self, source: Int[Array, "B K"], target: Int[Array, "B K"], accept: Bool[Array, "B"]) -> "DenseSegment":
        """Copies one token per head from slot to slot."""
        return self._put(target, *self.take(source), accept)

    def empty(self, batch: int, capacity: int) -> "DenseSegment":
        """An empty segment of the same kind for `batch` sequences, with room for `capacity` tokens each."""
        rows = ((x.shape[1], capacity, x.shape[3]) for x in (self.key, self.value))
        key, value = (jnp.zeros((batch, *shape), x.dtype) for shape, x in zip(rows, (self.key, self.value)))
        channels = None if self.channels is None else jnp.repeat(self.channels, batch, axis=0)
        return DenseSegment(key, value, jnp.zeros((batch,), jnp.int32), channels)

    def final(self) -> "DenseSegment":
        """The segment without what only more tokens would need."""
        return self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedSegment:
    """Keys and values as packed codes. Tokens at and past `length` are meaningless.

    Attributes:
        keys, values: codes, scales and minima.
        length: tokens held.
        balance: MiKV's b, float32. It multiplies a key before the key is stored, and divides the queries that meet it.
        coupling: the folded matrix of error feedback (`quantize.coupling_of`) for keys that are appended later, in the
            dtype of metadata.
        codec: static.
        channels: those that are held of keys (`Codec.key_drop`); None: all. `balance` and `coupling` are of these.
    """

    keys: PackedTensor
    values: PackedTensor
    length: Int[Array, "B"]
    balance: Float[Array, "B K C"] | None
    coupling: Float[Array, "B K half C"] | None
    codec: Codec = dataclasses.field(metadata={"static": True})
    channels: Int[Array, "B K C"] | None = None

    @property
    def capacity(self) -> int:
        return self.keys.capacity

    @property
    def heads(self) -> tuple[int, int]:
        """Key/value heads, and their size."""
        return self.values.codes.shape[1], self.values.head_size

    @property
    def stored(self) -> tuple:
        """The arrays that grow with the tokens held, and what feedback needs for new keys, for reports."""
        return self.keys, self.values, self.coupling

    @property
    def codes(self) -> tuple[Array, ...]:
        """The stored numbers, without what they need beside them."""
        return self.keys.codes, self.values.codes

    @property
    def options(self) -> AppendOptions:
        """How new tokens are encoded, for `packed_append` and `packed_write`."""
        codec = self.codec
        return AppendOptions(
            codec.key_clip, codec.value_clip, self.balance, self.coupling, codec.integer_zero, self.channels
        )

    def part(self, query: Float[Array, "B T N H"]) -> Part:
        """The segment for `decode_attention`, and the queries as they meet its keys."""
        dtype = query.dtype
        query = narrow.of_queries(query, self.channels)
        if self.balance is not None:
            heads = self.balance.shape[1]
            query = query / jnp.repeat(self.balance, query.shape[2] // heads, axis=1)[:, None]
        return Part(query.astype(dtype), self.keys, self.values, self.length)

    def put(self, slot: Int[Array, "B K"], key, value, accept: Bool[Array, "B"]) -> "PackedSegment":
        """Encodes one token [B, K, 1, H] per head into its slot, for the sequences that accept it."""
        codes = encode_new_keys(key, self.keys, self.options), encode_new_values(value, self.values, self.options)
        return self._put_codes(slot, *codes, accept)

    def _put_codes(self, start, keys: Codes, values: Codes, accept: Bool[Array, "B"]) -> "PackedSegment":
        """Writes codes of consecutive tokens at token `start` [B, K] of the sequences that accept them."""
        written = (write_codes(x, new, start, accept) for x, new in ((self.keys, keys), (self.values, values)))
        packed_keys, packed_values = written
        return dataclasses.replace(self, keys=packed_keys, values=packed_values)

    def _take_codes(self, slot: Int[Array, "B K"]) -> tuple[Codes, Codes]:
        return take_codes(self.keys, slot), take_codes(self.values, slot)

    def take(self, slot: Int[Array, "B K"]) -> tuple[Float[Array, "B K 1 C"], Float[Array, "B K 1 H"]]:
        """Key and value of one token per head, as attention sees them."""
        return decode(self.codec, *self._take_codes(slot), self.balance)

    def move(self, source: Int[Array, "B K"], target: Int[Array, "B K"], accept: Bool[Array, "B"]) -> "PackedSegment":
        """Copies one token per head from slot to slot, codes as they are."""
        return self._put_codes(target, *self._take_codes(source), accept)

    def empty(self, batch: int, capacity: int) -> "PackedSegment":
        """An empty segment of the same kind for `batch` sequences, with room for `capacity` tokens each."""
        blocks = -(-capacity // BLOCK) + 1  # a run that is encoded together may touch one block more than it fills

        def zeros(packed):
            return jax.tree.map(lambda x: jnp.zeros((batch, x.shape[1], blocks, *x.shape[3:]), x.dtype), packed)

        learnt = self.balance, self.coupling, self.channels
        balance, coupling, channels = jax.tree.map(lambda x: jnp.repeat(x, batch, axis=0), learnt)
        length = jnp.zeros((batch,), jnp.int32)
        return PackedSegment(zeros(self.keys), zeros(self.values), length, balance, coupling, self.codec, channels)

    def final(self) -> "PackedSegment":
        """The segment without what only more tokens would need."""
        return dataclasses.replace(self, coupling=None)


Segment = DenseSegment | PackedSegment


def build(
    codec: Codec,
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S V"],
    length: Int[Array, "B"],
    capacity: int,
    dtype: DTypeLike,
    balance: Float[Array, "B K H"] | None,
    moment: Float[Array, "B _ _ _"],
    channels: Int[Array, "B K C"] | None = None,
) -> Segment:
    """A segment of the first rows, with room for `capacity` tokens (packed: rounded up to whole blocks).

    Args:
        codec: how the rows are stored; dense ones have the `dtype`.
        key, value: the rows.
        length: rows that are tokens.
        capacity: static.
        dtype: of dense rows.
        balance: MiKV's, used by codecs that balance.
        moment: [B, K, H, H] of the queries (`basis.Moments`), used by codecs with feedback.
        channels: those to hold of the keys; None: all.
    """
    key = narrow.of_keys(key, channels)
    if codec.dense:
        return DenseSegment(fit(key, capacity).astype(dtype), fit(value, capacity).astype(dtype), length, channels)
    capacity = max(-(-capacity // BLOCK), 1) * BLOCK
    balance = narrow.of_heads(balance, channels) if codec.balance and balance is not None else None
    matrix = coupling(codec, balance, narrow.of_moment(moment, channels))
    # Room for later tokens stays empty: encoding its zeros costs time, and XLA would do so while it compiles.
    blocks = max(-(-min(key.shape[2], capacity) // BLOCK), 1)
    key, value = fit(key, blocks * BLOCK), fit(value, blocks * BLOCK)
    codes = encode_keys(codec, key, balance, matrix), encode_values(codec, value)
    layouts = key_layout(codec, key.shape[-1]), value_layout(codec, value.shape[-1])
    keys, values = (quantize.to_packed(x, *layout) for x, layout in zip(codes, layouts))
    keys, values = jax.tree.map(lambda x: fit(x, capacity // BLOCK), (keys, values))
    later = None if codec.key_feedback != "all" else matrix
    kept = None if later is None else quantize.fold(later).astype(codec.metadata_dtype)
    return PackedSegment(keys, values, length, balance, kept, codec, channels)


def fit(x: Shaped[Array, "..."], rows: int, axis: int = 2) -> Shaped[Array, "..."]:
    """Cut or filled with zeros to `rows` along `axis`."""
    x = jax.lax.slice_in_dim(x, 0, min(rows, x.shape[axis]), axis=axis)
    return jnp.pad(x, [(0, rows - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])


@overload
def attention(
    query: Float[Array, "B T N H"], segment: Segment, *, return_logits: Literal[False] = False, **softmax: Any
) -> Partial: ...
@overload
def attention(
    query: Float[Array, "B T N H"], segment: Segment, *, return_logits: Literal[True], **softmax: Any
) -> tuple[Partial, Float[Array, "B T N S"]]: ...
def attention(
    query: Float[Array, "B T N H"], segment: Segment, **softmax: Any
) -> Partial | tuple[Partial, Float[Array, "B T N S"]]:
    """Partial attention of the queries over the tokens the segment holds, and with `return_logits` their logits."""
    return partial_attention(segment.part(query), **softmax)


def shared_attention(
    query: Float[Array, "B T N H"],
    prefix: Segment,
    prefix_of: Int[Array, "B"],
    read: Callable[..., Partial] = attention,
    **softmax: Any,
) -> Partial:
    """All sequences' queries over shared segments, each read once: to it they are so many more queries of one sequence.

    A sequence's own is picked from all answers; one that has none sees no key.
    """
    (b, t), prefixes = query.shape[:2], prefix.length.shape[0]
    rows = jnp.broadcast_to(query.reshape(1, b * t, *query.shape[2:]), (prefixes, b * t, *query.shape[2:]))
    partial = read(rows, prefix, **softmax)
    of, some = (jnp.maximum(prefix_of, 0), row_numbers(b)), (prefix_of >= 0)[:, None, None]
    output, maximum, total = (x.reshape(prefixes, b, t, *x.shape[2:])[of] for x in partial)
    output, total = jnp.where(some[..., None], output, 0), jnp.where(some, total, 0)
    return Partial(output, jnp.where(some, maximum, -jnp.inf), total)


def append(segment: Segment, key: Float[Array, "B K 1 H"], value: Float[Array, "B K 1 V"], accept: Bool[Array, "B"]):
    """The segment with one more token for the sequences that accept it."""
    b, heads = key.shape[:2]
    slot = jnp.broadcast_to(segment.length[:, None], (b, heads))
    return dataclasses.replace(segment.put(slot, key, value, accept), length=segment.length + accept.astype(jnp.int32))
