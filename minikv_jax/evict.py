"""Inflows that make room: each step gives up the first tier's lowest token (H2O, arXiv 2306.14048; StreamingLLM)."""

import dataclasses
from typing import Literal, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from minikv_jax import choose, rank, segments
from minikv_jax.append import one_by_one, second_tier
from minikv_jax.cache import LayerCache, Prompt
from minikv_jax.checks import check_types, require
from minikv_jax.choose import Choice
from minikv_jax.inflow import Inflow
from pallas_kernels.rows import below, row_numbers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ledger:
    """What eviction needs to know of each row of the first tier. `size` is what the tier may hold after a step."""

    positions: Int[Array, "B K S"]
    scores: Float[Array, "B K S"]
    friendliness: Float[Array, "B K S"] | None
    size: Int[Array, "B"]
    recent: Int[Array, "B"]
    protected: Int[Array, "B"]


@dataclasses.dataclass(frozen=True)
class Evict(Inflow):
    """A new token joins the first tier, and another one leaves it: to the second tier, or away.

    Attributes:
        when: "after" adds each step's attention to the scores and then gives up the token of the lowest (H2O, MiKV);
            "before" makes room before the step, for ranks by position (StreamingLLM).
    """

    when: Literal["before", "after"] = "after"

    grows = False
    stays = "each step gives a token up"

    @property
    def scored(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]  # here `when` decides
        return self.when == "after"

    def __post_init__(self):
        check_types(self)

    def check(self, method):
        one_by_one(method)
        require(
            method.rest is None or not any(codec.key_drop for codec in method.codecs),
            "A token that moves to a second tier must be whole: leave key_drop at 0, or rest at None.",
        )
        require(
            self.scored or method.rank.by == "position", "Eviction before a step goes with a rank by position only."
        )

    def rows(self, method, kept, left, total, config):
        # A tier counted in tokens grows up to its size; one more row holds the token a step gives up.
        longest = config.prompt_capacity + config.generated_capacity
        rest = 0 if method.rest is None else left + config.generated_capacity
        return min(max(kept, total), longest) + 1, rest

    def begin(self, prompt, method):
        choice = choose.choose(prompt, method)
        first = prompt.tier(method.codec, choice.key, choice.value, choice.kept, prompt.shape.first)
        ledger = _begun(choice, prompt, method, first.capacity)
        return LayerCache(first, method, second_tier(prompt, choice, method), ledger)

    def has_row(self, layer, position):
        first, rest = layer.first, layer.rest
        left = first.length < first.capacity
        if rest is None:
            return left
        return left & ((first.length < layer.flow.size) | (rest.length < rest.capacity))

    def arrive(self, layer, key, value, position, accept, score=0.0):
        if self.when == "before":
            layer = _give_up(layer, position, accept & (layer.first.length >= layer.flow.size))
        ledger = _enter(layer, key, value, position, accept, score)
        return dataclasses.replace(layer, first=segments.append(layer.first, key, value, accept), flow=ledger)

    def add_scores(self, layer, received):
        return dataclasses.replace(layer, flow=dataclasses.replace(layer.flow, scores=layer.flow.scores + received))

    def settle(self, layer, position, accept):
        if self.when == "before":
            return layer
        return _give_up(layer, position, accept & (layer.first.length > layer.flow.size))


def _begun(choice: Choice, prompt: Prompt, method, capacity: int) -> Ledger:
    """The ledger of the chosen tokens."""
    rows = cast(Array, choice.rows)  # None only for an inflow that grows
    more = ((0, 0), (0, 0), (0, capacity - rows.shape[2]))

    def of_rows(x: Float[Array, "B K T"]) -> Float[Array, "B K S"]:
        return jnp.pad(jnp.take_along_axis(x, rows, axis=2, mode="fill", fill_value=0), more)

    budget, longest = prompt.budget, prompt.key.shape[2]
    return Ledger(
        jnp.pad(rows, more).astype(jnp.int32),
        of_rows(prompt.scores),
        None if choice.friendliness is None else of_rows(choice.friendliness),
        jnp.array(budget.total),
        jnp.array(budget.recent),
        choose.protected(prompt.lengths, budget, longest, method),
    )


def _enter(layer: LayerCache, key, value, position, accept, score) -> Ledger:
    """The ledger with a row for the new token."""
    ledger, first, method = layer.flow, layer.first, layer.method
    new = (row_numbers(first.capacity, axes=2) == first.length[:, None]) & accept[:, None]
    new = new[:, None]
    score = position.astype(jnp.float32)[:, None] if method.rank.by == "position" else jnp.asarray(score)
    score = jnp.broadcast_to(score, key.shape[:2])
    friendliness = ledger.friendliness
    if friendliness is not None:
        fresh = choose.survival(key, value, jnp.ones((1, 1, 1), bool), method)
        friendliness = jnp.where(new, fresh, friendliness)
    return dataclasses.replace(
        ledger,
        positions=jnp.where(new, position[:, None, None], ledger.positions),
        scores=jnp.where(new, score[..., None], ledger.scores),
        friendliness=friendliness,
    )


def _give_up(layer: LayerCache, position: Int[Array, "B"], must: Bool[Array, "B"]) -> LayerCache:
    """Takes the lowest token of each head out of the first tier: into the second one, or away.

    The last row moves into its place, so that rows stay without gaps. Of equal scores the later token goes.
    """
    first, ledger, rest = layer.first, layer.flow, layer.rest
    victim = _victim(layer, position)
    if rest is not None:
        rest = segments.append(rest, *first.take(victim), must)
    last = jnp.broadcast_to(first.length[:, None] - 1, victim.shape)
    last = jnp.maximum(last, 0)
    first = first.move(last, victim, must)
    into = (row_numbers(first.capacity, axes=3) == victim[..., None]) & must[:, None, None]

    def moved(x):
        return jnp.where(into, jnp.take_along_axis(x, last[..., None], axis=2), x)

    ledger = dataclasses.replace(
        ledger,
        positions=moved(ledger.positions),
        scores=moved(ledger.scores),
        friendliness=None if ledger.friendliness is None else moved(ledger.friendliness),
    )
    first = dataclasses.replace(first, length=first.length - must.astype(jnp.int32))
    return dataclasses.replace(layer, first=first, rest=rest, flow=ledger)


def _victim(layer: LayerCache, position: Int[Array, "B"]) -> Int[Array, "B K"]:
    ledger, method = layer.flow, layer.method
    held = below(layer.first.length, layer.first.capacity)[:, None]
    old = jnp.ones_like(held)
    if method.inflow.scored:  # the oldest of the newest `recent` tokens stands at position + 1 - recent
        old = ledger.positions <= (position - ledger.recent)[:, None, None]
    candidates = held & old & (ledger.positions >= method.allocation.sinks)
    priority = ledger.scores
    if ledger.friendliness is not None:
        valid = jnp.broadcast_to(held, priority.shape)
        weight = method.rank.attention_weight
        priority = rank.mix(priority, ledger.friendliness, candidates, valid, ledger.protected, weight)
    lowest = jnp.min(jnp.where(candidates, priority, jnp.inf), axis=-1, keepdims=True)
    return jnp.argmax(jnp.where(candidates & (priority == lowest), ledger.positions, -1), axis=-1).astype(jnp.int32)
