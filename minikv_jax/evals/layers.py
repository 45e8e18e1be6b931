"""Inside the model: errors of attention by layer, and whether attention has the shape that methods count on.

Three tasks. "layers": each layer's attention output from a compressed cache, fed the full model's inputs, against the
full cache's. "spread": over how many tokens a layer's attention spreads, which should fall with depth if a pyramid of
budgets (MiniKV section 3.2) is right. "persistence": how many of the prompt's heavy hitters are still heavy for the
text that follows (MiniKV found 60 to 80 %), as methods that choose once must hope.
"""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from minikv_jax import presets
from minikv_jax.config import CacheConfig
from minikv_jax.evals import kl, known
from minikv_jax.evals.engine import Weight, attention_errors, received
from minikv_jax.evals.running import cases as running_cases
from minikv_jax.evals.running import greedy
from minikv_jax.evals.task import Case, Lab, Measured, Metric, Task, padded

_HEAVY = 0.25


def measure_errors(lab: Lab, cases: Sequence[Case], methods: Mapping[str, CacheConfig]) -> dict[str, list[Measured]]:
    follows = [case.follows[0].tokens for case in cases]
    tokens = jnp.asarray(padded(follows)[0])
    caches = known.read_cases(lab, cases, methods, tokens.shape[1]).caches
    found = attention_errors(lab.model, caches[known.FULL], {name: caches[name] for name in methods}, tokens)
    return {
        name: [
            Measured({"attention_error": row.astype(float).tolist()}, known.weight_of_case(lab, case, methods[name]))
            for case, row in zip(cases, errors)
        ]
        for name, errors in found.items()
    }


ERRORS = Task(
    "relative error of attention's output, layer by layer",
    {"attention_error": Metric("relative error of attention's output by layer", "profile")},
    kl.cases,
    measure_errors,
)


def measure_spread(lab: Lab, cases: Sequence[Case], methods: Mapping[str, CacheConfig]) -> dict[str, list[Measured]]:
    """Tokens are told apart by the attention they receive, mean over heads."""
    tokens, lengths = (jnp.asarray(x) for x in padded([case.prompt for case in cases]))
    weight = _of_full(lab, cases)
    scores = received(lab.model, tokens, lengths, "all")
    share = scores / np.maximum(scores.sum(axis=-1, keepdims=True), 1e-30)
    tokens_in_use = (
        np.exp(-np.sum(share * np.log(np.maximum(share, 1e-30)), axis=-1)) / np.array(lengths)[:, None, None]
    )
    heaviest = -np.sort(-share, axis=-1)
    top = np.stack([x[..., : max(int(n * _HEAVY), 1)].sum(axis=-1) for x, n in zip(heaviest, np.array(lengths))])
    return {
        known.FULL: [
            Measured({"spread": a.mean(axis=-1).tolist(), "outside": (1 - b).mean(axis=-1).tolist()}, weight)
            for a, b in zip(tokens_in_use, top)
        ]
    }


SPREAD = Task(
    "over how many tokens each layer's attention spreads",
    {
        "spread": Metric("effective share of tokens that receive attention, by layer (exp of the entropy)", "profile"),
        "outside": Metric("attention outside the heaviest quarter of the tokens, by layer", "profile"),
    },
    running_cases,
    measure_spread,
    compares=False,
    room=lambda lab, case: 1,
)


def measure_persistence(
    lab: Lab, cases: Sequence[Case], methods: Mapping[str, CacheConfig]
) -> dict[str, list[Measured]]:
    """The heaviest quarter of the prompt by its own queries, and by those of the text that the model then writes."""
    most = lab.settings.new_tokens
    written = greedy(lab, cases, most)
    before = received(lab.model, *(jnp.asarray(x) for x in padded([case.prompt for case in cases])), rows="all")
    whole = [(*case.prompt, *row) for case, row in zip(cases, written.tolist())]
    after = received(lab.model, *(jnp.asarray(x) for x in padded(whole)), rows=most)
    kept = []
    for i, case in enumerate(cases):
        length = len(case.prompt)
        heavy = max(int(length * _HEAVY), 1)
        first_heavy, then_heavy = (_heaviest(x[i, :, :, :length], heavy) for x in (before, after))
        kept.append((first_heavy & then_heavy).sum(axis=-1).mean(axis=-1) / heavy)
    weight = _of_full(lab, cases)
    return {known.FULL: [Measured({"persistence": row.tolist()}, weight) for row in kept]}


def _heaviest(scores: np.ndarray, count: int) -> np.ndarray:
    """Marks the `count` largest along the last axis."""
    best = np.argsort(-scores, axis=-1, kind="stable")[..., :count]
    marked = np.zeros(scores.shape, bool)
    np.put_along_axis(marked, best, True, axis=-1)
    return marked


def _of_full(lab: Lab, cases: Sequence[Case]) -> Weight:
    """What a full cache of the first prompt weighs."""
    return known.weight_of_case(lab, cases[0], presets.full(), 1)


PERSISTENCE = Task(
    "how many heavy hitters of the prompt stay heavy while the model writes",
    {
        "persistence": Metric(
            "heaviest quarter of the prompt still heavy for the text that follows, by layer", "profile"
        )
    },
    running_cases,
    measure_persistence,
    compares=False,
)
