"""Shared context (SCBench's protocol, arXiv 2412.10319): the context is compressed before any question is seen.

Eight questions go on independently from one compressed cache, and four more make a conversation in which the right
answers stand. Beside each, "aware": the questions stand at the prompt's end and are compressed with it, which is how
most methods are published, and what a server with one context and many questions cannot do.
"""

import functools

from minikv_jax.evals import known
from minikv_jax.evals.engine import Figures
from minikv_jax.evals.records import CODES, counts, question, record, rng_of
from minikv_jax.evals.task import Case, Follow, Lab, Metric, Task, Values

_LINES = (50, 100, 200, 400, 800, 1600)
_QUESTIONS, _TURNS = 8, 4
_ANNOUNCED = "\nThe codes of {keys} will be asked for.\n"


def cases(lab: Lab) -> list[Case]:
    found = []
    for lines in counts(lab, CODES, _LINES):
        group = f"{lines} lines"
        kinds: dict[str, list[Case]] = {"before": [], "before, turns": [], "aware": [], "aware, turns": []}
        for i in range(lab.settings.limit):
            drawn = record(rng_of(lab, "shared", lines, i), CODES, lines, _QUESTIONS + _TURNS)
            follows = [question(lab, CODES, *asked) for asked in drawn.questions]
            single, turns = follows[:_QUESTIONS], _conversation(lab, follows[_QUESTIONS:])
            context = tuple(lab.first_ids(drawn.text))
            keys = ", ".join(key for key, *_ in drawn.questions[_QUESTIONS:])
            announced = (*context, *lab.ids(_ANNOUNCED.format(keys=keys)))

            def add(kind, name, prompt, follows, i=i, lines=lines, group=group, kinds=kinds):
                case = Case(f"{lines}/{i}{name}", group, prompt, tuple(follows), {"batch": f"{group}, {kind}"})
                kinds[kind].append(case)

            add("before", "", context, single)
            add("before, turns", "/turns", context, [turns])
            for j, follow in enumerate(single):
                asked, rest = _compressed_too(follow)
                add("aware", f"/aware{j}", (*context, *asked), [rest])
            add("aware, turns", "/aware-turns", announced, [turns])
        found += [case for kind in kinds.values() for case in kind]
    return found


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
        "shared_aware": Metric("right numbers, question compressed with the context", "accuracy"),
        "chain": Metric("right numbers over four turns", "accuracy"),
        "chain_last": Metric("right numbers in the fourth turn", "accuracy"),
        "chain_aware": Metric("right numbers over four turns, questions compressed with the context", "accuracy"),
    },
    cases,
    functools.partial(known.measure, reduce=reduce),
)
