"""Single tokens and runs of tokens in packed keys or values, where a byte carries tokens that lie far apart."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels import quantize
from pallas_kernels.packed_decode.layout import BLOCK, PackedTensor
from pallas_kernels.quantize import Codes
from pallas_kernels.rows import row_numbers


def touched_blocks(tokens: int) -> int:
    """Blocks that a run of tokens can lie in, wherever it starts."""
    return (tokens - 2) // BLOCK + 2 if tokens > 1 else 1


def _blocks(x, index: Int[Array, "B K blocks"]):
    return jnp.take_along_axis(x, index[..., None, None], axis=2)


def take_codes(packed: PackedTensor, slot: Int[Array, "B K"]) -> Codes:
    """Codes of one token per head; its groups must lie over channels."""
    block = jax.tree.map(lambda x: _blocks(x, (slot // BLOCK)[..., None]), packed)
    row = (slot % BLOCK)[..., None, None]
    return Codes(*(jnp.take_along_axis(x, row, axis=2) for x in quantize.from_packed(block)))


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
