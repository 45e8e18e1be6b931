"""Measuring with known continuations: what most tasks do.

An answer that greedy decoding would write exactly is one whose every token is the most likely one after those before
it; so reading the right answer once gives exact match, the answer's likelihood and the distance from the full cache
together, and no decoding loop is needed.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from minikv_jax.config import CacheConfig
from minikv_jax.evals.engine import Figures, Prompt, Weight, figures, fitted, read_follows, read_prompt, weight_in
from minikv_jax.evals.task import Case, Follow, Lab, Measured, Values, padded, room_of

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
    room = room_of(lab, *cases)
    prompts = fitted(lab.model, [case.prompt for case in cases], room, lab.prompt_step)
    follows = [padded([case.follows[i].tokens for case in cases]) for i in range(len(cases[0].follows))]
    hidden = read_follows(lab.model, *prompts, _held(methods, room), follows)
    found = {name: [] for name in methods}
    for i, (tokens, _) in enumerate(follows):
        targets = np.pad(np.roll(tokens, -1, axis=1), ((0, 0), (0, hidden[FULL][i].shape[1] - tokens.shape[1])))
        for name, mine in found.items():
            mine.append(figures(lab.model, hidden[name][i], hidden[FULL][i], targets))

    def one(name: str, row: int, case: Case) -> Measured:
        own = [_of_row(each, row, follow) for each, follow in zip(found[name], case.follows)]
        return Measured(reduce(lab, case, own), weight_of_case(lab, case, methods[name]))

    return {name: [one(name, row, case) for row, case in enumerate(cases)] for name in methods}


def _held(methods: Mapping[str, CacheConfig], room: int) -> dict[str, CacheConfig]:
    """The methods and the full cache, with `room` for more tokens, all in bfloat16."""
    changes = {"generated_capacity": room, "prompt_capacity": None, "dtype": "bfloat16"}
    return {name: config.replace(**changes) for name, config in with_full(methods).items()}


def read_cases(lab: Lab, cases: Sequence[Case], methods: Mapping[str, CacheConfig], room: int) -> Prompt:
    """Logits after the prompts, and each method's cache of them with `room` for more tokens, all in bfloat16."""
    tokens, lengths = fitted(lab.model, [case.prompt for case in cases], room, lab.prompt_step)
    return read_prompt(lab.model, tokens, lengths, _held(methods, room))


def weight_of_case(lab: Lab, case: Case, config: CacheConfig, generated: int | None = None) -> Weight:
    """With room for the `generated` tokens that were read; by default the longest of its follows."""
    generated = generated or max(len(follow.tokens) for follow in case.follows)
    return weight_in(lab.model, config.replace(dtype="bfloat16"), len(case.prompt), generated)


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
