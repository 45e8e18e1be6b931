"""Measuring with known continuations: what most tasks do.

An answer that greedy decoding would write exactly is one whose every token is the most likely one after those before
it; so reading the right answer once gives exact match, the answer's likelihood and the distance from the full cache
together, and no decoding loop is needed.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from minikv_jax.cache import KVCache
from minikv_jax.config import CacheConfig
from minikv_jax.evals.engine import Figures, Weight, figures, in_parallel, read_on, read_prompt, repeated, weight_of
from minikv_jax.evals.task import Case, Follow, Lab, Measured, Values, padded

FULL = "full"

# What a task makes of one case: the figures of each of its follows, over that follow's own tokens.
type Reduce = Callable[[Lab, Case, list[Figures]], Values]


def with_full(methods: Mapping[str, CacheConfig]) -> dict[str, CacheConfig]:
    """The methods and the full cache, which all are compared with."""
    from minikv_jax import presets

    return {FULL: presets.full(), **methods}


def measure(
    lab: Lab, cases: Sequence[Case], methods: Mapping[str, CacheConfig], reduce: Reduce
) -> dict[str, list[Measured]]:
    """Compresses the prompts once, reads each follow on a copy of its own, and reduces its figures."""
    room = max(len(follow.tokens) for case in cases for follow in case.follows)
    caches = read_cases(lab, cases, methods, room)[1]
    return follow_on(lab, cases, methods, caches, reduce)


def read_cases(
    lab: Lab, cases: Sequence[Case], methods: Mapping[str, CacheConfig], room: int
) -> tuple[jax.Array, dict[str, KVCache]]:
    """Logits after the prompts, and each method's cache of them with `room` for more tokens, all in bfloat16."""
    tokens, lengths = padded([case.prompt for case in cases])
    configs = {
        name: config.replace(generated_capacity=room, prompt_capacity=None, dtype="bfloat16")
        for name, config in with_full(methods).items()
    }
    prompt = read_prompt(lab.model, jnp.asarray(tokens), jnp.asarray(lengths), configs)
    return prompt.logits, prompt.caches


def follow_on(
    lab: Lab,
    cases: Sequence[Case],
    methods: Mapping[str, CacheConfig],
    caches: Mapping[str, KVCache],
    reduce: Reduce,
) -> dict[str, list[Measured]]:
    """Reads each case's follows on copies of the caches, which have room for them."""
    each = len(cases[0].follows)
    follows = [follow for case in cases for follow in case.follows]
    tokens, counts = padded([follow.tokens for follow in follows])
    targets = jnp.asarray(np.roll(tokens, -1, axis=1))
    tokens, counts = jnp.asarray(tokens), jnp.asarray(counts)

    def read(name: str):
        return read_on(lab.model, repeated(caches[name], each), tokens, counts)

    reference, full = read(FULL)

    def one(name: str) -> list[Measured]:
        hidden, cache = (reference, full) if name == FULL else read(name)
        found = figures(lab.model, hidden, reference, targets)
        weight = per_sequence(weight_of(lab.model, cache), len(follows))
        own = [_of_row(found, i, follow) for i, follow in enumerate(follows)]
        return [Measured(reduce(lab, case, own[i * each : (i + 1) * each]), weight) for i, case in enumerate(cases)]

    return in_parallel(one, list(methods))


def per_sequence(weight: Weight, sequences: int) -> Weight:
    return dataclasses.replace(weight, bytes=weight.bytes // sequences)


def _of_row(found: Figures, row: int, follow: Follow) -> Figures:
    return Figures(*(getattr(found, field.name)[row, : len(follow.tokens)] for field in dataclasses.fields(Figures)))


# ---- answers -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Answered:
    """How one answer would have come out.

    Attributes:
        exact: greedy decoding writes it, and no digit after it.
        digits: share of its tokens that are most likely after the right ones before them.
        nll: nats a token.
    """

    exact: float
    digits: float
    nll: float


def answers(lab: Lab, follow: Follow, found: Figures) -> list[Answered]:
    """One for each answer in the follow."""
    outcomes = []
    for start, stop in follow.answers:
        right = found.best[start - 1 : stop - 1] == np.array(follow.tokens[start:stop])
        longer = lab.tokenizer.decode([int(found.best[stop - 1])])[:1].isdigit()
        exact = float(right.all() and not longer)
        outcomes.append(Answered(exact, float(right.mean()), float(found.nll[start - 1 : stop - 1].mean())))
    return outcomes


def asked(lab: Lab, question: str, answer: str, depth: float = 0.0) -> Follow:
    """A question (or a sentence begun) and its right answer."""
    before, after = lab.ids(question), lab.ids(answer)
    return Follow((*before, *after), ((len(before), len(before) + len(after)),), depth)
