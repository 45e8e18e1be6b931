"""Budgets: how many prompt tokens each layer's tier takes."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from minikv_jax.config import Allocation


def heavy_share(allocation: Allocation, layer: int, layers: int) -> float:
    """Share of the prompt that `layer` of `layers` keeps by rank.

    With a pyramid of depth d the share falls linearly from 2 r - r / d to r / d and its mean is r = `heavy`
    (MiniKV section 3.2).
    """
    share = allocation.heavy
    if allocation.pyramid_depth is None:
        return share
    last = share / allocation.pyramid_depth
    first = 2 * share - last
    if layers == 1:
        return share
    return first + (last - first) * layer / (layers - 1)


def kept_tokens(allocation: Allocation, layer: int, layers: int, prompt: np.ndarray | int) -> tuple[np.ndarray, ...]:
    """(heavy, recent) tokens of prompts of the given lengths: int(N * share) each (MiniKV's released code).

    Shares that add up to 1 keep everything, whatever their rounding. A prompt that has tokens keeps at least its last
    one, so no cache is ever empty.
    """
    prompt = np.asarray(prompt)
    share = heavy_share(allocation, layer, layers)
    heavy = (prompt * share).astype(np.int32)
    recent = (prompt * allocation.recent).astype(np.int32)
    recent = np.where(heavy + recent == 0, np.minimum(prompt, 1), recent)
    everything = (heavy + recent >= prompt) | (share + allocation.recent >= 1)
    return np.where(everything, prompt - recent, heavy).astype(np.int32), np.minimum(recent, prompt).astype(np.int32)


def capacity(allocation: Allocation, layer: int, layers: int, prompt_capacity: int) -> int:
    """Most prompt tokens that `layer` keeps of any prompt up to `prompt_capacity`."""
    heavy, recent = kept_tokens(allocation, layer, layers, prompt_capacity)
    return max(int(heavy + recent), 1)


def budgets(
    allocation: Allocation, layer: int, layers: int, lengths: Int[Array, "B"], longest: int
) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """(heavy, recent) tokens for traced prompt lengths, none above `longest`.

    int(N * share) in the arithmetic of Python is looked up rather than computed: float32 would round some products
    across a whole number.
    """
    heavy, recent = kept_tokens(allocation, layer, layers, np.arange(longest + 1))
    return jnp.asarray(heavy)[lengths], jnp.asarray(recent)[lengths]
