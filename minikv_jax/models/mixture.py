"""Mixtures of experts: each token goes through the few gated MLPs that a router finds for it, and none is dropped."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from minikv_jax.models.config import Experts


class Mixture(nnx.Module):
    """Experts of one layer, side by side in one array for each matrix: [E, D, 2 F] and [E, F, D]."""

    def __init__(self, experts: Experts, hidden_size: int, *, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.settings = experts
        e, d, f = experts.count, hidden_size, experts.size

        def matrices(*shape: int) -> nnx.Param:
            return nnx.Param(jax.random.normal(rngs.params(), shape, param_dtype) * shape[-2] ** -0.5)

        self.router = matrices(d, e)
        self.gate_up, self.down = matrices(e, d, 2 * f), matrices(e, f, d)

    def __call__(self, h: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What the chosen experts make of every token, weighed by the router's probabilities."""
        x = h.reshape(-1, h.shape[-1])
        probabilities = jax.nn.softmax((x @ self.router[...]).astype(jnp.float32), axis=-1)
        weights, chosen = jax.lax.top_k(probabilities, self.settings.chosen)
        if self.settings.renormalised:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        # Of few tokens each reads its experts. Of many those with one expert go through it together.
        few = chosen.size <= self.settings.count
        each = self._gathered(x, chosen) if few else self._grouped(x, chosen)
        return jnp.einsum("mk,mkd->md", weights.astype(x.dtype), each).reshape(h.shape)

    def _gathered(self, x: Float[Array, "M D"], chosen: Int[Array, "M k"]) -> Float[Array, "M k D"]:
        rows = jnp.repeat(x, chosen.shape[1], axis=0)
        gate_up, down = (w[...].at[chosen.reshape(-1)].get(mode="promise_in_bounds") for w in (self.gate_up, self.down))
        y = jnp.einsum("rf,rfd->rd", _gate(jnp.einsum("rd,rdf->rf", rows, gate_up)), down)
        return y.reshape(*chosen.shape, -1)

    def _grouped(self, x: Float[Array, "M D"], chosen: Int[Array, "M k"]) -> Float[Array, "M k D"]:
        """Rows of one expert follow each other, from a new block on, and blocks are multiplied one after another.

        `jax.lax.ragged_dot` would multiply every row by every expert where XLA has no kernel for it, as on CPUs.
        """
        count, (m, k) = self.settings.count, chosen.shape
        block = _block(m * k // count)
        blocks = -(-m * k // block) + count  # as many as there can be: every expert may leave one unfilled
        experts = chosen.reshape(-1)
        sizes = jnp.bincount(experts, length=count)
        ends = jnp.cumsum(-(-sizes // block))  # of each expert's blocks
        order = jnp.argsort(experts)
        rank = jnp.arange(m * k) - (jnp.cumsum(sizes) - sizes)[experts[order]]
        first = (ends - -(-sizes // block)) * block
        at = jnp.zeros_like(order).at[order].set(first[experts[order]] + rank, unique_indices=True)
        rows = jnp.zeros((blocks * block, x.shape[1]), x.dtype)
        rows = rows.at[at].set(jnp.repeat(x, k, axis=0), unique_indices=True).reshape(blocks, block, -1)
        owner = jnp.minimum(jnp.searchsorted(ends, jnp.arange(blocks), side="right"), count - 1)

        def product(given: tuple[Float[Array, "b D"], Int[Array, ""]]) -> Float[Array, "b D"]:
            some, expert = given
            gate_up, down = (w[...].at[expert].get(mode="promise_in_bounds") for w in (self.gate_up, self.down))
            return _gate(some @ gate_up) @ down

        return jax.lax.map(product, (rows, owner)).reshape(blocks * block, -1)[at].reshape(m, k, -1)


def _block(rows: int) -> int:
    """Rows of a block, where an expert has so many on average: powers of two, from 8 to 128."""
    return min(128, max(8, 1 << max(rows, 1).bit_length() - 1))


def _gate(y: Float[Array, "*rows F2"]) -> Float[Array, "*rows F"]:
    gate, up = jnp.split(y, 2, axis=-1)
    return jax.nn.silu(gate) * up
