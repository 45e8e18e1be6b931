"""Budgets: how many prompt tokens each layer's first tier takes."""

from typing import NamedTuple, cast

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from minikv_jax.config import Allocation, Amount, CacheConfig


class Budget(NamedTuple):
    """Tokens of a first tier, per prompt: all of them, and those among them that are the newest.

    `total` exceeds the prompt where the allocation counts in tokens: an evicting cache grows up to it.
    """

    total: Int[Array, "B"]
    recent: Int[Array, "B"]


def count(tokens: np.ndarray | np.int32, amount: Amount) -> np.ndarray | np.int32:
    """int(tokens * share), or the number itself."""
    if isinstance(amount, float):
        return (tokens * amount).astype(np.int32)
    return np.full_like(tokens, amount, np.int32)


def heavy_share(allocation: Allocation, layer: int, layers: int) -> Amount:
    """What `layer` of `layers` keeps by rank; with a pyramid of depth d it falls from 2 r - r / d to r / d."""
    share = allocation.heavy
    if allocation.pyramid_depth is None or layers == 1:
        return share
    last = share / allocation.pyramid_depth
    first = 2 * share - last
    return first + (last - first) * layer / (layers - 1)


def budget(config: CacheConfig, layer: int, layers: int, prompt: np.ndarray | int) -> Budget:
    """The budget of `layer` for prompts of the given lengths, in the arithmetic of the methods' released code.

    Shares that add up to 1 keep everything, whatever their rounding. Where the other tokens are dropped, a prompt
    keeps at least its last one, so no cache is ever empty.
    """
    method, prompt = config.of_layer(layer), np.asarray(prompt, np.int32)
    allocation = method.allocation
    share = heavy_share(allocation, layer, layers)
    if allocation.budget is None:
        recent = count(prompt, allocation.recent)
        total = count(prompt, share) + recent
        shares = sum(float(x) for x in (share, allocation.recent) if isinstance(x, float))
        total = np.where(shares >= 1, prompt, total)
    else:
        total = count(prompt, allocation.budget)
        recent = np.minimum(count(total, allocation.recent), total)
        if allocation.pyramid_beta is not None:
            total = _pyramidkv(allocation, layer, layers, prompt, total, recent)
    total = total + allocation.sinks
    if method.rest is None:
        recent = np.where(total == 0, 1, recent)
    total = np.maximum(total, recent)
    if all(isinstance(x, float) for x in (allocation.heavy, allocation.recent)) and allocation.budget is None:
        total = np.minimum(total, prompt + allocation.sinks)
    # NumPy's arrays, which do as JAX's where the lengths are known.
    return Budget(cast(Array, total.astype(np.int32)), cast(Array, recent.astype(np.int32)))


def _pyramidkv(allocation, layer, layers, prompt, total, recent):
    """Totals of PyramidKV's released code: an arithmetic sequence over the layers with mean `budget`."""
    mean = total - recent
    low = mean // allocation.pyramid_beta
    high = 2 * mean - low
    clipped = np.minimum(high, prompt - recent)
    low = np.where(clipped < high, 2 * mean - clipped, low)
    step = (clipped - low) // max(layers - 1, 1)
    falling = (prompt >= 2 * mean) & (prompt >= total) & (layers > 1)
    return np.where(falling, clipped - layer * step, mean) + recent


def most_kept(totals: np.ndarray) -> int:
    """Most tokens that a first tier ever holds of a prompt; `totals` are budgets of prompts of 0, 1, ... tokens."""
    return max(int(np.minimum(totals, np.arange(totals.size)).max()), 1)


def most_left(totals: np.ndarray) -> int:
    """Most prompt tokens that are left over for a second tier."""
    return max(int((np.arange(totals.size) - totals).max()), 0)


def budgets(config: CacheConfig, layer: int, layers: int, lengths: Int[Array, "B"], longest: int) -> Budget:
    """The budget for traced prompt lengths, none above `longest`.

    int(N * share) is looked up rather than computed: float32 would round some products across a whole number.
    """
    table = budget(config, layer, layers, np.arange(longest + 1))
    return Budget(*(jnp.asarray(column)[lengths] for column in table))
