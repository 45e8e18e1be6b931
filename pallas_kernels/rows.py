"""Numbers of rows, as int32 whatever JAX's flags make of a plain `arange`, and in the shape they are compared in."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def row_numbers(size: int, axes: int = 1, first: int = 0) -> Int[Array, "..."]:
    """first, first + 1, ... of `size` rows along the last of so many axes; int32."""
    return jax.lax.broadcasted_iota(jnp.int32, (1,) * (axes - 1) + (size,), axes - 1) + jnp.int32(first)


def below(counts: Int[Array, "*batch"], size: int) -> Bool[Array, "*batch size"]:
    """Which of `size` rows are the first `counts`."""
    return row_numbers(size, counts.ndim + 1) < counts[..., None]
