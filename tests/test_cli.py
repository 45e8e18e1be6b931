"""The program as a person meets it: mistakes are one line and exit code 2, answers are text, table or JSON."""

import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import draws
import jax
import jax.numpy as jnp
import pytest
import tiny
from models import CONFIG, MODEL
from rich.console import Console
from safetensors.numpy import load_file

from minikv_jax import MissingExtraError, PromptError, __version__, chat, cli, doctor, extras, models, presets, program
from minikv_jax.bench import cpu
from minikv_jax.evals import calibrate as finding
from minikv_jax.evals import parallel, run
from minikv_jax.models.families import FAMILIES, WRAPPERS
from minikv_jax.models.llama import Llama
from minikv_jax.models.stored import Source

COMMAND = [sys.executable, "-m", "minikv_jax"]


def minikv(*arguments, **environment):
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)


@pytest.fixture
def here(monkeypatch, capsys):
    """Runs the program in this process, with the tiny model: exit code, output, errors."""
    monkeypatch.setattr(cli, "_load", lambda *_: tiny.loaded())

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["minikv", *map(str, arguments)])
        try:
            code = cli.main()
        except Exception as error:
            code = program._code_of(error)
            if code is None:
                raise
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def no_model(monkeypatch):
    monkeypatch.setattr(cli, "_load", lambda *_: pytest.fail("a model was loaded"))


# ---- mistakes ------------------------------------------------------------------------------------------------------

MISTAKES = [
    (["generate"], "prompt is empty"),
    (["nonsense"], "nonsense"),
    (["generate", "--nonsense", "hi"], "--nonsense"),
    (["generate", "--method", "minikv9", "hi"], "minikv9"),
    (["generate", "--method", "full,minikv", "hi"], "give one"),
    (["generate", "--set", "key_bits=5", "hi"], "key_bits=5"),
    (["generate", "--method", "minikv_plus:key_bits=5", "hi"], "key_bits=5"),
    (["generate", "--set", "key_bits", "hi"], "knob=value"),
    (["generate", "--set", "heavy=much", "hi"], "heavy"),
    (["generate", "--set", "residual=1e30", "hi"], "residual=1e+30"),
    (["generate", "--set", "residual=128", "--set", "residual=256", "hi"], "twice"),
    (["generate", "--set", f"heavy={'[' * 100_000}", "hi"], "heavy"),
    (["generate", "--method", "m" * 100_000, "hi"], "mmm..."),
    (["generate", "--prompt-file", "no/such/text", "hi"], "no/such/text"),
    (["generate", "--prompt-file", ".", "hi"], "directory"),
    (["generate", "--temperature", "-1", "hi"], "temperature"),
    (["generate", "--temperature", "nan", "hi"], "nan"),
    (["generate", "--temperature", "inf", "hi"], "inf"),
    (["generate", "--top-p", "nan", "hi"], "top-p"),
    (["generate", "--top-p", "0", "hi"], "top-p"),
    (["plan", "llama3-8b", "--memory", "much"], "24GB"),
    (["plan", "llama3-8b"], "--memory"),
    (["plan", "llama9", "--memory", "24GB"], "llama9"),
    (["plan", "llama3-8b", "--memory", "24GB", "--method", "full,kivi"], "give one"),
    (["completion", "tcsh"], "tcsh"),
    (["generate", "--max-new-tokens", "0", "hi"], "max-new-tokens"),
    (["generate", "--max-new-tokens", "9" * 30, "hi"], "positions"),
    (["generate", "--seed", "9999999999999999999999", "hi"], "seed"),
    (["generate", "--seed", "-1", "hi"], "seed"),
    (["generate", "\udcff\udcfe"], "no text"),
    (["compare", "--methods", "full,none", "hi"], "none"),
    (["compare", "--methods", "", "hi"], "''"),
    (["compare", "--picture", "picture.doc", "hi"], "picture.doc"),
    (["compare", "--picture", "/proc/none/cache.png", "hi"], "cannot be written"),
    (["methods", "--model-shape", "llama9"], "llama9"),
    (["methods", "--model-shape", "llama2-7b", "--prompt", "0"], "--prompt"),
    (["methods", "--model-shape", "llama2-7b", "--prompt", "1000000000"], "prompt=1000000000"),
    (["methods", "--model-shape", "llama2-7b", "--generated", "9" * 30], "generated=9"),
    (["bench", "nothing", "--out", "x.json"], "nothing"),
    (["bench", "cpu", "--out", "/proc/none/x.json"], "cannot be written"),
    (["bench", "cpu", "--out", "."], "is a folder"),
    (["bench", "cpu", "--out", "x.json", "--only", "A"], "--only"),
    (["bench", "decode", "--out", "x.json"], "GPU"),
    (["eval", "--out", "/proc/none"], "cannot be written"),
    (["eval", "--out", "pyproject.toml"], "is a file"),
    (["eval", "--out", "x", "--name", "\udcff"], "--name"),
    (["eval", "--out", "x", "--model", "\udcff"], "--name"),
    (["eval", "--out", "x", "--study", "main", "--tasks", "kl"], "--study"),
    (["eval", "--out", "x", "--lengths", "many"], "many"),
    (["eval", "--out", "x", "--lengths", "64,64"], "once"),
    (["eval", "--out", "x", "--lengths", "9" * 30], "lengths"),
    (["eval", "--out", "x", "--limit", "0"], "limit=0"),
    (["eval", "--out", "x", "--limit", "1000000000"], "limit=1000000000"),
    (["eval", "--out", "x", "--new-tokens", "-1"], "new_tokens=-1"),
    (["eval", "--out", "x", "--seed", "99999999999"], "seed"),
    (["eval", "--out", "x", "--jobs", "1000000"], "--jobs"),
    (["eval", "--out", "x", "--lengths", "4096", "--tasks", "kl"], "2048 positions"),
    (["eval", "--out", "x", "--lengths", "2000", "--tasks", "kl"], "positions"),
    (["train", "cskv", "--texts", "/proc/none", "--name", "x"], "no .txt file"),
    (["train", "lorc", "--texts", "x", "--name", "x"], "lorc"),
    (["train", "cskv", "--texts", "x", "--name", "a/b"], "not a path"),
    (["train", "cskv", "--texts", "x", "--name", "x", "--rate", "0"], "rate"),
    (["calibrate", "--out", "/proc/none/x.json"], "cannot be written"),
    (["calibrate", "--out", "x.json", "--length", "1"], "lengths=(1,)"),
    (["calibrate", "--out", "x.json", "--set", "key_bits=5"], "key_bits=5"),
    (["calibrate", "--out", "x.json", "--set", "precise=[0]"], "twice"),
    (["calibrate", "--out", "x.json", "--precise", "2"], "give fewer"),
    (["calibrate", "--out", "x.json", "--share", "1", "--precise", "1"], "--share"),
    (["prompt", "pyproject.toml", "--save", "x.cache", "--method", "lorc"], "lorc"),
]


@pytest.mark.promise("A mistake in what is typed is one line and exit code 2, and nothing is written")
def test_a_mistake_is_one_clear_line(here, tmp_path, monkeypatch, figure):
    monkeypatch.chdir(tmp_path)
    Path("pyproject.toml").touch()
    for arguments, named in MISTAKES:
        code, output, errors = here(*arguments)
        assert (code, output) == (2, ""), arguments
        assert named in errors and errors.count("\n") == 1 and len(errors) < 1300, (arguments, errors)
        assert [path.name for path in Path().iterdir()] == ["pyproject.toml"], arguments
    figure(f"{len(MISTAKES)} mistakes, each one line")


def test_what_is_wrong_shows_before_a_model_is_loaded(here, no_model):
    late = ("positions", "give fewer", "twice", "GPU")  # only the model says so, or nothing is loaded anyway
    for arguments, named in MISTAKES:
        if not any(word in named for word in late):
            assert here(*arguments)[0] == 2


LIGHT = """
import sys
from minikv_jax import cli, program
sys.argv = ["minikv", *sys.argv[1:]]
try:
    cli.main()
except Exception as error:
    print(program._message(error))
print([name for name in ("jax", "numpy", "flax", "transformers", "rich") if name in sys.modules])
"""


@pytest.mark.promise("Help and mistakes show at once: JAX is not imported for them")
@pytest.mark.parametrize(
    "arguments", [["--help"], ["generate", "--help"], ["generate"], ["eval", "--out", "/proc/none"], ["--nonsense"]]
)
def test_help_and_mistakes_import_nothing_heavy(arguments):
    command = [sys.executable, "-c", LIGHT, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_the_process_ends_as_its_program_says():
    for arguments, code in ((["--nonsense"], 2), (["--help"], 0), ([], 0)):
        result = minikv(*arguments)
        assert result.returncode == code and bool(result.stdout) == (code == 0)
        assert result.stderr.count("\n") == (1 if code else 0)


def test_a_device_that_is_not_there_is_named():
    result = minikv("bench", "decode", "--out", "x.json", JAX_PLATFORMS="nonsense")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "nonsense" in result.stderr


def test_a_pickle_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04]q\x00.")
    result = minikv("generate", "--model", tmp_path, "hi")
    assert result.returncode == 2 and "pickle" in result.stderr and result.stderr.count("\n") == 1


def test_a_text_longer_than_anything_a_model_reads_is_refused(here, no_model, monkeypatch, tmp_path):
    code, _, errors = here("generate", "--prompt-file", "/dev/zero", "hi")
    assert code == 2 and "64 MiB" in errors
    (tmp_path / "text").write_bytes(b"\xff")
    code, _, errors = here("generate", "--prompt-file", tmp_path / "text")
    assert code == 2 and "UTF-8" in errors


def test_a_prompt_longer_than_the_model_is_refused(here, tmp_path):
    (tmp_path / "long.txt").write_text("word " * 900)
    picture = tmp_path / "new" / "picture.png"
    code, output, errors = here("compare", "--prompt-file", tmp_path / "long.txt", "--picture", picture)
    assert (code, output) == (2, "") and "2048 positions" in errors
    assert not picture.parent.exists()


def test_predictions_that_are_no_numbers_are_named(here, monkeypatch):
    broken = jax.tree.map(lambda x: x * jnp.nan, MODEL)
    monkeypatch.setattr(cli, "_load", lambda *_: (broken, tiny.Characters()))
    code, output, errors = here("generate", "--method", "full", "hi")
    assert (code, output) == (2, "") and "NaN" in errors and errors.count("\n") == 1


def test_a_tokenizer_of_another_model_is_named(here, monkeypatch):
    class More(tiny.Characters):
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [CONFIG.vocab_size + 1]}

    monkeypatch.setattr(cli, "_load", lambda *_: (MODEL, More()))
    for command in (["generate", "hi"], ["eval", "--out", "x", "--lengths", "64", "--tasks", "passkey"]):
        code, output, errors = here(*command)
        assert (code, output) == (2, "") and "belong together" in errors and errors.count("\n") == 1


class Template(tiny.Characters):
    chat_template = "a program of the model's"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        raise TypeError("not this\nway")


def test_a_chat_template_that_fails_is_named(here, monkeypatch):
    monkeypatch.setattr(cli, "_load", lambda *_: (MODEL, Template()))
    code, output, errors = here("generate", "hi")
    assert (code, output) == (2, "") and "--raw" in errors and errors.count("\n") == 1
    with pytest.raises(PromptError, match="TypeError"):
        chat.as_message(Template(), "hi")


# ---- answers -------------------------------------------------------------------------------------------------------


def test_methods_are_listed(here):
    code, output, _ = here("methods", "--json")
    assert code == 0 and [row["method"] for row in json.loads(output)] == list(presets.METHODS)
    code, output, _ = here("methods")
    assert code == 0 and all(name in output for name in presets.METHODS)


def test_sizes_are_listed(here):
    code, output, _ = here("methods", "--model-shape", "llama2-7b", "--json")
    sizes = {row["method"]: row for row in json.loads(output)}
    assert code == 0 and sizes["minikv"]["mib_without_window"] == 320 and sizes["full"]["mib"] > 2304 - 1
    assert all({"method", "bits_per_element", "mib"} <= row.keys() for row in sizes.values())
    assert "2,304.0" in here("methods", "--model-shape", "llama2-7b")[1]


def test_models_are_listed(here):
    code, output, _ = here("models", "--json")
    rows = {row["family"]: row for row in json.loads(output)}
    assert code == 0 and set(rows) == {*FAMILIES, *WRAPPERS}
    assert rows["phi3"]["gguf"] == "phi3" and rows["phi3"]["supported"].startswith("no rope scaling")
    code, output, _ = here("models")
    assert code == 0 and all(name in output for name in ("qwen3", "granite", "mistral3", "Seed-OSS"))


def test_a_model_is_described_without_its_weights(here, monkeypatch):
    monkeypatch.setattr(Source, "load", None)
    golden = Path(__file__).parent / "golden"
    code, output, _ = here("models", golden / "qwen2_yarn", "--json")
    found = json.loads(output)
    weights = load_file(golden / "qwen2_yarn" / "model.safetensors")
    assert found["parameters"] == sum(x.size for x in weights.values())
    assert code == 0 and found["stored"] == {"F16": 2 * found["parameters"]}
    assert found["config"]["rope_scaling"]["kind"] == "yarn"
    code, output, _ = here("models", golden / "mistral3")
    assert code == 0 and "tensors of other parts" in output
    code, _, errors = here("models", golden)
    assert code == 2 and errors.count("\n") == 1


def test_compare_takes_the_methods_that_eval_takes(here, tmp_path):
    methods, picture = (
        "full,minikv:bits=4,residual=16,kivi:group_size=16,residual=16,full",
        tmp_path / "new" / "cache.PNG",
    )
    code, output, errors = here(
        "compare", "--methods", methods, "--max-new-tokens", 3, "--json", "--picture", picture, "what is it"
    )  # fmt: skip
    answers = {answer["method"]: answer for answer in json.loads(output)}
    assert code == 0 and list(answers) == ["full", "minikv:bits=4,residual=16", "kivi:group_size=16,residual=16"]
    assert errors == f"Picture: {picture}\n" and picture.read_bytes().startswith(b"\x89PNG")
    assert answers["full"]["bits_per_element"] > answers["minikv:bits=4,residual=16"]["cache_bytes"] * 0


def test_a_plan_says_what_is_taken_and_what_fits(here):
    ask = ("plan", "llama3-8b", "--memory", "24GB", "--method", "kivi:group_size=64")
    code, output, _ = here(*ask, "--json")
    plan = json.loads(output)
    assert code == 0 and plan["total"] <= plan["memory"] == 24 * 10**9 and plan["weights"] == 2 * 8_030_261_248
    code, output, _ = here(*ask)
    assert code == 0 and f"longest prompt that fits: {plan['longest_prompt']:,} tokens" in output
    assert max(map(len, output.splitlines())) <= 80
    assert "fits: none" in here("plan", "llama3-8b", "--memory", "8GiB")[1]


def test_the_doctor_names_what_is_here(here):
    code, output, _ = here("doctor")
    assert code == 0 and __version__ in output and jax.devices()[0].device_kind in output
    assert max(map(len, output.splitlines())) <= 120
    found = json.loads(here("doctor", "--json")[1])
    assert found["kernels"].keys() == doctor.examine().kernels.keys() and "smollm2" in found["models"]


def test_version_and_completion(here):
    assert here("--version")[:2] == (0, f"minikv {__version__}\n")
    for shell in ("bash", "zsh", "fish"):
        code, script, _ = here("completion", shell)
        assert code == 0 and "_MINIKV_COMPLETE" in script
    completed = minikv(_MINIKV_COMPLETE="bash_complete", COMP_WORDS="minikv comp", COMP_CWORD="1")
    assert {line.partition(",")[2] for line in completed.stdout.splitlines()} == {"compare", "completion"}


def test_progress_says_how_fast_it_goes(monkeypatch):
    shown = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(cli, "_console", lambda stderr: shown)
    monkeypatch.setattr(cli.time, "monotonic", itertools.count(0, 2.0).__next__)
    with cli._progress_bar("reading", "tokens", 4000) as progress:
        progress(5, 10)
    assert "1,000 tokens/s" in shown.file.getvalue()


def test_an_extra_that_is_missing_is_named_before_the_work(here, no_model, monkeypatch, tmp_path):
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda package: None)
    code, _, errors = here("compare", "--picture", tmp_path / "picture.png", "hi")
    assert code == 2 and "matplotlib" in errors and "pip install 'minikv-jax[plot]'" in errors
    with pytest.raises(MissingExtraError, match="matplotlib"):
        run.held(tmp_path, "tiny", tiny.lab().settings)


def test_answers_are_text_and_a_table(here):
    code, output, errors = here("compare", "--methods", "full,h2o", "--max-new-tokens", 4, "--seed", 7, "what is it")
    assert (code, errors) == (0, "") and "\n[full] " in output and "\n[h2o] " in output
    assert "times smaller" in output and "tokens per second" in output
    command = ["generate", "--method", "full", "--one-line", "--raw", "what", "--max-new-tokens"]
    one = here(*command, 1)[1]
    assert "│ -" in one.replace(" ", "").replace("│-", "│ -")  # one token has no rate


class Hashed(tiny.Characters):
    """Characters with a pipeline to hash and a chat template."""

    chat_template = "template"

    @property
    def backend_tokenizer(self):
        return self

    def to_str(self):
        return "characters"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return f"(user: {messages[0]['content']})"


@pytest.mark.parametrize("raw", [[], ["--raw"]])
def test_a_text_is_read_once_and_asked_about(here, monkeypatch, tmp_path, raw):
    monkeypatch.setattr(cli, "_load", lambda *_: (MODEL, Hashed()))
    text, saved = tmp_path / "book.txt", tmp_path / "book.cache"
    text.write_text("It is a truth universally acknowledged.")
    method = ["--method", "full", *raw]
    code, output, _ = here("prompt", text, "--save", saved, "--room", 60, *method)
    assert code == 0 and "tokens read in" in output
    asked = ["who?", "--max-new-tokens", "5", "--json", *raw]
    from_file = json.loads(here("generate", "--from", saved, *asked)[1])
    at_once = json.loads(here("generate", "--prompt-file", text, *method[:2], *asked)[1])
    for name in ("text", "prompt_tokens", "new_tokens"):
        assert from_file[name] == at_once[name]
    for arguments, match in [
        (["generate", "--from", saved, "--method", "kivi", "who?"], "leave --method"),
        (["generate", "--from", text, "who?"], "no saved cache"),
        (["generate", "--from", saved, "--max-new-tokens", 99, "who?"], "room for 60"),
        (["prompt", tmp_path / "no.txt", "--save", saved], "Cannot read"),
    ]:
        code, _, errors = here(*arguments)
        assert code == 2 and match in errors, errors


def test_an_answer_ends_where_the_model_ends_it(here, monkeypatch):
    _, free, _ = here("generate", "--method", "full", "--max-new-tokens", 6, "--json", "what is it")
    first = tiny.Characters()(json.loads(free)["text"])["input_ids"][0]
    ending = Llama.__new__(Llama)
    ending.__dict__.update(MODEL.__dict__)
    ending.config = CONFIG.replace(eos_token_ids=(first,))
    monkeypatch.setattr(cli, "_load", lambda *_: (ending, tiny.Characters()))
    _, ended, _ = here("generate", "--method", "full", "--max-new-tokens", 6, "--json", "what is it")
    assert (json.loads(ended)["text"], json.loads(ended)["new_tokens"]) == ("", 1)


@pytest.mark.promise("The demo model answers from the program, in JSON and with a picture")
def test_a_real_model_answers_in_json_and_saves_a_picture(tmp_path):
    (tmp_path / "text.txt").write_text("The sky is blue and the grass is green. " * 10)
    picture = tmp_path / "pictures" / "cache.png"
    result = minikv(
        "compare", "--methods", "full", "--prompt-file", tmp_path / "text.txt", "--max-new-tokens", 4, "--json",
        "--raw", "--picture", picture, "The capital of France is",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (answer,) = json.loads(result.stdout)
    assert "Paris" in answer["text"] and answer["method"] == "full"
    assert answer["tokens_kept"] == answer["prompt_tokens"] + answer["new_tokens"] - 1
    assert answer["cache_bytes"] > 0 and answer["bits_per_element"] >= 16
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.promise("JAX_ENABLE_X64=1 changes no answer of the program")
def test_answers_are_the_same_with_64_bit_numbers():
    command = [
        "compare",
        "--methods",
        "minikv_plus",
        "--max-new-tokens",
        6,
        "--json",
        "What is the capital of France?",
    ]
    narrow, wide = (minikv(*command, JAX_ENABLE_X64=flag) for flag in "01")
    assert (narrow.returncode, wide.returncode, wide.stderr) == (0, 0, "")
    texts = [{answer["method"]: answer["text"] for answer in json.loads(x.stdout)} for x in (narrow, wide)]
    assert texts[0] == texts[1] and len(texts[0]) == 1


# ---- runs ----------------------------------------------------------------------------------------------------------


def test_eval_writes_a_table_and_goes_on_where_it_stood(here, tmp_path):
    command = ["eval", "--methods", "snapkv:budget=24,window=8", "--tasks", "kl", "--lengths", 64, "--limit", 1]
    command += ["--new-tokens", 9, "--name", "tiny", "--out", tmp_path / "new" / "out"]
    code, first, errors = here(*command)
    assert (code, errors) == (0, "") and "| `snapkv:budget=24,window=8` |" in first
    assert here(*command)[1] == first
    code, _, errors = here(*command, "--split", "test")
    assert code == 2 and "split='dev'" in errors


@pytest.mark.slow
def test_calibrate_finds_layers(here, tmp_path, monkeypatch):
    monkeypatch.setattr(finding, "_records", finding._texts)  # whose shapes are compiled anyway
    settings = [f"--set={knob}={value}" for knob, value in (("group_size", 16), ("residual", 32), ("feedback", "none"))]
    command = ["calibrate", *settings, "--precise", 1, "--length", 64, "--limit", 1, "--new-tokens", 9, "--brief", 0]
    code, output, errors = here(*command, "--out", tmp_path / "new" / "layers.json")
    assert (code, errors) == (0, "")
    assert "minikv_plus:group_size=16,residual=32,feedback=none,precise=[0],brief=[]" in output
    results = json.loads((tmp_path / "new" / "layers.json").read_text())
    assert results["benchmark"] == "layers" and results["precise"] == [0] and 0 < results["loss"] < 1
    (row,) = results["rows"]
    assert row["layer"] == 0 and row["gain"] == pytest.approx(1 - results["loss"])


def test_eval_with_several_processes_plans_in_this_one(here, tmp_path, monkeypatch):
    planned = {}

    def run_orders(todo, jobs, load, name, out, command, progress):
        planned.update(todo=todo, jobs=jobs, load=load, name=name, command=command)
        progress(1, 2)
        (out / "table.md").write_text("| a table |")

    monkeypatch.setattr(parallel, "run_orders", run_orders)
    monkeypatch.setattr(models, "locate", Path)
    monkeypatch.setattr(models, "open_checkpoint", lambda path: types.SimpleNamespace(config=CONFIG))
    command = ["eval", "--study", "main", "--jobs", 3, "--lengths", 64, "--model", "some/tiny.gguf", "--out", tmp_path]
    code, output, errors = here(*command, "--dtype", "bfloat16", "--change", 5)
    assert (code, errors) == (0, "") and "a table" in output
    assert planned["jobs"] == 3 and planned["name"] == "tiny-repar5"
    assert planned["load"].args == (Path("some/tiny.gguf"), "bfloat16", 5)
    assert {order.title for order in planned["todo"]} == {"kl", "lines", "shared", "aware"}
    assert planned["command"].startswith("minikv eval --study main --jobs 3")


def test_bench_runs_its_benchmark(here, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(cpu, "run", lambda *arguments: ran.append(arguments))
    code, output, errors = here("bench", "cpu", "--out", tmp_path / "cpu.json")
    assert (code, output, errors) == (0, f"Figures: {tmp_path / 'cpu.json'}\n", "") and ran == [
        (tmp_path / "cpu.json",)
    ]


def test_help_without_a_command(here):
    assert here()[0] == 0


# ---- signals -------------------------------------------------------------------------------------------------------


def interrupted(number: int, after: float, *arguments) -> tuple[int, str]:
    """Exit code and errors of a program that a signal meets some time after Python has started it."""
    with subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not _catches_sigterm(process.pid):
            time.sleep(0.002)
        time.sleep(after)
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
    return process.returncode, errors.strip()


def _catches_sigterm(process: int) -> bool:
    """Whether its own first lines have run: Python by itself does not catch that signal."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process}/status").read_text())
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")


@needs_proc
@pytest.mark.parametrize("number, after", [(signal.SIGINT, 0.0), (signal.SIGINT, 0.5), (signal.SIGTERM, 1.0)])
def test_a_signal_ends_the_program_without_a_word(number, after):
    assert interrupted(number, after, "generate", "--model", "smollm2", "hi") == (128 + number, "")


@needs_proc
@pytest.mark.slow
@pytest.mark.promise("Ctrl-C ends the program at any moment, without a traceback")
def test_a_signal_ends_the_program_at_any_moment(tmp_path, figure):
    moments = draws.rng().uniform(0, 8, 12)
    for i, after in enumerate(moments):
        number = signal.SIGTERM if i % 4 == 0 else signal.SIGINT
        # Both go on for longer than the last moment, on the fastest machine too: what has ended meets no signal.
        command = ["generate", "--raw", "--max-new-tokens", "4000", "It was"]
        if i % 3 == 0:
            command = ["eval", "--lengths", "512", "--limit", "64", "--jobs", "2", "--out", str(tmp_path / "out")]
        code, errors = interrupted(number, after, *command)
        assert (code, errors) == (128 + number, ""), after
    figure(f"{len(moments)} moments in the first 8 s of generate and eval")
