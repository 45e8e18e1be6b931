"""Shared context (SCBench's protocol, arXiv 2412.10319): the context is compressed before any question is seen.

Eight questions go on independently from one compressed cache, and four more make a conversation in which the right
answers stand. The task `aware` asks the same with the questions at the prompt's end, compressed with it, which is how
most methods are published, and what a server with one context and many questions cannot do. It reads the context once
for each question, so it takes nine times as long.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from minikv_jax.evals import known
from minikv_jax.evals.engine import Figures
from minikv_jax.evals.records import CODES, counts, question, record, rng_of
from minikv_jax.evals.task import Case, Follow, Lab, Metric, Task, Values

_LINES = (50, 100, 200, 400, 800, 1600)
_QUESTIONS, _TURNS = 8, 4
_ANNOUNCED = "\nThe codes of {keys} will be asked for.\n"


class _Context(NamedTuple):
    """A record, the questions that go on from it one by one, and those of a conversation with the keys they ask for."""

    group: str
    name: str
    prompt: tuple[int, ...]
    single: list[Follow]
    turns: Follow
    keys: str


def _contexts(lab: Lab) -> Iterator[_Context]:
    for lines in counts(lab, CODES, _LINES):
        for i in range(lab.settings.limit):
            drawn = record(rng_of(lab, "shared", lines, i), CODES, lines, _QUESTIONS + _TURNS)
            follows = [question(lab, CODES, *asked) for asked in drawn.questions]
            yield _Context(
                f"{lines} lines",
                f"{lines}/{i}",
                tuple(lab.first_ids(drawn.text)),
                follows[:_QUESTIONS],
                _conversation(lab, follows[_QUESTIONS:]),
                ", ".join(key for key, *_ in drawn.questions[_QUESTIONS:]),
            )


def cases(lab: Lab) -> list[Case]:
    found = []
    for x in _contexts(lab):
        found.append(_case(x, "before", "", x.prompt, x.single))
        found.append(_case(x, "before, turns", "/turns", x.prompt, [x.turns]))
    return _kind_by_kind(found)


def cases_aware(lab: Lab) -> list[Case]:
    found = []
    for x in _contexts(lab):
        for j, follow in enumerate(x.single):
            asked, rest = _compressed_too(follow)
            found.append(_case(x, "aware", f"/aware{j}", (*x.prompt, *asked), [rest]))
        announced = lab.ids(_ANNOUNCED.format(keys=x.keys))
        found.append(_case(x, "aware, turns", "/aware-turns", (*x.prompt, *announced), [x.turns]))
    return _kind_by_kind(found)


def _case(context: _Context, kind: str, suffix: str, prompt: tuple[int, ...], follows: Sequence[Follow]) -> Case:
    about = {"batch": f"{context.group}, {kind}"}
    return Case(context.name + suffix, context.group, prompt, tuple(follows), about)


def _kind_by_kind(found: list[Case]) -> list[Case]:
    """Cases that are measured together become neighbours."""
    order = list(dict.fromkeys(case.about["batch"] for case in found))
    return sorted(found, key=lambda case: order.index(case.about["batch"]))


def _compressed_too(follow: Follow) -> tuple[tuple[int, ...], Follow]:
    """The part of a question that joins the prompt, and what is left to read.

    One token of the question stays outside, for what comes right after a prompt is exact under every method.
    """
    ((start, stop),) = follow.answers
    return follow.tokens[: start - 1], Follow(follow.tokens[start - 1 :], ((1, 1 + stop - start),), follow.depth)


def _conversation(lab: Lab, follows: list[Follow]) -> Follow:
    """Questions and right answers one after the other."""
    tokens, spans = [], []
    end = lab.ids(".\n")
    for follow in follows:
        spans += [(start + len(tokens), stop + len(tokens)) for start, stop in follow.answers]
        tokens += [*follow.tokens, *end]
    return Follow(tuple(tokens), tuple(spans), follows[0].depth)


def reduce(lab: Lab, case: Case, found: list[Figures]) -> Values:
    suffix = "_aware" if "aware" in case.about["batch"] else ""
    outcomes = [[x.exact for x in known.answers(lab, *pair)] for pair in zip(case.follows, found)]
    if "turns" not in case.about["batch"]:
        return {f"shared{suffix}": [x for (x,) in outcomes]}
    last = {} if suffix else {"chain_last": outcomes[0][-1:]}
    return {f"chain{suffix}": outcomes[0], **last}


TASK = Task(
    "one compressed context, eight questions and a conversation of four turns",
    {
        "shared": Metric("right numbers, context compressed before the questions", "accuracy"),
        "chain": Metric("right numbers over four turns", "accuracy"),
        "chain_last": Metric("right numbers in the fourth turn", "accuracy"),
    },
    cases,
    functools.partial(known.measure, reduce=reduce),
)

AWARE = Task(
    "the same contexts and questions, the questions compressed with the context",
    {
        "shared_aware": Metric("right numbers, question compressed with the context", "accuracy"),
        "chain_aware": Metric("right numbers over four turns, questions compressed with the context", "accuracy"),
    },
    cases_aware,
    functools.partial(known.measure, reduce=reduce),
)
