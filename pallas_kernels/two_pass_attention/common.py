"""What the GPU implementations share: what they are traced for, what they decline, and the numbers around a kernel."""

import math
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Int

# Rows of queries whose attention is summed: all, or the last so many of each sequence.
type ScoreRows = int | Literal["all"]

HEAD_SIZES = (64, 96, 128, 256)
LOG2E = math.log2(math.e)
# Pass 2 loads a tile of keys once for all query heads of its group when there are so many keys, over all sequences and
# key/value heads, that the tiles of up to 256 fill a GPU evenly, or when so few rows count that there is no more to do
# than to load the keys. With less, each query head's sums are an array of their own before they are added up: memory
# beside the results, below 256 KiB times the size of a group.
_ENOUGH_KEYS = 1 << 16
_FEW_ROWS = 512


def decline_what_no_kernel_takes(query, key, value, scale: float) -> None:
    """Raises NotImplementedError for the arguments that only XLA runs."""
    if query.dtype not in (jnp.bfloat16, jnp.float16) or not query.dtype == key.dtype == value.dtype:
        raise NotImplementedError(f"takes bfloat16 or float16, not {query.dtype}, {key.dtype}, {value.dtype}")
    if query.shape[3] not in HEAD_SIZES:
        raise NotImplementedError(f"takes head sizes {HEAD_SIZES}, not {query.shape[3]}")
    if 0 in query.shape or 0 in key.shape:
        raise NotImplementedError("needs at least one row and one column")
    if not scale > 0:
        raise NotImplementedError(f"needs a scale above 0, not {scale}")


def extents(query, key, query_lengths, key_value_lengths, query_offset, score_rows: ScoreRows) -> Int[Array, "numbers"]:
    """Query length, key length, offset and first counted row of each sequence: what a kernel reads of it."""
    batch, t = query.shape[:2]

    def per_sequence(x, default):
        return jnp.full((batch,), default, jnp.int32) if x is None else x.astype(jnp.int32)

    rows, columns = per_sequence(query_lengths, t), per_sequence(key_value_lengths, key.shape[1])
    counted = jnp.zeros_like(rows) if score_rows == "all" else jnp.maximum(rows - score_rows, 0)
    return jnp.stack([rows, columns, per_sequence(query_offset, 0), counted], axis=1).reshape(-1)


def takes_whole_group(score_rows: ScoreRows, keys: int) -> bool:
    """Whether a block of threads of pass 2 serves a whole group of query heads; `keys` over all B and K."""
    return (score_rows != "all" and score_rows <= _FEW_ROWS) or keys >= _ENOUGH_KEYS
