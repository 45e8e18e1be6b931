"""Ranking: from attention scores to the tokens a tier keeps."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from minikv_jax.config import Rank
from pallas_kernels.rows import row_numbers


def refine(
    scores: Float[Array, "B K T"],
    value: Float[Array, "B K T H"],
    lengths: Int[Array, "B"],
    recent: Int[Array, "B"],
    rank: Rank,
) -> Float[Array, "B K T"]:
    """Attention received, after the rank's corrections. A rank by position scores a token with its position."""
    position = row_numbers(scores.shape[-1], axes=2)
    if rank.by == "position":
        return jnp.broadcast_to(position[None].astype(jnp.float32), scores.shape)
    if rank.normalize:
        rows = lengths[:, None] - position
        rows = jnp.minimum(rows, rank.queries) if rank.by == "last_queries" else rows
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
    candidates: Bool[Array, "B #K T"],
    valid: Bool[Array, "B K T"],
    protected: Int[Array, "B"],
    weight: float,
) -> Float[Array, "B K T"]:
    """Q-Hitter's order: the `protected` candidates of most attention first, then the mix with friendliness."""
    best_first = jnp.argsort(jnp.where(candidates, scores, -jnp.inf), axis=-1, descending=True, stable=True)
    place = jnp.argsort(best_first, axis=-1)
    mixed = weight * to_unit(scores, valid) + (1 - weight) * friendliness
    return jnp.where(place < protected[:, None, None], 2.0, mixed)


def best(
    scores: Float[Array, "B K T"],
    lengths: Int[Array, "B"],
    recent: Int[Array, "B"],
    sinks: int,
    count: Int[Array, "B"],
) -> Bool[Array, "B K T"]:
    """The `count` <= lengths tokens to keep: sinks and recent ones, then by score (equal scores: the earlier token)."""
    position = row_numbers(scores.shape[-1], axes=2)
    always = (position < sinks) | (position >= (lengths - recent)[:, None])
    priority = jnp.where(always[:, None], jnp.inf, scores)
    priority = jnp.where((position < lengths[:, None])[:, None], priority, -jnp.inf)
    keys = _sortable(priority)
    count = count[:, None, None]
    last = _largest(keys, count)[..., None]
    above, equal = keys > last, keys == last
    missing = count - above.sum(axis=-1, keepdims=True)
    return above | (equal & (jnp.cumsum(equal, axis=-1) <= missing))


def _sortable(x: Float[Array, "B K T"]) -> UInt32[Array, "B K T"]:
    """Integers in the order of float32 numbers; NaN beyond infinity."""
    x = jnp.where(x == 0, 0.0, x.astype(jnp.float32))  # one zero
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))


def _largest(keys: UInt32[Array, "B K T"], count: Int[Array, "B 1 1"]) -> UInt32[Array, "B K"]:
    """The key that `count` keys reach or exceed. Found digit by digit: eight times counting where a sort moves all."""
    digits = jnp.arange(1, 16, dtype=jnp.uint32)[None, None]
    found = jnp.zeros(keys.shape[:-1], jnp.uint32)
    for shift in range(28, -4, -4):
        steps = found[..., None] | (digits << jnp.uint32(shift))
        reached = (keys[:, :, None] >= steps[..., None]).sum(axis=-1) >= count
        found |= reached.sum(axis=-1).astype(jnp.uint32) << jnp.uint32(shift)
    return found


def in_text_order(chosen: Bool[Array, "B K T"], capacity: int) -> Int[Array, "B K capacity"]:
    """Positions of the chosen tokens, in order. Entries past them hold T, which is none."""
    tokens = chosen.shape[-1]
    place = jnp.where(chosen, jnp.cumsum(chosen, axis=-1) - 1, capacity)
    write = jax.vmap(jax.vmap(lambda rows, place: rows.at[place].set(row_numbers(tokens), mode="drop")))
    return write(jnp.full((*chosen.shape[:-1], capacity), tokens, jnp.int32), place)


def received(
    logits: Float[Array, "B T N S"],
    lse: Float[Array, "B T N"],
    seen: Bool[Array, "B T S"],
    heads: int,
) -> Float[Array, "B K S"]:
    """Attention each token received from the queries that saw it, summed over them and over each group.

    `lse` is the log-sum-exp of the queries' whole attention, of these tokens and all others.
    """
    p = jnp.where(seen[:, :, None], jnp.exp(logits - lse[..., None]), 0)
    b, t, n, s = p.shape
    return p.reshape(b, t, heads, n // heads, s).sum(axis=(1, 3))
