"""Runs tasks: finds what is missing, measures it batch by batch, keeps every item, and writes what they say."""

import dataclasses
import datetime
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from minikv_jax import outputs
from minikv_jax.bench.timing import write_results
from minikv_jax.config import CacheConfig
from minikv_jax.errors import ConfigError, MiniKVError
from minikv_jax.evals import picture, store, summary
from minikv_jax.evals.engine import for_method
from minikv_jax.evals.known import FULL, with_full
from minikv_jax.evals.task import Case, Lab, Settings, Task
from minikv_jax.evals.tasks import METRICS, TASKS
from minikv_jax.extras import require
from minikv_jax.prefill import checked

type Done = set[tuple[str, str, str]]


def run(
    lab: Lab,
    name: str,
    methods: Mapping[str, CacheConfig],
    tasks: Mapping[str, Task],
    out: Path,
    command: str,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict]:
    """Measures what `out` does not hold yet and writes results.json, table.md and pictures there.

    Args:
        lab: model, tokenizer and settings.
        name: of the model, in results.
        methods: by label; the full cache is always among them.
        tasks: by name.
        out: folder of the run.
        command: that is noted in the results.
        progress: called with (finished, all) items of the tasks asked for.

    Returns:
        The rows of results.json, from all items in `out`, those of earlier runs included.

    Raises:
        ConfigError: as `held` and `cases_of`, and methods that the model cannot run; before anything is measured.
        MiniKVError: predictions that are no numbers.
    """
    items = held(out, name, lab.settings)
    done, methods = keys(items), with_full(methods)
    asked = {title: dict(methods) if task.compares else {FULL: methods[FULL]} for title, task in tasks.items()}
    cases = {title: cases_of(lab, title, asked[title]) for title in tasks}
    store.begin(out, identity(name, lab.settings))
    total = sum(len(cases[title]) * len(asked[title]) for title in tasks)
    finished = sum((t, c.name, m) in done for t in tasks for c in cases[t] for m in asked[t])
    try:
        for title in tasks:
            if progress is not None:
                progress(finished, total)
            for new in measured(lab, title, asked[title], done, cases[title]):
                store.add(out, new)
                items += new
                finished += len(new)
                if progress is not None:
                    progress(finished, total)
    except KeyboardInterrupt:
        write(out, items, name, command)
        raise
    return write(out, items, name, command)


def held(out: Path, name: str, settings: Settings) -> list[dict]:
    """The items of the run in `out`.

    Raises:
        MissingExtraError: what draws its pictures is not installed.
        ConfigError: as `store.held`; items of a task that this version does not have.
    """
    require("matplotlib", "plot")  # a run ends with pictures
    items = store.held(out, identity(name, settings))
    unknown = sorted({metric for item in items for metric in item["values"]} - METRICS.keys())
    if unknown:
        raise ConfigError(f"--out {out} holds figures called {', '.join(unknown)}, unknown here: name another folder.")
    return items


def cases_of(lab: Lab, title: str, methods: Mapping[str, CacheConfig]) -> list[Case]:
    """A task's cases, all of which the model can read under the methods.

    Raises:
        ConfigError: what the task raises; no case at all; a prompt that does not fit the model with what follows it, or
            a method that the model cannot run.
    """
    task, model = TASKS[title], lab.model
    if max(lab.settings.lengths) >= model.config.max_position_embeddings:
        raise ConfigError(
            f"Prompts of {max(lab.settings.lengths)} tokens do not fit the model's "
            f"{model.config.max_position_embeddings} positions: give shorter --lengths."
        )
    cases = task.cases(lab)
    if not cases:
        raise ConfigError(f"{title} has no case of at most {max(lab.settings.lengths)} tokens: give longer --lengths.")
    case, room = max(((case, task.room(lab, case)) for case in cases), key=lambda x: len(x[0].prompt) + x[1])
    for label, config in methods.items():
        try:
            checked(
                for_method(model, config),
                len(case.prompt),
                config.replace(generated_capacity=room, prompt_capacity=None),
            )
        except MiniKVError as error:
            raise ConfigError(f"{title}, {case.name}, {label}: {error}") from None
    return cases


def identity(name: str, settings: Settings) -> dict:
    """What all items of a folder share."""
    return {"model": name, "seed": settings.seed, "split": settings.split, "dtype": settings.dtype}


def keys(items: Sequence[Mapping]) -> Done:
    return {(item["task"], item["case"], item["method"]) for item in items}


def measured(
    lab: Lab, title: str, methods: Mapping[str, CacheConfig], done: Done, cases: Sequence[Case] | None = None
) -> Iterator[list[dict]]:
    """Items of a task that are not done yet, batch by batch; `cases` are the task's, where the caller has them.

    Raises:
        ConfigError: as `cases_of`.
        MiniKVError: predictions that are no numbers.
    """
    task, cases = TASKS[title], cases_of(lab, title, methods) if cases is None else cases
    for batch in batches(cases, lab.settings.limit, lab.batch_tokens):
        missing = {m: x for m, x in methods.items() if any((title, c.name, m) not in done for c in batch)}
        if missing:
            found = task.measure(lab, batch, missing)
            new = [
                _item(title, case, method, one)
                for method, column in found.items()
                for case, one in zip(batch, column)
                if (title, case.name, method) not in done
            ]
            for item in new:
                _require_numbers(item)
            yield new


def _require_numbers(item: Mapping) -> None:
    for metric, value in item["values"].items():
        if not all(math.isfinite(x) for x in (value if isinstance(value, list) else [value])):
            raise MiniKVError(
                f"{item['task']}, {item['case']}, {item['method']}: {metric} is no number: the model's predictions are "
                "not finite. Are its weights whole, and does its --dtype reach far enough (bfloat16 or float32)?"
            )


def write(out: Path, items: Sequence[Mapping], name: str, command: str, about: dict | None = None) -> list[dict]:
    """What the items say, as files in `out`. `about` is where they were measured, default in this process."""
    rows = summary.rows(items, METRICS, name)
    date = datetime.date.today().isoformat()
    write_results(out / "results.json", "quality", command, date, rows, about)
    parts = [f"# {name}", summary.table(rows, METRICS)]
    for case in dict.fromkeys(row["case"] for row in rows if row["case"] != summary.ALL and "depth" not in row):
        parts += [f"## {case}", summary.table(rows, METRICS, case=case)]
    outputs.write_text(out / "table.md", "\n\n".join(parts) + "\n")
    picture.save_quality(rows, out / "quality.png")
    picture.save_heatmap(rows, out / "heatmap.png")
    picture.save_paths(rows, out / "paths.png")
    return rows


def batches(cases: Sequence[Case], limit: int, most_tokens: int) -> Iterator[list[Case]]:
    """Neighbours of one shape, at most `limit` of them and so many prompt tokens at once.

    Independent of what is already done; groups have a multiple of `limit` cases, so that most batches are of one size.
    """

    def shape(case: Case):
        return case.about.get("batch", case.group), len(case.follows)

    for _, group in itertools.groupby(cases, shape):
        group = list(group)
        longest = max(len(case.prompt) for case in group)
        size = max(min(most_tokens // longest, limit), 1)
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _item(task: str, case: Case, method: str, one) -> dict:
    return {
        "task": task,
        "case": case.name,
        "group": case.group,
        "method": method,
        "prompt_tokens": len(case.prompt),
        "values": one.values,
        **dataclasses.asdict(one.weight),
        **({"place": case.about["place"]} if "place" in case.about else {}),
    }
