"""SCBench (arXiv 2412.10319) from a local folder: one compressed context, several turns, its own metrics."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minikv_jax.errors import ConfigError, shortened
from minikv_jax.evals import jsonl, metrics, written
from minikv_jax.evals.task import Case, Lab, Metric, Task

# Tokens that an answer may take, and what judges it.
_SCORES: dict[str, tuple[int, Callable[..., float]]] = {
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
    "scbench_repoqa": (1024, metrics.finds_function),
}
# Every one of these answers must be there, and the score is the share that is; elsewhere one of them is enough.
_ALL_OF = ("scbench_vt",)
# Sets whose turns are of two kinds, and the tokens that answers to each may take there.
_MIXED = {
    "scbench_summary_with_needles": {"scbench_summary": 800, "scbench_passkey": 15},
    "scbench_repoqa_and_kv": {"scbench_repoqa": 1024, "scbench_kv": 80},
}
_FIELDS = {"multi_turns": list[dict]}
_TURN = {"input": str, "answer": str | int | float | list[str | int | float]}
_REPEAT = "Repeat the function of the code that is described here, exactly, in a code block between lines of ```.\n\n"


def cases(lab: Lab) -> list[Case]:
    found = []
    for path in jsonl.files(lab.settings.scbench, "--scbench", "SCBench's JSON lines"):
        name = path.stem
        if name not in (*_SCORES, *_MIXED):
            raise ConfigError(
                f"{path}: {name!r} is not supported; {', '.join((*_SCORES, *_MIXED))} are. Move it elsewhere."
            )
        for kind in _kinds(name):
            metrics.require(_SCORES[kind][1], name)
        functions = _functions(name, path) if "scbench_repoqa" in _kinds(name) else {}
        for i, record in zip(range(lab.settings.limit), jsonl.records(path, _FIELDS)):
            found.append(_case(lab, name, i, record, functions))
    return found


def _kinds(name: str) -> dict[str, int]:
    """The kinds of a set's turns, and the tokens that answers may take."""
    return _MIXED.get(name) or {name: _SCORES[name][0]}


def _functions(name: str, path: Path) -> dict[str, list[tuple[str, str]]]:
    """Each repository's functions (name, code), whichever record asks for them: one found must not be another."""
    found: dict[str, list[tuple[str, str]]] = {}
    for i, record in enumerate(jsonl.records(path, _FIELDS)):
        turns = [turn for turn in _turns(name, i, record) if _kind(name, turn) == "scbench_repoqa"]
        found.setdefault(record.get("repo", ""), []).extend((turn["name"], turn["answer"]) for turn in turns)
    return found


def _context(record: dict[str, Any]) -> Any:
    return record.get("context", record.get("input"))


def _kind(name: str, turn: dict[str, Any]) -> str:
    return turn["task"] if name in _MIXED else name


def _turns(name: str, i: int, record: dict[str, Any]) -> list[dict[str, Any]]:
    """The record's turns, if it holds what its set's records do."""
    turns = record["multi_turns"]
    fields = {"input", "answer"} | ({"task"} if name in _MIXED else set())
    if not isinstance(_context(record), str) or any(fields - turn.keys() for turn in turns):
        raise ConfigError(
            f"{name}, record {i}: expected a context and multi_turns with {', '.join(sorted(fields))} each."
        )
    for turn in turns:
        jsonl.checked(turn, _TURN, f"{name}, record {i}")
    kinds = {str(_kind(name, turn)) for turn in turns}
    if kinds - _kinds(name).keys():
        raise ConfigError(f"{name}, record {i}: tasks {sorted(kinds)}; {', '.join(_kinds(name))} are expected.")
    if "scbench_repoqa" in kinds:
        functions = [turn for turn in turns if _kind(name, turn) == "scbench_repoqa"]
        whole = all(isinstance(turn.get(x), str) for turn in functions for x in ("name", "answer"))
        if not isinstance(record.get("repo"), str) or str(record.get("lang")) not in metrics.LANGUAGES or not whole:
            raise ConfigError(
                f"{name}, record {i}: expected a repo, a lang of {', '.join(metrics.LANGUAGES)} (this is "
                f"{record.get('lang')!r}), and the name of each function."
            )
    return turns


def _case(lab: Lab, name: str, i: int, record: dict[str, Any], functions: dict[str, list[tuple[str, str]]]) -> Case:
    given = _turns(name, i, record)
    context = _context(record)
    turns, before = [], ""
    for turn in given:
        kind = _kind(name, turn)
        most, score = _kinds(name)[kind], _SCORES[kind][1]
        opened, question = lab.chat(context, _question(turn, kind))
        before = before or opened
        answers = [str(x) for x in (turn["answer"] if isinstance(turn["answer"], list) else [turn["answer"]])]
        if kind == "scbench_repoqa":
            known = functions[record["repo"]]
            judge = functools.partial(score, name=turn["name"], functions=known, language=record["lang"])
        else:
            judge = functools.partial(_judge, answers=answers, score=score, all_of=kind in _ALL_OF)
        # What comes between an answer and the next question belongs to the question.
        lead = "\n\n" if turns else ""
        turns.append(written.Turn(tuple(lab.ids(lead + question)), tuple(lab.ids(answers[0])), most, judge))
    longest = max(lab.settings.lengths)
    ids = written.middle_out(lab.first_ids(before), longest)
    return written.case(f"{name}/{longest}/{i}", name, ids, turns)


def _question(turn: dict[str, Any], kind: str) -> str:
    if kind == "scbench_repoqa":
        return _REPEAT + turn["input"]
    options = turn.get("options") or ()
    if not isinstance(options, list | tuple):
        raise ConfigError(f"options of a question are {shortened(options)}: a list is expected.")
    lines = [f"{letter}. {option}" for letter, option in zip("ABCD", options)]
    return "\n".join([turn["input"], *lines])


def _judge(text: str, answers, score, all_of: bool) -> float:
    scores = [score(text, answer) for answer in answers]
    return sum(scores) / len(scores) if all_of else max(scores)


TASK = Task(
    "SCBench from --scbench",
    {"scbench": Metric("SCBench's score", more_is_better=True)},
    cases,
    functools.partial(written.measure, metric="scbench"),
    room=written.room_of,
)
