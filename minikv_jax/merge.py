"""KVMerger's inflow (arXiv 2407.08454): neighbours with like keys become one token before others leave.

Sets are runs of neighbouring tokens. The paper takes all runs of a cosine above a threshold; a budget that is the same
in every head needs as many sets: the likest neighbours join until there are no more sets than room. What the threshold
keeps apart beyond that competes for the room by the attention that sets received, and the rest leaves.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from minikv_jax import choose, rank
from minikv_jax.append import Append
from minikv_jax.cache import LayerCache, Prompt
from minikv_jax.checks import check_types, require
from minikv_jax.config import Method
from pallas_kernels.rows import below, row_numbers

_TINY = float(jnp.finfo(jnp.float32).tiny)
# Likeness counts in steps of one in so many: between neighbours as like as others their place decides, not rounding.
_STEPS = 4096


@dataclasses.dataclass(frozen=True)
class Merge(Append):
    """`Append` whose prompt is merged to its budget. The rank's `protected` tokens and the recent ones stay alone.

    Attributes:
        threshold: neighbours whose keys have a smaller cosine are never merged.
        sigma: width of the Gaussian over distances from a set's pivot; None: that of each set, the sum of its tokens'
            distances over sqrt(2) |set|. The paper has the Gaussian's own values in the place of distances, which
            depend on sigma and would keep it below 0.71; its average of 5 fits distances.
        values: "sum" multiplies a set's mean value by the set's size, as the paper does; its key takes part in the
            softmax once, so outputs grow by it. "mean" does not multiply.
    """

    threshold: float = 0.75
    sigma: float | None = None
    values: Literal["sum", "mean"] = "sum"

    def __post_init__(self):
        check_types(self)
        require(-1 <= self.threshold <= 1, f"threshold={self.threshold} is a cosine: give a number from -1 to 1.")
        require(self.sigma is None or self.sigma > 0, f"sigma={self.sigma}: give None or a number above 0.")

    def check(self, method):
        super().check(method)
        require(method.rest is None, "What is merged is in no second tier: leave rest at None.")

    def begin(self, prompt, method):
        if not method.selects:
            return super().begin(prompt, method)
        kept, tokens = jnp.minimum(prompt.budget.total, prompt.lengths), prompt.key.shape[2]
        alone, count = _alone(prompt, kept, method)
        sets = _runs(prompt, alone, kept, self.threshold)
        received = _by_set(sets, prompt.scores)
        pivot = _pivots(sets, prompt.scores)
        key, value = _merged(sets, pivot, prompt, self.sigma, self.values == "sum")
        of_best = _highest(jnp.where(pivot, received, -jnp.inf), prompt.lengths, kept - count)
        rows = rank.in_text_order(alone | of_best, min(prompt.shape.first, tokens))
        held = (choose.gather(x, rows) for x in (key, value))
        return LayerCache(prompt.tier(method.codec, *held, kept, prompt.shape.first), method)


def _alone(prompt: Prompt, kept: Int[Array, "B"], method: Method) -> tuple[Bool[Array, "B K T"], Int[Array, "B"]]:
    """Tokens that nothing is merged with, and how many they are."""
    budget, longest = prompt.budget, prompt.key.shape[2]
    sinks = method.allocation.sinks
    heavy = choose.protected(prompt.lengths, budget, longest, method)
    count = jnp.minimum(heavy + budget.recent + sinks, kept)
    return rank.best(prompt.scores, prompt.lengths, budget.recent, sinks, count), count


def _highest(scores: Float[Array, "B K T"], lengths: Int[Array, "B"], count: Int[Array, "B"]) -> Bool[Array, "B K T"]:
    """The `count` tokens of highest score, none of which is kept for its place."""
    return rank.best(scores, lengths, jnp.zeros_like(count), 0, count)


def _runs(prompt: Prompt, alone: Bool[Array, "B K T"], kept: Int[Array, "B"], least: float) -> Int[Array, "B K T"]:
    """The number of the set of each token, counted from 0; T for tokens alone and for padding."""
    tokens = prompt.key.shape[2]
    others = below(prompt.lengths, tokens)[:, None] & ~alone
    key = prompt.key.astype(jnp.float32)
    length = jnp.linalg.norm(key, axis=-1)
    products = (key[:, :, 1:] * key[:, :, :-1]).sum(axis=-1)
    cosine = products / jnp.maximum(length[:, :, 1:] * length[:, :, :-1], _TINY)
    cosine = jnp.round(jnp.pad(cosine, ((0, 0), (0, 0), (1, 0))) * _STEPS) / _STEPS
    pairs = others & jnp.pad(others[:, :, :-1], ((0, 0), (0, 0), (1, 0))) & (cosine >= least)
    wanted = prompt.lengths - kept  # each pair that joins leaves a token less
    joins = pairs & _highest(jnp.where(pairs, cosine, -jnp.inf), prompt.lengths, wanted)
    return jnp.where(others, jnp.cumsum(others & ~joins, axis=-1) - 1, tokens)


def _by_set(sets: Int[Array, "B K T"], x: Float[Array, "B K T *h"]) -> Float[Array, "B K T *h"]:
    """The sum of x over each token's set, at every token of it."""

    def of_head(sets, x):
        sums = jax.ops.segment_sum(x, sets, num_segments=sets.shape[0])
        return sums.at[sets].get(mode="fill", fill_value=0)

    return jax.vmap(jax.vmap(of_head))(sets, x)


def _pivots(sets: Int[Array, "B K T"], scores: Float[Array, "B K T"]) -> Bool[Array, "B K T"]:
    """The most attended token of each set, the first of equals."""

    def of_head(sets, scores):
        tokens = sets.shape[0]
        most = jax.ops.segment_max(scores, sets, num_segments=tokens).at[sets].get(mode="fill", fill_value=jnp.inf)
        places = jnp.where(scores == most, row_numbers(tokens), tokens)
        first = jax.ops.segment_min(places, sets, num_segments=tokens).at[sets].get(mode="fill", fill_value=-1)
        return first == row_numbers(tokens)

    return jax.vmap(jax.vmap(of_head))(sets, scores)


def _merged(
    sets: Int[Array, "B K T"], pivot: Bool[Array, "B K T"], prompt: Prompt, sigma: float | None, sums: bool
) -> tuple[Float[Array, "B K T H"], Float[Array, "B K T H"]]:
    """The prompt's keys and values with those of each whole set at its pivot."""
    key, value = (x.astype(jnp.float32) for x in (prompt.key, prompt.value))
    size = jnp.maximum(_by_set(sets, jnp.ones(sets.shape, jnp.float32)), 1)
    distance = jnp.linalg.norm(key - _by_set(sets, jnp.where(pivot[..., None], key, 0)), axis=-1)
    width = _by_set(sets, distance) / (2**0.5 * size) if sigma is None else jnp.float32(sigma)
    weight = jnp.exp(-jnp.square(distance / jnp.maximum(width, _TINY)) / 2)
    share = (weight / jnp.maximum(_by_set(sets, weight), _TINY))[..., None]
    of_sets = _by_set(sets, share * key), (size[..., None] if sums else 1) * _by_set(sets, share * value)
    key, value = (
        jnp.where(pivot[..., None], new.astype(old.dtype), old) for new, old in zip(of_sets, (prompt.key, prompt.value))
    )
    return key, value
