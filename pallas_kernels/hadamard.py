"""The Hadamard rotation of channels, which spreads what is loud in a few of them over all (QuaRot, arXiv 2404.00456,
section 3)."""

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
    """Every row times that matrix; float32. H is a power of two."""
    h = x.shape[-1]
    # Signs alone are exact in every dtype.
    signs = jnp.asarray(np.sign(hadamard(h)), x.dtype)
    return jnp.matmul(x, signs, precision="highest", preferred_element_type=jnp.float32) * h**-0.5


def times_channels(x: Float[Array, "B T N H"], factor: Float[Array, "B K #H"]) -> Float[Array, "B T N H"]:
    """Times a number of each channel of each key/value head, in x's dtype. N is a multiple of K."""
    return x * jnp.repeat(factor, x.shape[2] // factor.shape[1], axis=1)[:, None].astype(x.dtype)


def times_unit(x: Float[Array, "B T N H"], unit: Float[Array, "B K"]) -> Float[Array, "B T N H"]:
    """Times a number of each key/value head, in x's dtype; a power of two costs no digit. N is a multiple of K."""
    return times_channels(x, unit[..., None])


def rotate_back(
    x: Float[Array, "B T N H"], unit: Float[Array, "B K"], balance: Float[Array, "B K H"] | None = None
) -> Float[Array, "B T N H"]:
    """Rotated, times the unit of each key/value head, and divided by what balanced its channels, in x's dtype."""
    x = times_unit(rotate(x).astype(x.dtype), unit)
    return x if balance is None else times_channels(x, 1 / balance)
