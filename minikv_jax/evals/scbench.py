"""SCBench (arXiv 2412.10319) from a local folder: one compressed context, several turns, its own metrics.

Its repository-level code tasks are judged with a parser for each language, and are left out.
"""

import functools
from collections.abc import Callable
from typing import Any

from minikv_jax.errors import ConfigError
from minikv_jax.evals import jsonl, metrics, written
from minikv_jax.evals.task import Case, Lab, Metric, Task

_SCORES: dict[str, tuple[int, Callable[[str, str], float]]] = {
    "scbench_kv": (150, metrics.holds),
    "scbench_prefix_suffix": (150, metrics.holds),
    "scbench_hashhop": (150, metrics.holds),
    "scbench_vt": (30, metrics.contains),
    "scbench_many_shot": (10, metrics.contains),
    "scbench_qa_eng": (40, metrics.contains),
    "scbench_qa_chn": (40, metrics.f1_characters),
    "scbench_choice_eng": (40, metrics.choice),
    "scbench_mf": (5, metrics.first_number),
    "scbench_passkey": (15, metrics.first_number),
    "scbench_summary": (200, metrics.rouge_l_sum),
}
# Every one of these answers must be there, and the score is the share that is; elsewhere one of them is enough.
_ALL_OF = ("scbench_vt",)
_MIXED = "scbench_summary_with_needles"


def cases(lab: Lab) -> list[Case]:
    found = []
    for path in jsonl.files(lab.settings.scbench, "--scbench", "SCBench's JSON lines"):
        name = path.stem
        if name not in (*_SCORES, _MIXED):
            raise ConfigError(
                f"{path}: {name!r} is not supported; {', '.join((*_SCORES, _MIXED))} are. Move it elsewhere."
            )
        metrics.require(_SCORES["scbench_summary" if name == _MIXED else name][1], name)
        for i, record in zip(range(lab.settings.limit), jsonl.records(path, ("multi_turns",))):
            found.append(_case(lab, name, i, record))
    return found


def _case(lab: Lab, name: str, i: int, record: dict[str, Any]) -> Case:
    given = record["multi_turns"]
    context = record.get("context", record.get("input"))
    if context is None or not given or any("input" not in turn or "answer" not in turn for turn in given):
        raise ConfigError(f"{name}, record {i}: expected a context and multi_turns with input and answer each.")
    turns, before = [], None
    for turn in given:
        kind = turn.get("task", name) if name == _MIXED else name
        most, score = _SCORES[kind]
        opened, question = lab.chat(context, _question(turn))
        before = before or opened
        answers = [str(x) for x in (turn["answer"] if isinstance(turn["answer"], list) else [turn["answer"]])]
        judge = functools.partial(_judge, answers=answers, score=score, all_of=kind in _ALL_OF)
        # What comes between an answer and the next question belongs to the question.
        lead = "\n\n" if turns else ""
        turns.append(written.Turn(tuple(lab.ids(lead + question)), tuple(lab.ids(answers[0])), most, judge))
    longest = max(lab.settings.lengths)
    ids = written.middle_out(lab.first_ids(before), longest)
    return written.case(f"{name}/{longest}/{i}", name, ids, turns)


def _question(turn: dict[str, Any]) -> str:
    options = turn.get("options") or ()
    lines = [f"{letter}. {option}" for letter, option in zip("ABCD", options)]
    return "\n".join([turn["input"], *lines])


def _judge(text: str, answers, score, all_of: bool) -> float:
    scores = [score(text, answer) for answer in answers]
    return sum(scores) / len(scores) if all_of else max(scores)


TASK = Task(
    "SCBench from --scbench",
    {"scbench": Metric("SCBench's score")},
    cases,
    functools.partial(written.measure, metric="scbench"),
)
