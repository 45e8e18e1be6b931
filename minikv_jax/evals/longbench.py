"""LongBench (arXiv 2308.14508) from a local folder, with its own metrics.

The folder holds its .jsonl files (or has them in `data/`), and its `config/dataset2prompt.json` if prompts are to be
its own; otherwise a prompt is the context and the question.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from minikv_jax.errors import ConfigError
from minikv_jax.evals import jsonl, metrics, written
from minikv_jax.evals.task import Case, Lab, Metric, Task

# Tokens to write, and the metric.
_DATASETS: dict[str, tuple[int, Callable[[str, str], float] | str]] = {
    "narrativeqa": (128, metrics.f1),
    "qasper": (128, metrics.f1),
    "multifieldqa_en": (64, metrics.f1),
    "multifieldqa_zh": (64, metrics.f1_chinese),
    "hotpotqa": (32, metrics.f1),
    "2wikimqa": (32, metrics.f1),
    "musique": (32, metrics.f1),
    "dureader": (128, metrics.rouge_l_chinese),
    "gov_report": (512, metrics.rouge_l),
    "qmsum": (512, metrics.rouge_l),
    "multi_news": (512, metrics.rouge_l),
    "vcsum": (512, metrics.rouge_l_chinese),
    "trec": (64, "classification"),
    "lsht": (64, "classification"),
    "triviaqa": (32, metrics.f1),
    "samsum": (128, metrics.rouge_l),
    "passage_count": (32, metrics.number_share),
    "passage_retrieval_en": (32, metrics.number_share),
    "passage_retrieval_zh": (32, metrics.number_share),
    "lcc": (64, metrics.code_similarity),
    "repobench-p": (64, metrics.code_similarity),
}
# These show examples or code to go on with: no chat template, and the first four are judged by their first line.
_PLAIN = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
_ONE_LINE = _PLAIN[:4]
_CONTEXT = "{context}"
_FIELDS = {"input": str, "context": str, "answers": list[str], "all_classes": list[str] | None}


def cases(lab: Lab) -> list[Case]:
    folder, found = lab.settings.longbench, []
    for path in jsonl.files(folder, "--longbench", "LongBench's JSON lines"):
        name = path.stem.removesuffix("_e")
        if name not in _DATASETS:
            raise ConfigError(f"{path}: unknown data set {name!r}; known: {', '.join(_DATASETS)}. Move it elsewhere.")
        metrics.require(_DATASETS[name][1], name)
        prompt = _prompt(cast(Path, folder), name)
        records = jsonl.records(path, _FIELDS)
        for i, record in zip(range(lab.settings.limit), records):
            found.append(_case(lab, path.stem, name, i, record, prompt))
    return found


def _prompt(folder: Path, name: str) -> str:
    path = folder / "config" / "dataset2prompt.json"
    if not path.exists():
        return "{context}\n\n{input}"
    prompt = jsonl.read(path, {name: str})[name]
    if _CONTEXT not in prompt:
        raise ConfigError(f"{path}: the prompt for {name} has no {_CONTEXT}.")
    return prompt


def _case(lab: Lab, stem: str, name: str, i: int, record: dict[str, Any], prompt: str) -> Case:
    before, _, after = prompt.partition(_CONTEXT)
    context, question = (
        before.replace("{input}", record["input"]) + record["context"],
        after.replace("{input}", record["input"]),
    )
    if name not in _PLAIN:
        context, question = lab.chat(context, question.strip())
    most, score = _DATASETS[name]
    longest = max(lab.settings.lengths)
    ids = written.middle_out(lab.first_ids(context), longest)
    judge = functools.partial(
        _judge, name=name, answers=record["answers"], classes=record["all_classes"] or (), score=score
    )
    turn = written.Turn(tuple(lab.ids(question or "\n")), (), most, judge)
    return written.case(f"{stem}/{longest}/{i}", name, ids, [turn])


def _judge(text: str, name: str, answers, classes, score) -> float:
    if name in _ONE_LINE:
        text = text.lstrip("\n").split("\n")[0]
    if score == "classification":
        score = functools.partial(metrics.classification, classes=classes)
    return max(score(text, answer) for answer in answers)


TASK = Task(
    "LongBench from --longbench",
    {"longbench": Metric("LongBench's score", more_is_better=True)},
    cases,
    functools.partial(written.measure, metric="longbench"),
    room=written.room_of,
)
