"""The README's example runs as written, its commands exist, and its generated parts are in step with their sources."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from minikv_jax import cli
from minikv_jax.bench import tables
from minikv_jax.errors import MiniKVError

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUALITY = (ROOT / "examples/quality.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow  # .ci/run runs it beside the suite
def test_the_example_is_nine_lines_and_runs():
    (example,) = blocks("python")
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
    for name in re.findall(r"(?:tests|examples)/[\w/.-]+\.(?:py|txt|json|png|md)", README + QUALITY):
        assert (ROOT / name).exists(), name
    for command, *options in re.findall(r"minikv (generate|compare|methods|eval)((?: --[a-z-]+ [^ `\n]+)*)", README):
        known = {flag for option in cli.app.commands[command].params for flag in option.opts}
        assert set(re.findall(r"--[a-z-]+", options[0])) <= known


@pytest.mark.parametrize("text, name", [(README, "README.md"), (QUALITY, "quality.md")])
def test_generated_parts_are_in_step(text, name):
    assert tables.render(text, tables.DOCUMENTS[name], ROOT / "examples/results") == text, "run `make format`"


def test_tables_of_results(tmp_path):
    names = [name for name in tables.PARTS if name != "sizes"]  # slow, and in the README's own test already
    assert sorted(sum(tables.DOCUMENTS.values(), ())) == sorted(tables.PARTS)
    text = "".join(f"<!-- {name} -->\nbehind\n<!-- /{name} -->\n" for name in names)
    written = tables.render(text, names, tmp_path)
    assert written.count("Not measured yet.") == 11 and "behind" not in written and "`minikv`" in written
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
    with pytest.raises(MiniKVError, match="cpu"):
        tables.render(text.replace("<!-- cpu -->", ""), names, tmp_path)
    with pytest.raises(MiniKVError, match="no document"):
        tables.main(["--check", str(tmp_path / "lines-tiny.json")])


def test_help_names_every_command():
    result = CliRunner().invoke(cli.app, ["--help"])
    assert result.exit_code == 0 and all(name in result.output for name in ("generate", "compare", "methods"))
