"""Ranking: from attention scores to the tokens a tier keeps."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def select(
    scores: Float[Array, "B K T"],
    lengths: Int[Array, "B"],
    heavy: Int[Array, "B"],
    recent: Int[Array, "B"],
    capacity: int,
) -> Int[Array, "B K capacity"]:
    """Positions of each head's kept tokens, in the order of the text: the `recent` newest and the `heavy` best others.

    Heavy hitters are sought only outside the recent tokens (MiniKV Algorithm 1; equal scores: the earlier token).
    Entries past heavy + recent hold T, which is no token.
    """
    t = scores.shape[-1]
    position = jnp.arange(t)
    is_recent = position >= (lengths - recent)[:, None]
    priority = jnp.where(is_recent[:, None], jnp.inf, scores)
    priority = jnp.where((position < lengths[:, None])[:, None], priority, -jnp.inf)
    _, best_first = jax.lax.top_k(priority, min(capacity, t))
    kept = jnp.arange(best_first.shape[-1]) < (heavy + recent)[:, None, None]
    in_text_order = jnp.sort(jnp.where(kept, best_first, t), axis=-1)
    return jnp.pad(in_text_order, ((0, 0), (0, 0), (0, capacity - in_text_order.shape[-1])), constant_values=t)
