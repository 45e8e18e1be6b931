"""Benchmarks from a user's folders: their metrics, their formats, and what is said of files that do not fit."""

import dataclasses
import difflib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import CONFIG
from tiny import lab

from minikv_jax import ConfigError, presets
from minikv_jax.evals import longbench, metrics, ruler, scbench, study, written
from minikv_jax.evals.task import Settings
from minikv_jax.models.shapes import shape_of
from minikv_jax.report import planned_report

# ---- metrics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "score, text, reference, expected",
    [
        (metrics.f1, "The answer is Paris.", "Paris", 2 * 1 / (3 + 1)),
        (metrics.f1, "a cat, a dog", "the dog", 2 * 1 / (2 + 1)),
        (metrics.f1, "nothing", "else", 0),
        (metrics.rouge_l, "the cat sat on the mat", "the cat on mat", 2 * 4 / 9),  # "the" counts once
        (metrics.rouge_l, "b a", "a b", 0.5),
        (metrics.rouge_l, "", "a", 0),
        (metrics.rouge_l, "...", "a", 0),
        (metrics.rouge_l_sum, "A b c\nd e", "a b\nd e f", 2 * 4 / 10),
        (metrics.rouge_l_chinese, "我在北京大学", "北京大学", 2 * 1 / (3 + 1)),
        (metrics.f1_chinese, "我在北京大学。", "北京大学", 2 * 1 / (3 + 1)),
        (metrics.f1_characters, "\u5317 \u4eac\uff01", "北京市", 2 * 2 / (2 + 3)),
        (metrics.number_share, "3 and 5 and 3", "Paragraph 3", 2 / 3),
        (metrics.number_share, "none", "4", 0),
        (metrics.code_similarity, "\n# note\nx = 1\ny", "x = 1", 1),
        (metrics.contains, "The Value is ABC.", "abc", 1),
        (metrics.holds, "The Value is ABC.", "abc", 0),
        (metrics.first_number, "it is 12.5, not 3", "12.5", 1),
        (metrics.first_number, "it is 12.5, not 3", "12", 1),
        (metrics.first_number, "none", "1", 0),
        (metrics.choice, "The answer is B.", "B", 1),
        (metrics.choice, "A. Because", "B", 0),
        (metrics.choice, "C, or else A", "C", 1),
        (metrics.choice, "I say the answer is: D or A", "D", 1),
        (metrics.choice, "it may be {B} or C", "B", 1),
        (metrics.choice, "none", "B", 0),
        (metrics.choice, "that one", "that one", 1),
    ],
)
def test_scores_by_hand(score, text, reference, expected):
    assert score(text, reference) == pytest.approx(expected)


def test_classes_within_the_right_one_do_not_count():
    classes = ["human", "human being", "place"]
    assert metrics.classification("a human being", "human being", classes) == 1
    assert metrics.classification("human being or place", "human being", classes) == 0.5
    assert metrics.classification("place", "human being", classes) == 0


def test_a_package_that_judges_is_named_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    _write(tmp_path / "vcsum.jsonl", _QUESTION)
    with pytest.raises(ConfigError, match=r"vcsum is judged with rouge jieba, .*'minikv-jax\[longbench\]'"):
        longbench.TASK.cases(lab(longbench=tmp_path))
    _write(tmp_path / "scbench" / "scbench_summary_with_needles.jsonl", {"context": "", "multi_turns": []})
    with pytest.raises(ConfigError, match="judged with rouge-score, "):
        scbench.TASK.cases(lab(scbench=tmp_path / "scbench"))


def test_code_similarity_is_that_of_the_line():
    ratio = difflib.SequenceMatcher(None, "x = 12", "x = 1").ratio()
    assert metrics.code_similarity("// c\nx = 12", "x = 1") == round(ratio, 2)


# ---- LongBench and SCBench -----------------------------------------------------------------------------------------

_QUESTION = {"input": "Who?", "context": "it was ann. " * 8, "answers": ["Ann", "ann b"], "all_classes": None}


def _write(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_longbench_is_read_cut_and_judged(tmp_path):
    _write(tmp_path / "data" / "qasper.jsonl", _QUESTION, _QUESTION | {"context": "x" * 900})
    _write(tmp_path / "data" / "trec_e.jsonl", _QUESTION | {"answers": ["place"], "all_classes": ["place", "thing"]})
    config = tmp_path / "config" / "dataset2prompt.json"
    _write(config, {"qasper": "read: {context} now: {input}", "trec": "{context}\n{input}"})
    chosen = lab(longbench=tmp_path, lengths=(128,))
    first, second, trec = longbench.TASK.cases(chosen)
    decode = chosen.tokenizer.decode
    assert (
        decode(first.prompt).startswith("read: it was ann.")
        and decode(first.about["turns"][0].question) == "now: who?\n"
    )
    assert len(second.prompt) == 128 and trec.group == "trec" and trec.name == "trec_e/128/0"
    assert first.about["turns"][0].score("it was ann b") == pytest.approx(2 * 2 / (4 + 2))
    assert trec.about["turns"][0].score("place\nthing") == 1


@pytest.mark.parametrize(
    "name, text, named",
    [
        ("qasper.jsonl", "{", "line 1 is no JSON"),
        ("qasper.jsonl", '{"input": "a"}', "has no context, answers"),
        ("qasper.jsonl", "[]", "has no input"),
        ("mine.jsonl", "{}", "unknown data set 'mine'"),
        ("notes.txt", "", r"no \.jsonl file"),
    ],
)
def test_a_longbench_folder_that_is_none(tmp_path, name, text, named):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=named):
        longbench.TASK.cases(lab(longbench=tmp_path))


def test_prompts_of_longbench_must_hold_the_context(tmp_path):
    _write(tmp_path / "qasper.jsonl", _QUESTION)
    _write(tmp_path / "config" / "dataset2prompt.json", {"qasper": "{input}"})
    with pytest.raises(ConfigError, match=r"no \{context\}"):
        longbench.TASK.cases(lab(longbench=tmp_path))
    with pytest.raises(ConfigError, match="--longbench"):
        longbench.TASK.cases(lab())


def test_scbench_asks_turn_after_turn(tmp_path):
    turns = [{"input": "key a?", "answer": "b"}, {"input": "key c?", "answer": ["d", "e"]}]
    _write(tmp_path / "scbench_kv.jsonl", {"context": "a is b, c is d.", "multi_turns": turns})
    pick = {"input": "which?", "answer": "B", "options": ["one", "two", "three", "four"]}
    _write(tmp_path / "scbench_choice_eng.jsonl", {"context": "text", "multi_turns": [pick]})
    _write(tmp_path / "scbench_vt.jsonl", {"context": "text", "multi_turns": [{"input": "x", "answer": ["v", "w"]}]})
    chosen = lab(scbench=tmp_path)
    choice, kv, vt = scbench.TASK.cases(chosen)
    decode = chosen.tokenizer.decode
    assert "b. two" in decode(choice.about["turns"][0].question)
    assert [decode(turn.answer) for turn in kv.about["turns"]] == ["b", "d"]
    assert kv.about["turns"][1].score("it is e") == 1 and vt.about["turns"][0].score("v only") == 0.5

    # Both data sets are measured alike; this one has turns.
    kv = written.case(
        "kv", "g", kv.prompt, [turn.__class__(turn.question, turn.answer, 3, turn.score) for turn in kv.about["turns"]]
    )
    measured = scbench.TASK.measure(chosen, [kv], {"full": presets.full()})
    assert len(measured["full"][0].values["scbench"]) == 2


FUNCTIONS = {  # what stands before a function, and the function
    "python": ("import os\n\n", "def add(a, b):\n    def inner():\n        return b\n    return a + inner()"),
    "java": ("class A {\n  int x;\n  ", "int add(int a, int b) {\n    return a + b;\n  }"),
    "typescript": ("const x = 1\n", "function add(a: number, b: number): number { return a + b }"),
    "rust": ("use std::io;\n", "fn add(a: i32, b: i32) -> i32 { a + b }"),
    "cpp": ("int A::of() { return 1; }\nint *p() { return 0; }\n", "int add(int a, int b) { return a + b; }"),
    "go": ("package main\n", "func add(a int, b int) int { return a + b }"),
}


@pytest.mark.parametrize("language", metrics.LANGUAGES)
def test_functions_are_found_in_code(language):
    before, code = FUNCTIONS[language]
    text = f"Here it is:\n```{language}\n{before}{code}\n```\nand more:\n```\nnothing\n```"
    assert metrics.first_function(text, language) == code
    assert metrics.first_function("```\nonly text\n```", language) == "only text\n"
    assert metrics.first_function(f" {code} ", language) == code

    other = code.replace("add", "subtract").replace("a + b", "a - b").replace("a + inner()", "a - inner()")
    functions = [("subtract", other), ("add", code)]
    judge = dict(functions=functions, language=language)
    assert metrics.finds_function(text, name="add", **judge) == 1
    assert metrics.finds_function(text, name="subtract", **judge) == 0
    assert metrics.finds_function("no such thing", name="add", **judge) == 0
    assert metrics.finds_function("", name="add", **judge) == 0


def _code(name: str) -> str:
    return f"def {name}(a, b):\n    c = a + b\n    return [c, {name!r}, a, b, a - b, a / b]"


def test_scbench_judges_a_repositorys_functions(tmp_path):
    """A record's functions are told from those of other records of the repository, which need not be measured."""
    code = dict(repo="r", lang="python", context="code")
    turns = [{"input": f"what {name}s", "answer": _code(name), "name": name} for name in ("add", "move")]
    records = [code | {"multi_turns": turns[:1]}, code | {"multi_turns": turns[1:]}]
    (tmp_path / "scbench_repoqa.jsonl").write_text("\n".join(map(json.dumps, records)))
    turns = [turns[0] | {"task": "scbench_repoqa"}, {"input": "key?", "answer": "v", "task": "scbench_kv"}]
    _write(tmp_path / "scbench_repoqa_and_kv.jsonl", code | {"multi_turns": turns})
    alone, mixed = scbench.TASK.cases(lab(scbench=tmp_path, limit=1))
    assert [turn.most for turn in mixed.about["turns"]] == [1024, 80]
    for turn in (alone.about["turns"][0], mixed.about["turns"][0]):
        assert turn.score(f"```python\n{_code('add')}\n```") == 1
    assert alone.about["turns"][0].score(_code("move")) == 0
    assert mixed.about["turns"][1].score("it is v") == 1


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("scbench_repoqa", {"lang": "c#"}, "this is 'c#'"),
        ("scbench_repoqa", {"repo": None}, "expected a repo"),
        ("scbench_repoqa_and_kv", {}, "answer, input, task"),
        ("scbench_repoqa_and_kv", {"task": "scbench_mf"}, "scbench_mf"),
        ("scbench_kv", {"multi_turns": []}, r"line 1: multi_turns is \[\]"),
        ("scbench_kv", {"context": None}, "expected a context"),
        ("scbench_of_another", {}, "not supported"),
    ],
)
def test_scbench_files_that_do_not_fit(tmp_path, name, change, match):
    turn = {"input": "x", "answer": "y", "name": "y"}
    record = {"context": "", "repo": "r", "lang": "go", "multi_turns": [turn]}
    if "task" in change:
        turn["task"] = change["task"]
    else:
        record |= change
    _write(tmp_path / f"{name}.jsonl", {key: x for key, x in record.items() if x is not None})
    with pytest.raises(ConfigError, match=match):
        scbench.TASK.cases(lab(scbench=tmp_path))


def test_long_prompts_lose_their_middle():
    assert written.middle_out(range(10), 5) == [0, 1, 7, 8, 9]
    assert written.middle_out(range(3), 5) == [0, 1, 2]


# ---- RULER ---------------------------------------------------------------------------------------------------------

# A generator with the real ones' command line, kinds of imports and output.
_GENERATOR = """
import argparse, json, os
from tenacity import retry, stop_after_attempt, wait_fixed
from nltk.tokenize import sent_tokenize
parser = argparse.ArgumentParser()
for name in ("save_dir", "save_name", "tokenizer_path", "tokenizer_type", "template", "kind"):
    parser.add_argument("--" + name)
for name in ("max_seq_length", "tokens_to_generate", "num_samples", "random_seed"):
    parser.add_argument("--" + name, type=int)
a = parser.parse_args()
assert sent_tokenize("One. Two!") == ["One.", "Two!"] and a.kind == "words" and os.path.isdir(a.tokenizer_path)
os.makedirs(os.path.join(a.save_dir, a.save_name))
with open(os.path.join(a.save_dir, a.save_name, "validation.jsonl"), "w") as file:
    for i in range(a.num_samples):
        text = a.template.format(context="lamp is %d" % (a.random_seed + i), query="lamp")
        file.write(json.dumps({"index": i, "input": text, "outputs": [str(a.random_seed + i)]}) + chr(10))
"""


def _package(tmp_path, generator=_GENERATOR):
    folder = tmp_path / "long_context_eval"
    (folder / "data" / "synthetic").mkdir(parents=True)
    (folder / "synthetic.yaml").write_text("one_key:\n  task: niah\n  args:\n    kind: words\n")
    template = {
        "niah": {"tokens_to_generate": 4, "template": "look: {context}\nwhat is {query}?", "answer_prefix": " it is"}
    }
    (folder / "data" / "synthetic" / "constants.py").write_text(f"TASKS = {template!r}")
    (folder / "data" / "synthetic" / "niah.py").write_text(generator)


def _ruler_lab(monkeypatch, tmp_path, **settings):
    chosen = lab(ruler=tmp_path, **settings)
    monkeypatch.setattr(chosen.tokenizer, "save_pretrained", os.makedirs, raising=False)
    return chosen


def test_ruler_runs_the_packages_generators(tmp_path, monkeypatch):
    _package(tmp_path)
    cases = ruler.TASK.cases(_ruler_lab(monkeypatch, tmp_path, seed=7))
    chosen = lab()
    assert [case.name for case in cases] == ["one_key/64/0", "one_key/64/1"]
    for i, case in enumerate(cases):
        (turn,) = case.about["turns"]
        # The context ends before the question, which the package wrote.
        assert chosen.tokenizer.decode(case.prompt) == f"look: lamp is {7 + i}"
        assert chosen.tokenizer.decode(turn.question) == "\nwhat is lamp? it is"
        assert turn.score(f"it is {7 + i}.") == 1 and turn.score("none") == 0 and turn.most == 4
    test = ruler.TASK.cases(_ruler_lab(monkeypatch, tmp_path, seed=7, split="test"))
    assert not {case.prompt for case in test} & {case.prompt for case in cases}


def test_a_missing_or_failing_ruler_is_explained(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="nvidia-long-context-eval"):
        ruler.TASK.cases(lab(ruler=tmp_path))
    _package(tmp_path, "import no_such_words")
    with pytest.raises(ConfigError, match="no_such_words"):
        ruler.TASK.cases(_ruler_lab(monkeypatch, tmp_path))


# ---- the study -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, share", [("minikv", 0.14), ("mikv", 0.3), ("h2o", 0.1)])
def test_methods_are_fitted_to_a_share_of_bfloat16(name, share):
    model = shape_of("qwen2.5-1.5b")
    (config,) = presets.parse(study.at_share(name, share, model, 2048, 256)).values()
    weight = planned_report(model.__class__(**{**vars(model), "num_layers": 2}), config, 2048, 256).total
    assert weight.bits_per_element / 16 == pytest.approx(share, rel=0.1)
    assert study.at_share("mikv", 0.05, model, 2048, 256) is None


def test_pieces_name_tasks_and_methods_that_exist():
    from minikv_jax.evals.tasks import by_names

    for title, piece in study.STUDY.items():
        assert by_names(piece.tasks)
        if title not in ("budgets", "few"):  # those fit methods to a real model
            assert "full" in piece.methods(CONFIG, Settings())
    few = study.STUDY["few"].methods(shape_of("qwen2.5-1.5b"), Settings(lengths=(2048,)))
    assert {"full", "minikv", "minikv_plus", "minikv_plus:key_bits=3", "mikv"} < few.keys() and len(few) == 15
    assert study.STUDY["long"].settings(CONFIG, Settings(new_tokens=256)).new_tokens == 2048


@given(st.integers(16, 2048), st.integers(1, 512), st.sampled_from([2048, 8192, 32768]))
def test_lengths_grow_to_the_models_context(longest, new_tokens, context):
    model = dataclasses.replace(CONFIG, max_position_embeddings=context)
    lengths = study.STUDY["lengths"].settings(model, Settings(lengths=(longest,), new_tokens=new_tokens)).lengths
    assert lengths[0] == max(longest // 2, 16) and list(lengths) == sorted(set(lengths))
    assert all(b <= 2 * a for a, b in itertools.pairwise(lengths))
    assert len(lengths) == 1 or context - 128 <= lengths[-1] + new_tokens + 1 <= context


def test_unknown_pieces_are_named():
    with pytest.raises(ConfigError, match="'nothing'"):
        study.by_names("main,nothing")


# ---- the program ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--tasks", "klx"], "klx"),
        (["--methods", "minikv9"], "minikv9"),
        (["--methods", "minikv:bits=5"], "bits=5"),
        (["--lengths", "many"], "many"),
        (["--texts", "no/such/folder"], "no/such/folder"),
        (["--study", "nothing"], "nothing"),
        (["--model", "no/such/model"], "no/such/model"),
    ],
)
def test_the_program_names_the_mistake(arguments, named, tmp_path):
    from click.testing import CliRunner

    from minikv_jax import cli

    result = CliRunner().invoke(cli.app, ["eval", "--out", str(tmp_path / "out"), *arguments], standalone_mode=False)
    assert isinstance(result.exception, Exception) and named in str(result.exception)


@pytest.mark.slow
def test_a_real_model_is_measured_by_the_program(tmp_path):
    command = [sys.executable, "-m", "minikv_jax", "eval", "--methods", "kivi", "--tasks", "kl", "--lengths", "300"]
    command += ["--limit", "1", "--new-tokens", "16", "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "| `kivi` |" in result.stdout and (tmp_path / "quality.png").exists()


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    source = Path(__file__).parent.parent / "examples"
    notebook = nbformat.read(source / "quality.ipynb", as_version=4)
    (tmp_path / "examples").mkdir()
    nbclient.NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": tmp_path / "examples"}}).execute()
    assert "`minikv:" in str(notebook.cells[3].outputs) and (tmp_path / "demo" / "quality" / "quality.png").exists()
