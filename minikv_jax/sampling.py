"""How the next token is drawn from logits."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minikv_jax.checks import check_types
from minikv_jax.errors import ConfigError


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_p: draw only among the most likely tokens that together have this probability.
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self):
        check_types(self)
        if not 0 <= self.temperature < float("inf") or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"temperature={self.temperature} must be finite and at least 0, top_p={self.top_p} above 0 and at most "
                "1."
            )


GREEDY = Sampling()


def sample(logits: Float[Array, "B V"], key: Array, sampling: Sampling) -> Int[Array, "B"]:
    """Token ids drawn from next-token logits, int32; -1, which is no token, where any of a row's logits is NaN."""
    if sampling.temperature == 0:
        best = jnp.argmax(logits, axis=-1, keepdims=True)  # of NaN and numbers it is NaN
        chosen = jnp.take_along_axis(logits, best, axis=-1, mode="promise_in_bounds")
        return jnp.where(jnp.isnan(chosen), -1, best)[:, 0].astype(jnp.int32)
    broken = jnp.isnan(logits).any(axis=-1)
    logits = logits / sampling.temperature
    if sampling.top_p < 1:
        best_first = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(best_first, axis=-1), axis=-1) - jax.nn.softmax(best_first, axis=-1)
        least = jnp.min(jnp.where(before < sampling.top_p, best_first, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return jnp.where(broken, -1, jax.random.categorical(key, logits, axis=-1)).astype(jnp.int32)
