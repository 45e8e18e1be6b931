"""ThinK (arXiv 2407.21018): a tier holds the channels of keys that the prompt's last queries use, no others.

Each head chooses its own. A query meets the keys with the same channels alone, so both are narrower than values.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.rows import below

# Queries at a prompt's end that choose.
LAST = 32

# Counts are rounded up to multiples of this: rows then begin where 16-byte loads may.
_STEP = 8


def kept(head_size: int, drop: float) -> int:
    """Channels that a tier holds of each key if it may drop this share of them.

    ThinK's int(H drop) channels are dropped, less those that make the number of kept ones a multiple of 8.
    """
    left = head_size - int(head_size * drop)
    return min(-(-left // _STEP) * _STEP, head_size)


def chosen(
    latest: Float[Array, "B K H"], key: Float[Array, "B K S H"], tokens: Int[Array, "B"], count: int
) -> Int[Array, "B K count"]:
    """The channels with the largest |query| |key|, norms over tokens, in text order of channels.

    Args:
        latest: sums of squares of the prompt's last queries.
        key: the keys that are kept, of which the first `tokens` count.
        tokens: of each sequence.
        count: static.
    """
    present = below(tokens, key.shape[2])[:, None, :, None]
    energy = jnp.where(present, jnp.square(key.astype(jnp.float32)), 0).sum(axis=2)
    best = jax.lax.top_k(latest * energy, count)[1]
    return jnp.sort(best, axis=-1).astype(jnp.int32)


def of_keys(key: Float[Array, "B K S H"], channels: Int[Array, "B K C"] | None) -> Float[Array, "B K S C"]:
    """Keys as a tier with these channels holds them; None: all of them."""
    return key if channels is None else jnp.take_along_axis(key, channels[:, :, None], axis=-1)


def of_queries(query: Float[Array, "B T N H"], channels: Int[Array, "B K C"] | None) -> Float[Array, "B T N C"]:
    """Queries as they meet such keys."""
    if channels is None:
        return query
    each = jnp.repeat(channels, query.shape[2] // channels.shape[1], axis=1)
    return jnp.take_along_axis(query, each[:, None], axis=-1)


def of_heads(x: Float[Array, "B K H"], channels: Int[Array, "B K C"] | None) -> Float[Array, "B K C"]:
    """One number of each channel, for the channels held."""
    return x if channels is None else jnp.take_along_axis(x, channels, axis=-1)


def of_moment(moment: Float[Array, "B K H H"], channels: Int[Array, "B K C"] | None) -> Float[Array, "B K C C"]:
    """The moment of such queries."""
    if channels is None:
        return moment
    rows = jnp.take_along_axis(moment, channels[..., None], axis=-2)
    return jnp.take_along_axis(rows, channels[:, :, None], axis=-1)
