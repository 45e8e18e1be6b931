"""The Hadamard rotation of channels, which spreads what is loud in a few of them over all."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def hadamard(size: int) -> Float[np.ndarray, "size size"]:
    """The orthonormal Hadamard matrix of a power of two (Sylvester's): symmetric, its own inverse."""
    matrix = np.ones((1, 1), np.float32)
    while matrix.shape[0] < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(np.float32(size))


def rotate(x: Float[Array, "... H"]) -> Float[Array, "... H"]:
    """Every row times that matrix; float32."""
    h = x.shape[-1]
    # Signs alone are exact in every dtype.
    signs = jnp.asarray(np.sign(hadamard(h)), x.dtype)
    return jnp.matmul(x, signs, precision="highest", preferred_element_type=jnp.float32) * h**-0.5


def rotate_back(x: Float[Array, "B T N H"], unit: Float[Array, "B K"] | None) -> Float[Array, "B T N H"]:
    """Rotated, and times the unit of each key/value head, in x's dtype; as it is without a unit."""
    if unit is None:
        return x
    factor = jnp.repeat(unit, x.shape[2] // unit.shape[1], axis=1)[:, None, :, None]
    return rotate(x).astype(x.dtype) * factor.astype(x.dtype)
