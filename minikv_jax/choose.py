"""Which of a prompt's tokens the first tier takes, by the method's rank."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from minikv_jax import allocate, codec, rank
from minikv_jax.allocate import Budget
from minikv_jax.cache import Prompt
from minikv_jax.config import Method
from pallas_kernels.rows import below


class Choice(NamedTuple):
    """The first tier's tokens, in text order.

    Attributes:
        kept: how many they are.
        chosen: which of the prompt's tokens; None: all of them, in a tier of their own.
        rows: their places in the prompt; None with `chosen`.
        key, value: theirs.
        friendliness: how well every token survives the codec, where the rank asks for it.
    """

    kept: Int[Array, "B"]
    chosen: Bool[Array, "B K T"] | None
    rows: Int[Array, "B K R"] | None
    key: Float[Array, "B K R H"]
    value: Float[Array, "B K R V"]
    friendliness: Float[Array, "B K T"] | None


def choose(prompt: Prompt, method: Method) -> Choice:
    """The tokens of the first tier of a prompt."""
    key, value, lengths, budget = prompt.key, prompt.value, prompt.lengths, prompt.budget
    tokens = key.shape[2]
    present = below(lengths, tokens)[:, None]
    friendliness = survival(key, value, present, method) if method.rank.attention_weight < 1 else None
    kept = jnp.minimum(budget.total, lengths)
    if method.rest is None and not method.selects and method.inflow.grows:
        return Choice(kept, None, None, key, value, friendliness)
    chosen = _best(prompt, friendliness, present, kept, method)
    rows = rank.in_text_order(chosen, min(prompt.shape.first, tokens))
    return Choice(kept, chosen, rows, gather(key, rows), gather(value, rows), friendliness)


def gather(x: Float[Array, "B K T H"], rows: Int[Array, "B #K R"]) -> Float[Array, "B K R H"]:
    """Rows of x; zeros for rows that are none."""
    return jnp.take_along_axis(x, rows[..., None], axis=2, mode="fill", fill_value=0)


def _best(prompt: Prompt, friendliness, present, kept, method: Method) -> Bool[Array, "B K T"]:
    scores, lengths, budget = prompt.scores, prompt.lengths, prompt.budget
    if friendliness is not None:
        candidates = present & below(lengths - budget.recent, scores.shape[-1])[:, None]
        by_attention = protected(lengths, budget, scores.shape[-1], method)
        valid, weight = jnp.broadcast_to(present, scores.shape), method.rank.attention_weight
        scores = rank.mix(scores, friendliness, candidates, valid, by_attention, weight)
    return rank.best(scores, lengths, budget.recent, method.allocation.sinks, kept)


def protected(lengths: Int[Array, "B"], budget: Budget, longest: int, method: Method) -> Int[Array, "B"]:
    """Tokens of prompts, none above `longest`, that attention alone chooses (Q-Hitter)."""
    table = allocate.count(np.arange(longest + 1), method.rank.protected)
    return jnp.minimum(jnp.asarray(table)[lengths], budget.total - budget.recent)


def survival(key, value, valid, method: Method) -> Float[Array, "B K T"]:
    """How well tokens survive the codec: (2 - e_K - e_V) / 2 with errors scaled to 0..1 (Q-Hitter)."""
    coded = codec.through(method.codec, key, value)
    valid = jnp.broadcast_to(valid, key.shape[:3])
    errors = (jnp.linalg.norm(a - b.astype(jnp.float32), axis=-1) for a, b in zip(coded, (key, value)))
    of_key, of_value = (rank.to_unit(error, valid) for error in errors)
    return (2 - (of_key + of_value)) / 2
