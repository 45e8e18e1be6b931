"""Ranking: from attention scores to the tokens a tier keeps."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from minikv_jax.config import Rank


def refine(
    scores: Float[Array, "B K T"],
    value: Float[Array, "B K T H"],
    lengths: Int[Array, "B"],
    recent: Int[Array, "B"],
    rank: Rank,
) -> Float[Array, "B K T"]:
    """Attention received, after the rank's corrections. A rank by position scores a token with its position."""
    position = jnp.arange(scores.shape[-1])
    if rank.by == "position":
        return jnp.broadcast_to(position.astype(jnp.float32), scores.shape)
    if rank.normalize:
        rows = lengths[:, None] - position
        rows = jnp.minimum(rows, rank.window) if rank.by == "window" else rows
        scores = scores / jnp.maximum(rows, 1)[:, None]
    if rank.value_norm:
        scores = scores * jnp.linalg.norm(value.astype(jnp.float32), axis=-1)
    if rank.pooling > 1:
        # The recent tokens are chosen anyway; the methods pool what comes before them.
        before = position < (lengths - recent)[:, None]
        scores = _pool(jnp.where(before[:, None], scores, 0), rank)
    return scores


def _pool(scores: Float[Array, "B K T"], rank: Rank) -> Float[Array, "B K T"]:
    """Average (zeros outside count) or maximum over a centred window of tokens."""
    window = (1, 1, rank.pooling)
    if rank.pool == "max":
        return jax.lax.reduce_window(scores, -jnp.inf, jax.lax.max, window, (1, 1, 1), "SAME")
    return jax.lax.reduce_window(scores, 0.0, jax.lax.add, window, (1, 1, 1), "SAME") / rank.pooling


def to_unit(x: Float[Array, "B K T"], valid: Bool[Array, "B K T"]) -> Float[Array, "B K T"]:
    """Moved and scaled so that the valid numbers of each sequence, over heads and tokens, span 0 to 1."""
    low = jnp.min(jnp.where(valid, x, jnp.inf), axis=(1, 2), keepdims=True)
    spread = jnp.max(jnp.where(valid, x, -jnp.inf), axis=(1, 2), keepdims=True) - low
    return jnp.where(spread > 0, (x - low) / jnp.where(spread > 0, spread, 1), 0)


def mix(
    scores: Float[Array, "B K T"],
    friendliness: Float[Array, "B K T"],
    candidates: Bool[Array, "B K T"],
    valid: Bool[Array, "B K T"],
    protected: Int[Array, "B"],
    weight: float,
) -> Float[Array, "B K T"]:
    """Q-Hitter's order: the `protected` candidates of most attention first, then the mix with friendliness."""
    best_first = jnp.argsort(jnp.where(candidates, scores, -jnp.inf), axis=-1, descending=True, stable=True)
    place = jnp.argsort(best_first, axis=-1)
    mixed = weight * to_unit(scores, valid) + (1 - weight) * friendliness
    return jnp.where(place < protected[:, None, None], 2.0, mixed)


def order(
    scores: Float[Array, "B K T"],
    lengths: Int[Array, "B"],
    recent: Int[Array, "B"],
    sinks: int,
    most: int,
) -> Int[Array, "B K most"]:
    """The best `most` positions, best first: sinks and recent tokens, then by score (equal scores: the earlier token).

    Positions past a prompt's end come last.
    """
    position = jnp.arange(scores.shape[-1])
    always = (position < sinks) | (position >= (lengths - recent)[:, None])
    priority = jnp.where(always[:, None], jnp.inf, scores)
    priority = jnp.where((position < lengths[:, None])[:, None], priority, -jnp.inf)
    return jax.lax.top_k(priority, most)[1]


def in_text_order(
    best_first: Int[Array, "B K most"], first: Int[Array, "B"], last: Int[Array, "B"], capacity: int, tokens: int
) -> Int[Array, "B K capacity"]:
    """Places `first` <= i < `last` of an order, sorted by position. Entries past them hold `tokens`, which is none."""
    place = jnp.arange(best_first.shape[-1])
    chosen = (place >= first[:, None, None]) & (place < last[:, None, None])
    rows = jnp.sort(jnp.where(chosen, best_first, tokens), axis=-1)[..., :capacity]
    return jnp.pad(rows, ((0, 0), (0, 0), (0, capacity - rows.shape[-1])), constant_values=tokens)
