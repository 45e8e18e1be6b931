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
        y = jnp.einsum("md,mkdf->mkf", x, self.gate_up[...].at[chosen].get(mode="promise_in_bounds"))
        return jnp.einsum("mkf,mkfd->mkd", _gate(y), self.down[...].at[chosen].get(mode="promise_in_bounds"))

    def _grouped(self, x: Float[Array, "M D"], chosen: Int[Array, "M k"]) -> Float[Array, "M k D"]:
        k = chosen.shape[1]
        order = jnp.argsort(chosen.reshape(-1))  # rows of one expert follow each other
        sizes = jnp.bincount(chosen.reshape(-1), length=self.settings.count).astype(jnp.int32)
        y = jax.lax.ragged_dot(x[order // k], self.gate_up[...], sizes)
        y = jax.lax.ragged_dot(_gate(y), self.down[...], sizes)
        return jnp.zeros_like(y).at[order].set(y, unique_indices=True).reshape(*chosen.shape, -1)


def _gate(y: Float[Array, "*rows F2"]) -> Float[Array, "*rows F"]:
    gate, up = jnp.split(y, 2, axis=-1)
    return jax.nn.silu(gate) * up
