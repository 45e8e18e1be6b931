"""The README's example runs as written, its commands exist, and its generated parts are in step with their sources."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny import loaded

import minikv_jax.api
from minikv_jax import cli
from minikv_jax.bench import tables
from minikv_jax.errors import MiniKVError

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
GENERATED = {name: README if name == "README.md" else PAGES[name] for name in tables.DOCUMENTS}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow  # .ci/run runs it beside the suite
def test_the_example_is_nine_lines_and_runs():
    example, _ = blocks("python")
    assert sum(bool(line) for line in example.splitlines()) == 9
    # In a process of its own, with XLA's own flags: a real model wants its loops optimised.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-W", "error", "-c", example]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    answer, times_smaller = result.stdout.rsplit(maxsplit=1)
    assert len(answer.split()) > 10 and float(times_smaller) > 4


def test_commands_and_files_named_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`)make ([a-z]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for name in re.findall(r"(?:tests|examples)/[\w/.-]+\.(?:py|txt|json|png|md)", README + "".join(PAGES.values())):
        assert (ROOT / name).exists(), name
    for command, *options in re.findall(r"minikv (generate|compare|methods|eval)((?: --[a-z-]+ [^ `\n]+)*)", README):
        known = {flag for option in cli.app.commands[command].params for flag in option.opts}
        assert set(re.findall(r"--[a-z-]+", options[0])) <= known


def test_the_readme_is_two_screens():
    assert len(README.splitlines()) <= 150 and len(README.encode()) <= 9000


@pytest.mark.slow  # .ci/run runs it beside the suite
def test_ten_lines_are_a_cache_in_a_model_of_ones_own():
    _, example = blocks("python")
    assert sum(bool(line) for line in example.splitlines()) == 10
    result = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, check=False)
    assert result.returncode == 0 and result.stdout.startswith("(2, 1, 8, 64)"), result.stderr


@pytest.mark.slow  # .ci/run runs it beside the suite
def test_its_commands_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "_load", lambda *_: loaded())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("It was the butler. " * 10)
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("minikv ")]
    for command in commands:
        # The tiny model has smaller heads, and fewer positions than lengths by default and any record of lines.
        asked = shlex.split(
            re.sub("(kivi|minikv_plus)(?=[, ].*--tasks)", r"\1:group_size=16", command).replace("kl,lines", "kl")
        )
        asked += ["--lengths", "150", "--limit", "1"] if asked[1] == "eval" else []
        monkeypatch.setattr(sys, "argv", asked)
        assert cli.main() == 0, command
    assert len(commands) == 4 and "longest prompt that fits" in capsys.readouterr().out
    assert (tmp_path / "cache.png").exists() and (tmp_path / "quality/table.md").exists()


@pytest.mark.parametrize("name", GENERATED)
def test_generated_parts_are_in_step(name):
    text = GENERATED[name]
    assert tables.render(text, tables.DOCUMENTS[name], ROOT / "examples/results") == text, "run `make format`"


def test_goals_follow_from_results():
    """The figures of the table of goals in docs/losses.md, by hand there, from the results files."""

    def figures(file, method, *tasks):
        rows = json.loads((ROOT / "examples/results" / file).read_text())["rows"]
        rows = [row for row in rows if row["case"] == "all" and row["method"] == method and row["task"] in tasks]
        assert len(rows) == len(tasks)
        return sum(row["value"] * row["samples"] for row in rows) / sum(row["samples"] for row in rows)

    def ratio(file, method, other, *tasks):
        return figures(file, method, *tasks) / figures(file, other, *tasks)

    def check(name, *cells):
        (line,) = [line for line in PAGES["losses.md"].splitlines() if line.startswith(f"| {name} |")]
        shown = [re.match(r"[\d.]+", cell.strip())[0] for cell in line.split("|")[3:5]]
        assert shown == [f"{cell:.{len(text.partition('.')[2])}f}" for cell, text in zip(cells, shown)], line

    small, large = "smollm2", "qwen2.5-coder-1.5b"
    layers = "minikv_plus:key_bits=4,precise=[7,8,17,18,20,23],brief=[1,3,4,5,6,10,11,12,13,16,22,25,26,27,28,29],"
    layers += "brief_share=0.25"
    both = [f"layers-quality-{name}.json" for name in (small, large)]
    plain = [f"coordinates-{name}.json" for name in (small, large)]
    short = "minikv_plus:heavy=0.320,recent=0.320,key_bits=2,value_bits=2,group_size=32,value_group=64,residual=64"
    minikv_short = "minikv:heavy=0.187,recent=0.187,bits=2,residual=64"
    questions = [(f"questions-{small}.json", layers), (f"questions-{large}.json", "minikv_plus:feedback=prompt")]
    check("KL / `minikv`'s, in as many bytes", *(ratio(f, "minikv_plus", "minikv", "kl") for f in plain))
    check(
        "the same, both in at most 14 % of bfloat16's, all held",
        *(ratio(f"budgets-{name}.json", short, minikv_short, "kl") for name in (small, large)),
    )
    half = "minikv_plus:heavy=0.3,recent=0.145"
    check("KL / `minikv`'s, in about half of its tiers", *(ratio(f, half, "minikv", "kl") for f in both))
    check(
        "KL / that of `minikv`'s quantiser in 4.2 bits, nothing evicted, in at most 2.5 bits",
        *(ratio(f, "minikv_plus:important=0.0625", "minikv:heavy=0.75,recent=0.25", "kl") for f in both),
    )
    check(
        "right answers about records compressed before / the full cache's",
        *(ratio(f, method, "full", "shared", "chain") for f, method in questions),
    )
    check("of 8 independent questions a record alone", *(ratio(f, method, "full", "shared") for f, method in questions))
    chosen = [(both[0], layers), (f"quality-{large}.json", "minikv_plus")]
    check("most likely tokens unchanged, in at most 2.75 bits", *(figures(*one, "top1") for one in chosen))
    check("growth of perplexity there", *(figures(*one, "ppl") for one in chosen))
    rows = json.loads((ROOT / "examples/results/e2e-h200.json").read_text())["rows"]
    step = {(row["case"], row["method"]): row["step_ms"] for row in rows}
    cases = ("llama3-8b-B8-S32768", "qwen2.5-1.5b-B8-S32256")
    check(
        "a step / one of `minikv`, on an H200 at 8 x 32k: Llama-3-8B's shape; Qwen2.5-1.5B's",
        *(step[case, "minikv_plus"] / step[case, "minikv"] for case in cases),
    )


def test_tables_of_results(tmp_path):
    names = [name for name in tables.PARTS if name != "sizes"]  # slow, and in the README's own test already
    assert sorted(sum(tables.DOCUMENTS.values(), ())) == sorted(tables.PARTS)
    text = "".join(f"<!-- {name} -->\nbehind\n<!-- /{name} -->\n" for name in names)
    written = tables.render(text, names, tmp_path)
    assert written.count("Not measured yet.") == 17 and "behind" not in written and "`minikv`" in written
    row = {"model": "tiny", "case": "all", "task": "kl", "method": "minikv_plus:precise=[1]", "value": 0.5, "low": 0.4}
    row |= {"high": 0.6, "bits_per_element": 3.5, "bits_of_tiers": 2.25, "cases": 2, "samples": 2}
    row |= {"bits_of_codes": 2.0, "bytes": 1 << 20}
    results = {"device": "cpu", "versions": {}, "date": "today", "command": "minikv eval", "rows": [row]}
    (tmp_path / "layers-quality-tiny.json").write_text(json.dumps(results))
    line = "| `minikv_plus:precise=[1]` | 3.50 | 2.25 | 2.00 | 1.00 | 0.5 (0.4 to 0.6) |"
    assert line in tables.render(text, names, tmp_path)
    two = [row | {"task": "lines", "case": case, "value": value} for case, value in (("20 lines", 1), ("all", 0.5))]
    (tmp_path / "lines-tiny.json").write_text(json.dumps(results | {"rows": two}))
    assert "| 20 lines |" in tables.render(text, names, tmp_path)
    kl = [row | {"model": "tiny-repar1", "median": 0.45, "worst": 0.7, "method": "kivi", "cases": 9}]
    (tmp_path / "coordinates-tiny.json").write_text(
        json.dumps(results | {"rows": [row | {"median": 0.4, "worst": 0.6}]})
    )
    (tmp_path / "coordinates-tiny-repar1.json").write_text(json.dumps(results | {"rows": kl}))
    (tmp_path / "keys-tiny.json").write_text(json.dumps(results | {"rows": kl}))
    filled = tables.render(text, names, tmp_path)
    assert "| model | `minikv_plus:precise=[1]` | `kivi` |" in filled
    assert "| tiny, 2 passages | 0.5 (0.4, 0.6) | - |\n| tiny-repar1, 9 passages | - | 0.5 (0.45, 0.7) |" in filled
    assert "| method | tiny-repar1, 9 passages |\n| --- | --- |\n| `kivi` | 0.5 (0.7) |" in filled
    with pytest.raises(MiniKVError, match="cpu"):
        tables.render(text.replace("<!-- cpu -->", ""), names, tmp_path)
    with pytest.raises(MiniKVError, match="no document"):
        tables.main(["--check", str(tmp_path / "lines-tiny.json")])


def test_help_names_every_command():
    result = CliRunner().invoke(cli.app, ["--help"])
    assert result.exit_code == 0 and all(name in result.output for name in ("generate", "compare", "methods"))


@pytest.mark.slow  # .ci/run runs it beside the suite
@pytest.mark.parametrize("number", [0, 1])
def test_the_guide_to_ones_own_model_runs(number):
    examples = re.findall(r"```python\n(.*?)```", PAGES["own_model.md"], re.DOTALL)
    assert len(examples) == 2 and sum(bool(line) for line in examples[0].splitlines()) <= 15
    result = subprocess.run([sys.executable, "-c", examples[number]], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert number == 1 or result.stdout.startswith("(2, 1, 8, 64)")


@pytest.mark.slow
@pytest.mark.parametrize("page", ["caches.md", "first_answer.md", "serving.md"])
def test_the_examples_of_a_page_run_one_after_the_other(page, monkeypatch, tmp_path):
    monkeypatch.setattr(minikv_jax.api, "load", lambda _: loaded())
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL)
    scope = {}
    for example in examples:
        exec(compile(example, page, "exec"), scope)
    assert examples and (page != "caches.md" or scope["answer"].shape == (1, 20))
