"""Partial attention: what one piece of a cache answers, and how the pieces become one softmax."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Partial(NamedTuple):
    """Attention over some of the keys, unnormalised, in float32.

    With logits x over these keys: `maximum` = max x, `total` = sum exp(x - maximum),
    `output` = sum exp(x - maximum) * value. A piece without keys has maximum -inf, total 0 and output 0.
    """

    output: Float[Array, "B T N H"]
    maximum: Float[Array, "B T N"]
    total: Float[Array, "B T N"]


def merge_partials(partials: Sequence[Partial]) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Joins partial attentions over disjoint keys into the softmax over all of them.

    Returns:
        The attention output and its natural log-sum-exp, both float32. A query that sees no key anywhere gets
        output 0 and log-sum-exp -inf.
    """
    maximum = jnp.stack([p.maximum for p in partials]).max(axis=0)
    # exp(-inf - -inf) is NaN: a query without keys rescales by exp(-inf - 0) = 0 instead.
    reference = jnp.where(jnp.isneginf(maximum), 0.0, maximum)
    weights = [jnp.exp(p.maximum - reference) for p in partials]
    total = sum(w * p.total for w, p in zip(weights, partials))
    output = sum(w[..., None] * p.output for w, p in zip(weights, partials))
    nothing = jnp.equal(total, 0)
    output = jnp.where(nothing[..., None], 0.0, output / jnp.where(nothing, 1.0, total)[..., None])
    return output, jnp.where(nothing, -jnp.inf, reference + jnp.log(jnp.where(nothing, 1.0, total)))


def with_sinks(
    output: Float[Array, "B T N H"], lse: Float[Array, "B T N"], sinks: Float[Array, "N"]
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attention, and its log-sum-exp, beside one more key a head that has this logit and no value."""
    whole = jnp.logaddexp(lse, sinks.astype(jnp.float32)[None, None])
    nothing = jnp.isneginf(lse)  # seen by the query, and -inf - -inf would be NaN
    share = jnp.where(nothing, 0.0, jnp.exp(jnp.where(nothing, 0.0, lse - whole)))[..., None]
    return (output.astype(jnp.float32) * share).astype(output.dtype), whole


def capped(logits: Float[Array, "..."], soft_cap: float | None) -> Float[Array, "..."]:
    """Logits bounded by c tanh(x / c); None: as they are."""
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)
