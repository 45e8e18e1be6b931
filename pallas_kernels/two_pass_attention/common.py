"""What the GPU implementations share: what they are traced for, what they decline, and the numbers around a kernel."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

HEAD_SIZES = (64, 96, 128, 256)
LOG2E = math.log2(math.e)
# Pass 2 loads a tile of keys once for all query heads of its group when that leaves this many blocks of threads, which
# fill a GPU evenly, or when so few rows count that there is no more to do than to load the keys.
_ENOUGH_BLOCKS = 512
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


def extents(query, key, query_lengths, key_value_lengths, query_offset, score_rows: int | str) -> Int[Array, "B*4"]:
    """Query length, key length, offset and first counted row of each sequence: what a kernel reads of it."""
    batch, t = query.shape[:2]

    def per_sequence(x, default):
        return jnp.full((batch,), default, jnp.int32) if x is None else x.astype(jnp.int32)

    rows, columns = per_sequence(query_lengths, t), per_sequence(key_value_lengths, key.shape[1])
    counted = jnp.zeros_like(rows) if score_rows == "all" else jnp.maximum(rows - score_rows, 0)
    return jnp.stack([rows, columns, per_sequence(query_offset, 0), counted], axis=1).reshape(-1)


def takes_whole_group(score_rows: int | str, tiles: int) -> bool:
    """Whether a block of threads of pass 2 serves a whole group of query heads; `tiles` of keys over all kv heads."""
    return (score_rows != "all" and score_rows <= _FEW_ROWS) or tiles >= _ENOUGH_BLOCKS


def natural(lse2: Float[Array, "B N T"]) -> Float[Array, "B T N"]:
    """The kernels' log-sum-exp: base 2, and +inf on rows that saw nothing, so that exp2(logit - lse) is 0 there."""
    return jnp.swapaxes(jnp.where(jnp.isposinf(lse2), -jnp.inf, lse2 / LOG2E), 1, 2)
