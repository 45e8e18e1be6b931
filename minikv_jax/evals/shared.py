"""Shared context (SCBench's protocol, arXiv 2412.10319): the context is compressed before any question is seen.

Eight questions go on independently from one compressed cache, and four more make a conversation in which the right
answers stand. Beside each, "aware": the questions stand at the prompt's end and are compressed with it, which is how
most methods are published, and what a server with one context and many questions cannot do.
"""

import functools

from minikv_jax.evals import known
from minikv_jax.evals.engine import Figures
from minikv_jax.evals.records import CODES, Record, counts, question, record, rng_of
from minikv_jax.evals.task import Case, Follow, Lab, Metric, Task, Values

_LINES = (50, 100, 200, 400, 800, 1600)
_QUESTIONS, _TURNS = 8, 4
_ASK = "\nWhat is the code of {key}?\n"


def cases(lab: Lab) -> list[Case]:
    found = []
    for lines in counts(lab, CODES, _LINES):
        drawn = [
            record(rng_of(lab, "shared", lines, i), CODES, lines, _QUESTIONS + _TURNS)
            for i in range(lab.settings.limit)
        ]
        group = f"{lines} lines"
        # Three batches of equal shape: contexts, contexts with one question, contexts with a conversation's questions.
        found += [_before(lab, f"{lines}/{i}", group, x) for i, x in enumerate(drawn)]
        for i, x in enumerate(drawn):
            found += [_aware(lab, f"{lines}/{i}/aware{j}", group, x, j) for j in range(_QUESTIONS)]
        found += [_aware_chain(lab, f"{lines}/{i}/chain", group, x) for i, x in enumerate(drawn)]
    return found


def _follows(lab: Lab, drawn: Record) -> list[Follow]:
    made = []
    for key, value, depth in drawn.questions:
        asked = question(lab, CODES, key, value, depth)
        ask = lab.ids(_ASK.format(key=key))
        spans = tuple((start + len(ask), stop + len(ask)) for start, stop in asked.answers)
        made.append(Follow((*ask, *asked.tokens), spans, depth))
    return made


def _before(lab: Lab, name: str, group: str, drawn: Record) -> Case:
    follows = _follows(lab, drawn)
    chain = known.in_turn(follows[_QUESTIONS:])
    return Case(name, group, tuple(lab.first_ids(drawn.text)), (*follows[:_QUESTIONS], chain), {"kind": "before"})


def _aware(lab: Lab, name: str, group: str, drawn: Record, which: int) -> Case:
    follow = _follows(lab, drawn)[which]
    (start, stop), prompt = follow.answers[0], lab.first_ids(drawn.text)
    # One token of the question stays outside, for what comes right after a prompt is exact under every method.
    known_part, rest = follow.tokens[: start - 1], follow.tokens[start - 1 :]
    follow = Follow(rest, ((1, 1 + stop - start),), follow.depth)
    return Case(name, group, (*prompt, *known_part), (follow,), {"kind": "aware"})


def _aware_chain(lab: Lab, name: str, group: str, drawn: Record) -> Case:
    turns = drawn.questions[_QUESTIONS:]
    asks = "".join(_ASK.format(key=key) for key, *_ in turns)
    chain = known.in_turn(_follows(lab, drawn)[_QUESTIONS:])
    return Case(name, group, tuple(lab.first_ids(drawn.text + asks)), (chain,), {"kind": "aware"})


def reduce(lab: Lab, case: Case, found: list[Figures]) -> Values:
    suffix = "" if case.about["kind"] == "before" else "_aware"
    values: Values = {}
    for follow, figures in zip(case.follows, found):
        outcomes = [x.exact for x in known.answers(lab, follow, figures)]
        name = ("chain" if len(outcomes) > 1 else "shared") + suffix
        values[name] = [*values.get(name, []), *outcomes]
        if name == "chain":
            values["chain_last"] = outcomes[-1:]
    return values


TASK = Task(
    "one compressed context, eight questions and a conversation of four turns",
    {
        "shared": Metric("right numbers, context compressed before the questions", "accuracy"),
        "shared_aware": Metric("right numbers, question compressed with the context", "accuracy"),
        "chain": Metric("right numbers over four turns", "accuracy"),
        "chain_last": Metric("right numbers in the fourth turn", "accuracy"),
        "chain_aware": Metric("right numbers over four turns, questions compressed with the context", "accuracy"),
    },
    cases,
    functools.partial(known.measure, reduce=reduce),
)
