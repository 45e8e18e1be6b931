"""Segments: runs of cached keys and values, dense or packed. Each answers one question, partial attention.

Rows of a segment are in the order they were written. A row is not a position: keys carry their rotary position from
before they were cached, so attention never needs to know where in the text a row comes from.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from minikv_jax import quantize
from minikv_jax.config import Codec, GroupSize
from minikv_jax.quantize import Codes
from pallas_kernels import (
    Part,
    Partial,
    Rotation,
    Run,
    dense_decode_attention,
    packed_append,
    packed_decode_attention,
    packed_write,
)
from pallas_kernels.packed_append.api import Options as AppendOptions
from pallas_kernels.packed_decode.layout import BLOCK, PackedTensor
from pallas_kernels.rows import row_numbers


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

    @property
    def heads(self) -> tuple[int, int]:
        """Key/value heads, and their size."""
        return self.key.shape[1], self.key.shape[3]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedSegment:
    """Keys and values as packed codes. Tokens at and past `length` are meaningless.

    `balance` (MiKV's b, float32) multiplies a key before it is stored and divides the queries that meet it. `coupling`
    is what feedback needs for more keys, where more come: `quantize.coupling_of`, folded, in the dtype of metadata.
    """

    keys: PackedTensor
    values: PackedTensor
    length: Int[Array, "B"]
    balance: Float[Array, "B K H"] | None
    coupling: Float[Array, "B K half H"] | None
    codec: Codec = dataclasses.field(metadata={"static": True})

    @property
    def capacity(self) -> int:
        return self.keys.capacity

    @property
    def heads(self) -> tuple[int, int]:
        """Key/value heads, and their size."""
        return self.keys.codes.shape[1], self.keys.head_size


Segment = DenseSegment | PackedSegment


def build(
    codec: Codec,
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    length: Int[Array, "B"],
    capacity: int,
    dtype: DTypeLike,
    balance: Float[Array, "B K H"] | None,
    moment: Float[Array, "B K H H"],
) -> Segment:
    """A segment of the first rows, with room for `capacity` tokens (packed: rounded up to whole blocks).

    `balance` is MiKV's, `moment` that of the queries (`QueryStatistics`).
    """
    if codec.dense:
        return DenseSegment(fit(key, capacity).astype(dtype), fit(value, capacity).astype(dtype), length)
    capacity = max(-(-capacity // BLOCK), 1) * BLOCK
    balance = balance if codec.balance else None
    coupling = _coupling(codec, balance, moment)
    codes = encode_keys(codec, fit(key, capacity), balance, coupling), encode_values(codec, fit(value, capacity))
    keys, values = (quantize.to_packed(x, *shape) for x, shape in zip(codes, _layouts(codec, key.shape[-1])))
    kept = quantize.fold(coupling).astype(codec.metadata_dtype) if codec.key_feedback == "all" else None
    return PackedSegment(keys, values, length, balance, kept, codec)


def _coupling(codec: Codec, balance, moment) -> Float[Array, "B K H H"] | None:
    """That of the moment of the queries as they meet the segment's keys, if the codec wants feedback."""
    if codec.key_feedback == "none":
        return None
    if balance is not None:
        moment = moment / (balance[..., None] * balance[..., None, :])
    return quantize.coupling_of(moment)


def empty_like(segment: Segment, batch: int, capacity: int) -> Segment:
    """An empty segment of the same kind for `batch` sequences, with room for `capacity` tokens each."""
    length = jnp.zeros((batch,), jnp.int32)
    if isinstance(segment, DenseSegment):
        _, heads, _, head_size = segment.key.shape
        rows = (jnp.zeros((batch, heads, capacity, head_size), x.dtype) for x in (segment.key, segment.value))
        return DenseSegment(*rows, length)
    blocks = -(-capacity // BLOCK) + 1  # a run that is encoded together may touch one block more than it fills

    def zeros(packed):
        return jax.tree.map(lambda x: jnp.zeros((batch, x.shape[1], blocks, *x.shape[3:]), x.dtype), packed)

    balance, coupling = jax.tree.map(lambda x: jnp.repeat(x, batch, axis=0), (segment.balance, segment.coupling))
    return PackedSegment(zeros(segment.keys), zeros(segment.values), length, balance, coupling, segment.codec)


def fit(x: Float[Array, "..."], rows: int, axis: int = 2) -> Float[Array, "..."]:
    """Cut or filled with zeros to `rows` along `axis`."""
    x = jax.lax.slice_in_dim(x, 0, min(rows, x.shape[axis]), axis=axis)
    return jnp.pad(x, [(0, rows - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])


# ---- codec ---------------------------------------------------------------------------------------------------------


def group_size(size: GroupSize, head_size: int) -> int:
    return {"head": head_size, "half_head": head_size // 2}.get(size, size)


def _layouts(codec: Codec, head_size: int):
    """(bits, group size, group axis, tokens last) of keys and of values."""
    key_group, value_group = (group_size(x, head_size) for x in (codec.key_group, codec.value_group))
    return (
        (codec.key_bits, key_group, codec.key_axis, False),
        (codec.value_bits, value_group, "channels", True),
    )


def encode_keys(
    codec: Codec,
    key: Float[Array, "B K S H"],
    balance: Float[Array, "B K H"] | None,
    coupling: Float[Array, "B K H H"] | None = None,
) -> Codes:
    """Codes of keys; with feedback where there is a `coupling` (`quantize.coupling_of`)."""
    bits, group, axis, _ = _layouts(codec, key.shape[-1])[0]
    if balance is not None:
        key = key.astype(jnp.float32) * balance[:, :, None]
    if coupling is None:
        return quantize.encode(key, bits, group, axis, codec.metadata_dtype, codec.key_clip, codec.integer_zero)
    return quantize.encode_with_feedback(key, coupling, bits, group, codec.metadata_dtype, codec.key_clip)


def encode_values(codec: Codec, value: Float[Array, "B K S H"]) -> Codes:
    bits, group, axis, _ = _layouts(codec, value.shape[-1])[1]
    return quantize.encode(value, bits, group, axis, codec.metadata_dtype, codec.value_clip, codec.integer_zero)


def encode(segment: PackedSegment, key: Float[Array, "B K S H"], value: Float[Array, "B K S H"]) -> tuple[Codes, Codes]:
    """New tokens as the segment stores them."""
    return encode_new_keys(segment, key), encode_values(segment.codec, value)


def encode_new_keys(segment: PackedSegment, key: Float[Array, "B K S H"]) -> Codes:
    """New keys as the segment stores them; with feedback by what the prompt's queries were, where it wants that."""
    coupling = None if segment.coupling is None else quantize.unfold(segment.coupling)
    return encode_keys(segment.codec, key, segment.balance, coupling)


def decode(
    codec: Codec, keys: Codes, values: Codes, balance: Float[Array, "B K H"] | None
) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    """Keys and values as attention effectively sees them, float32."""
    key, value = (
        quantize.decode(codes, group, axis)
        for codes, (_, group, axis, _) in zip((keys, values), _layouts(codec, keys.codes.shape[-1]))
    )
    return key if balance is None else key / balance[:, :, None], value


# ---- attention -----------------------------------------------------------------------------------------------------


def part(query: Float[Array, "B T N H"], segment: Segment, rows: Int[Array, "B T"] | None = None) -> Part:
    """The segment, and the queries as they meet its keys, for `decode_attention`.

    Each query sees all tokens the segment holds, or, of a dense one, the first `rows`.
    """
    if isinstance(segment, DenseSegment):
        return Part(query, segment.key, segment.value, segment.length if rows is None else rows)
    dtype = query.dtype
    if segment.balance is not None:
        heads = segment.balance.shape[1]
        query = query / jnp.repeat(segment.balance, query.shape[2] // heads, axis=1)[:, None]
    return Part(query.astype(dtype), segment.keys, segment.values, segment.length)


def attention(
    query: Float[Array, "B T N H"], segment: Segment, return_logits: bool = False
) -> Partial | tuple[Partial, Float[Array, "B T N S"]]:
    """Partial attention of the queries over the tokens the segment holds, and their logits where asked for."""
    attend = dense_decode_attention if isinstance(segment, DenseSegment) else packed_decode_attention
    return attend(*part(query, segment), return_logits=return_logits)


def received(
    logits: Float[Array, "B T N S"],
    lse: Float[Array, "B T N"],
    seen: Bool[Array, "B T S"],
    heads: int,
) -> Float[Array, "B K S"]:
    """Attention each token received from the queries that saw it, summed over them and over each group.

    `lse` is the log-sum-exp of the queries' whole attention, of these tokens and all others.
    """
    p = jnp.where(seen[:, :, None], jnp.exp(logits - lse[..., None]), 0)
    b, t, n, s = p.shape
    return p.reshape(b, t, heads, n // heads, s).sum(axis=(1, 3))


# ---- writing -------------------------------------------------------------------------------------------------------


def append(segment: Segment, key: Float[Array, "B K 1 H"], value: Float[Array, "B K 1 H"], accept: Bool[Array, "B"]):
    """The segment with one more token for the sequences that accept it."""
    b, heads = key.shape[:2]
    slot = jnp.broadcast_to(segment.length[:, None], (b, heads))
    return dataclasses.replace(put(segment, slot, key, value, accept), length=segment.length + accept.astype(jnp.int32))


def put(segment: Segment, slot: Int[Array, "B K"], key, value, accept: Bool[Array, "B"]) -> Segment:
    """Writes one token per head into its slot, for the sequences that accept it."""
    if isinstance(segment, PackedSegment):
        return put_codes(segment, slot, *encode(segment, key, value), accept)

    rows = (put_row(x, slot, new, accept) for x, new in ((segment.key, key), (segment.value, value)))
    key, value = rows
    return dataclasses.replace(segment, key=key, value=value)


def put_row(
    rows: Float[Array, "B K S H"], slot: Int[Array, "B K"], new: Float[Array, "B K 1 H"], accept: Bool[Array, "B"]
) -> Float[Array, "B K S H"]:
    """Writes one row per head, for the sequences that accept it; in place where the array is donated."""
    # Writing the old row back where nothing is accepted keeps the index in bounds, and XLA the update in place: a
    # scatter that may drop rows copies the whole segment.
    slot = jnp.minimum(slot, rows.shape[2] - 1)
    b, heads = slot.shape
    at = rows.at[row_numbers(b)[:, None], row_numbers(heads, axes=2), slot]
    kept = jnp.where(accept[:, None, None], new[:, :, 0].astype(rows.dtype), at.get(mode="promise_in_bounds"))
    # Without the barrier XLA writes the row once for the result and once more, into a copy, for the attention.
    return jax.lax.optimization_barrier(at.set(kept, mode="promise_in_bounds", unique_indices=True))


def put_codes(segment: PackedSegment, start, keys: Codes, values: Codes, accept: Bool[Array, "B"]) -> PackedSegment:
    """Writes codes of consecutive tokens at token `start` [B, K] of the sequences that accept them."""
    written = (write_codes(x, new, start, accept) for x, new in ((segment.keys, keys), (segment.values, values)))
    keys, values = written
    return dataclasses.replace(segment, keys=keys, values=values)


def append_to_window(
    segment: PackedSegment,
    window: DenseSegment,
    key,
    value,
    accept: Bool[Array, "B"],
    first: int,
    keeps: int = 0,
    rotation: Rotation | None = None,
) -> tuple[PackedSegment, DenseSegment, Float[Array, "B 1 N H"] | None]:
    """A window with one more token, and what is full with it in the segment, by one kernel: from row `first` on and but
    for the newest `keeps`. With `rotation` key, value and its query are as the model gives them, and the query comes
    back as the rows are held.

    Raises:
        NotImplementedError: there is no kernel for this codec or this device.
    """
    new = packed_append(
        key, value, accept, window.key, window.value, window.length, segment.keys, segment.values, segment.length,
        first=first, keeps=keeps, options=_kernel_options(segment), rotation=rotation,
    )  # fmt: skip
    return (
        dataclasses.replace(segment, keys=new.keys, values=new.values, length=new.length),
        DenseSegment(new.window_key, new.window_value, new.window_length),
        new.query,
    )


def write_runs(segment: PackedSegment, key: Run, value: Run) -> PackedSegment:
    """Encodes a run of dense keys and one of values into the segment by one kernel; its length stays.

    Raises:
        NotImplementedError: there is no kernel for this codec or this device.
    """
    keys, values = packed_write(key, value, segment.keys, segment.values, options=_kernel_options(segment))
    return dataclasses.replace(segment, keys=keys, values=values)


def _kernel_options(segment: PackedSegment) -> AppendOptions:
    codec = segment.codec
    if codec.integer_zero:
        raise NotImplementedError("whole zero points have no kernel")
    return AppendOptions(codec.key_clip, codec.value_clip, segment.balance, segment.coupling)


def take(segment: Segment, slot: Int[Array, "B K"]) -> tuple[Float[Array, "B K 1 H"], Float[Array, "B K 1 H"]]:
    """Key and value of one token per head, as attention sees them."""
    if isinstance(segment, DenseSegment):
        return tuple(jnp.take_along_axis(x, slot[..., None, None], axis=2) for x in (segment.key, segment.value))
    return decode(segment.codec, *take_codes(segment, slot), segment.balance)


def take_codes(segment: PackedSegment, slot: Int[Array, "B K"]) -> tuple[Codes, Codes]:
    """Codes of one token per head; its groups must lie over channels."""

    def one(packed):
        block = jax.tree.map(lambda x: _blocks(x, (slot // BLOCK)[..., None]), packed)
        row = (slot % BLOCK)[..., None, None]
        return Codes(*(jnp.take_along_axis(x, row, axis=2) for x in quantize.from_packed(block)))

    return one(segment.keys), one(segment.values)


def move(segment: Segment, source: Int[Array, "B K"], target: Int[Array, "B K"], accept: Bool[Array, "B"]) -> Segment:
    """Copies one token per head from slot to slot, codes as they are."""
    if isinstance(segment, PackedSegment):
        return put_codes(segment, target, *take_codes(segment, source), accept)
    return put(segment, target, *take(segment, source), accept)


def touched_blocks(tokens: int) -> int:
    """Blocks that a run of tokens can lie in, wherever it starts."""
    return (tokens - 2) // BLOCK + 2 if tokens > 1 else 1


def _blocks(x, index: Int[Array, "B K blocks"]):
    return jnp.take_along_axis(x, index[..., None, None], axis=2)


def write_codes(packed: PackedTensor, new: Codes, start: Int[Array, "B K"], accept: Bool[Array, "B"]) -> PackedTensor:
    """Writes codes of consecutive tokens at token `start` of each head of each accepting sequence.

    A run rarely starts on a block boundary and bytes carry tokens that lie far apart, so the blocks it touches are
    unpacked, changed and packed again: a few hundred tokens, however long the segment is.
    """
    tokens = new.codes.shape[2]
    blocks = packed.codes.shape[2]
    count = min(touched_blocks(tokens), blocks)
    first = jnp.minimum(start // BLOCK, blocks - count)
    index = first[..., None] + row_numbers(count, axes=3)
    old = quantize.from_packed(jax.tree.map(lambda x: _blocks(x, index), packed))

    def replace(old_rows, new_rows):
        per_row = tokens // new_rows.shape[2]
        row = row_numbers(old_rows.shape[2], axes=3) - ((start - first * BLOCK) // per_row)[..., None]
        inside = (row >= 0) & (row < new_rows.shape[2]) & accept[:, None, None]
        taken = jnp.take_along_axis(new_rows, row[..., None], axis=2, mode="clip")
        return jnp.where(inside[..., None], taken, old_rows)

    changed = quantize.to_packed(
        Codes(*map(replace, old, new)), packed.bits, packed.group_size, packed.group_axis, packed.tokens_last
    )
    b, heads = start.shape
    sequence, head = row_numbers(b)[:, None, None], row_numbers(heads)[None, :, None]
    return jax.tree.map(
        lambda x, y: x.at[sequence, head, index].set(y, mode="promise_in_bounds", unique_indices=True), packed, changed
    )
