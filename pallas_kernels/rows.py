"""Numbers of rows, as int32 whatever JAX's flags make of a plain `arange`, and rows written in place."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def row_numbers(size: int, axes: int = 1, first: int = 0) -> Int[Array, "..."]:
    """first, first + 1, ... of `size` rows along the last of so many axes; int32."""
    return jax.lax.broadcasted_iota(jnp.int32, (1,) * (axes - 1) + (size,), axes - 1) + jnp.int32(first)


def below(counts: Int[Array, "*batch"], size: int) -> Bool[Array, "*batch size"]:
    """Which of `size` rows are the first `counts`."""
    return row_numbers(size, counts.ndim + 1) < counts[..., None]


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
