"""Two-pass attention in plain XLA: the reference and the path of CPUs, TPUs and old GPUs.

It walks over blocks of query rows. A block sees all its keys at once, so its softmax is exact in one go and its column
sums are added right there: XLA needs no second pass. Memory is one block of logits, never T x S.

Causal rows need only the keys up to the diagonal. Shapes inside a loop are static, so the rows are cut into a few
stages with key ranges that grow: with s stages the work is (s + 1) / (2 s) of the square.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.partial import capped
from pallas_kernels.rows import below, row_numbers
from pallas_kernels.two_pass_attention.common import ScoreRows

# Float32 logits of one block of rows, all heads: bounds the memory, stays within a CPU's caches for short prompts.
_LOGIT_ELEMENTS = 1 << 22
_STAGES = 8
_MIN_STAGE = 512


def _block_rows(batch_heads: int, keys: int, rows: int) -> int:
    block = max(_LOGIT_ELEMENTS // (batch_heads * keys), 1)
    block = 1 << (block.bit_length() - 1)
    return min(max(block, 16), 256, rows)


def _block(
    query, key, value, position, row_counts, row_valid, key_lengths, scale, is_causal, sliding_window, soft_cap, sinks
):
    """One block of rows. query [B, K, G, R, H]; key, value [B, K, S, H]; position [B, R]; masks [B, R]."""
    b, k, g, r, h = query.shape
    # The group's rows together are one matrix per key/value head: a third of the time of separate products on a CPU.
    merged = query.reshape(b, k, g * r, h)
    logits = jnp.einsum("bkmh,bksh->bkms", merged, key, preferred_element_type=jnp.float32) * scale
    logits = capped(logits.reshape(b, k, g, r, -1), soft_cap)
    column = row_numbers(key.shape[2], axes=3)
    seen = below(key_lengths, key.shape[2])[:, None] & row_valid[:, :, None]
    if is_causal:
        seen &= column <= position[:, :, None]
    if sliding_window is not None:
        seen &= column > position[:, :, None] - sliding_window
    logits = jnp.where(seen[:, None, None], logits, -jnp.inf)
    maximum = logits.max(axis=-1)
    if sinks is not None:  # one more key, of the rows that are there
        sinks = jnp.where(row_valid[:, None, None], sinks.reshape(1, k, g, 1), -jnp.inf)
        maximum = jnp.maximum(maximum, sinks)
    reference = jnp.where(jnp.isneginf(maximum), 0.0, maximum)
    p = jnp.exp(logits - reference[..., None])
    total = p.sum(axis=-1)
    if sinks is not None:
        total = total + jnp.exp(sinks - reference)
    inverse = jnp.where(total > 0, 1.0 / jnp.where(total > 0, total, 1.0), 0.0)
    merged_p = p.reshape(b, k, g * r, -1)
    output = jnp.einsum("bkms,bksh->bkmh", merged_p.astype(value.dtype), value, preferred_element_type=jnp.float32)
    output = (output.reshape(b, k, g, r, h) * inverse[..., None]).astype(query.dtype)
    lse = reference + jnp.log(total)
    # Which rows count is a weight on rows, so the column sums are one matrix-vector product.
    weight = (inverse * row_counts[:, None, None, :]).reshape(b, k, g * r)
    scores = jnp.einsum("bkms,bkm->bks", merged_p, weight)
    return output, lse, scores


def two_pass_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    query_lengths: Int[Array, "B"],
    key_value_lengths: Int[Array, "B"],
    query_offset: Int[Array, "B"] | None,
    *,
    scale: float,
    is_causal: bool,
    sliding_window: int | None,
    score_rows: ScoreRows,
    soft_cap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B K S"], Float[Array, "B T N"]]:
    b, t, n, h = query.shape
    _, s, heads, _ = key.shape
    g = n // heads
    row = row_numbers(t, axes=2)
    row_valid = below(query_lengths, t)
    first_counted = 0 if score_rows == "all" else query_lengths[:, None] - score_rows
    row_counts = (row_valid & (row >= first_counted)).astype(jnp.float32)
    position = row if query_offset is None else row + query_offset[:, None]
    position = jnp.broadcast_to(position, (b, t))

    key = jnp.swapaxes(key, 1, 2)
    # Padding may hold NaN, and 0 * NaN is NaN.
    present = below(key_value_lengths, s)
    value = jnp.where(present[:, None, :, None], jnp.swapaxes(value, 1, 2), 0)
    query = jnp.where(row_valid[:, None, None, :, None], query.reshape(b, t, heads, g, h).transpose(0, 2, 3, 1, 4), 0)

    block = _block_rows(b * n, s, t)
    padded = -(-t // block) * block

    def pad(x, axis):
        return jnp.pad(x, [(0, padded - t if i == axis else 0) for i in range(x.ndim)])

    query, position, row_counts, row_valid = pad(query, 3), pad(position, 1), pad(row_counts, 1), pad(row_valid, 1)

    from_the_start = is_causal and query_offset is None and s >= t
    stages = min(_STAGES, max(padded // _MIN_STAGE, 1)) if from_the_start else 1
    blocks_per_stage = -(-(padded // block) // stages)
    outputs, lses, scores = [], [], jnp.zeros_like(query, jnp.float32, shape=(b, heads, s))
    for first in range(0, padded // block, blocks_per_stage):
        count = min(blocks_per_stage, padded // block - first)
        reach = min(s, (first + count) * block) if from_the_start else s

        def body(sums, i, reach=reach):
            some_query, at, counts, valid = (
                jax.lax.dynamic_slice_in_dim(x, i * block, block, axis)
                for x, axis in ((query, 3), (position, 1), (row_counts, 1), (row_valid, 1))
            )
            output, lse, column_sums = _block(
                some_query, key[:, :, :reach], value[:, :, :reach], at, counts, valid, key_value_lengths, scale,
                is_causal, sliding_window, soft_cap, sinks,
            )  # fmt: skip
            return sums + column_sums, (output, lse)

        # Like the query: inside `shard_map` a plain constant does not vary over the mesh, as what is added to it does.
        none = jnp.zeros_like(query, jnp.float32, shape=(b, heads, reach))
        sums, (output, lse) = jax.lax.scan(body, none, row_numbers(count, first=first))
        scores = scores.at[:, :, :reach].add(sums)
        outputs.append(output)
        lses.append(lse)

    # [blocks, B, K, G, R, H] -> [B, T, N, H]
    output = jnp.concatenate(outputs).transpose(1, 0, 4, 2, 3, 5).reshape(b, padded, n, h)[:, :t]
    lse = jnp.concatenate(lses).transpose(1, 0, 4, 2, 3).reshape(b, padded, n)[:, :t]
    return output, scores, lse
