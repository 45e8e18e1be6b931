"""What evaluations and benchmarks are given, and where they write: damage is found first, and said in one line."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import threading
import time

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import CONFIG, METHODS, MODEL
from test_evals import LAB, _item
from test_evals_data import _QUESTION, _package, _ruler_lab, _write
from tiny import Characters, lab, loaded

from minikv_jax import Allocation, Codec, ConfigError, MiniKVError, PromptError, outputs, presets
from minikv_jax.bench import cpu, tables, timing
from minikv_jax.evals import (
    calibrate,
    engine,
    jsonl,
    longbench,
    parallel,
    picture,
    ruler,
    run,
    scbench,
    store,
    study,
    summary,
    task,
    texts,
    written,
)
from minikv_jax.evals.tasks import METRICS, TASKS, by_names
from minikv_jax.models.shapes import shape_of
from minikv_jax.processes import Workers


def one_line(error) -> bool:
    return "\n" not in str(error.value) and len(str(error.value)) < 600


# ---- settings and cases --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"seed": 2**32}, "seed=4294967296"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 0.5}, "seed=0.5"),
        ({"limit": 10**9}, "limit=1000000000"),
        ({"limit": True}, "limit=True"),
        ({"new_tokens": 2.0}, "new_tokens=2.0"),
        ({"lengths": (64, 64)}, "once"),
        ({"lengths": (10**12,)}, "lengths"),
        ({"lengths": ("64",)}, "lengths"),
    ],
)
def test_settings_out_of_range_are_named(changes, named):
    with pytest.raises(ConfigError, match=named) as error:
        task.Settings(**changes)
    assert one_line(error)


def test_all_that_does_not_fit_the_model_is_said_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "measured", lambda *_: pytest.fail("something was measured"))

    def refused(named, tasks="kl", methods=None, model=MODEL, **settings):
        asked = task.Lab(
            model, Characters(), task.Settings(**{"lengths": (64,), "limit": 1, "new_tokens": 9} | settings)
        )
        with pytest.raises(ConfigError, match=named) as error:
            run.run(asked, "tiny", methods or {}, by_names(tasks), tmp_path / "out", "")
        assert one_line(error) and not (tmp_path / "out").exists()

    refused("2048 positions: give shorter", lengths=(64, 2048))
    refused("kl, .*more than the model's 2048 positions", lengths=(64, 2000), new_tokens=100)
    refused("running, .*positions", tasks="running", new_tokens=2040)
    refused("lines has no case", tasks="lines")
    refused("at least 2 tokens", tasks="running", new_tokens=1)
    refused("groups|Groups", methods={"odd": presets.kivi(group_size=64)})
    refused("layers", methods={"deep": presets.minikv_plus(group_size=16, precise=[7])})
    # What only looks at prompts needs no room after them.
    fitting = lab(lengths=(2000,), new_tokens=100, limit=1)
    assert run.cases_of(fitting, "spread", {"full": presets.full()})


def test_figures_that_are_no_numbers_are_not_written(tmp_path):
    broken = dataclasses.replace(LAB, model=jax.tree.map(lambda x: x * jnp.nan, MODEL))
    with pytest.raises(MiniKVError, match="no number") as error:
        run.run(broken, "tiny", {"snapkv": METHODS["snapkv"]}, by_names("kl"), tmp_path, "")
    assert one_line(error) and not (tmp_path / store.ITEMS).exists()


def test_ids_that_the_model_does_not_have_are_named():
    class Other(Characters):
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [CONFIG.vocab_size]}

    other = task.Lab(MODEL, Other(), task.Settings())
    for read in (other.ids, other.first_ids):
        with pytest.raises(PromptError, match="belong together"):
            read("text")
    assert lab().ids("") == []


def test_a_chat_template_is_used_and_must_keep_the_text():
    class Chat(Characters):
        chat_template = "one"
        said = "<{}>"

        def apply_chat_template(self, messages, tokenize, add_generation_prompt):
            return self.said.format(messages[0]["content"])

    chatting = task.Lab(MODEL, Chat(), task.Settings())
    assert chatting.chat("a context", "why?") == ("<a context\n\n", "why?>")
    Chat.said = "nothing"
    with pytest.raises(PromptError, match="leaves the text"):
        chatting.chat("a context", "why?")


# ---- folders of data -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, named",
    [
        (b"\xff\xff", "line 1 is no"),
        (b'{"input": "\xff"}', "line 1 is no UTF-8"),
        (b"[" * 100_000, "line 1 is no JSON"),
        (b"\n{}", "line 2 has no input"),
        (b"null", "line 1 has no input"),
    ],
)
def test_json_lines_that_are_none(tmp_path, content, named):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match=named) as error:
        list(jsonl.records(tmp_path / "x.jsonl", {"input": str}))
    assert one_line(error)


def test_json_lines_of_another_type_or_that_cannot_be_read(tmp_path):
    _write(tmp_path / "x.jsonl", {"input": ["x" * 5000]})
    with pytest.raises(ConfigError, match="input is") as error:
        list(jsonl.records(tmp_path / "x.jsonl", {"input": str}))
    assert one_line(error)
    for read in (lambda path: list(jsonl.records(path, {})), lambda path: jsonl.read(path, {})):
        with pytest.raises(ConfigError, match="cannot be read"):
            read(tmp_path)
    # As Windows writes it.
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps({"input": "a"}).encode())
    assert list(jsonl.records(tmp_path / "x.jsonl", {"input": str})) == [{"input": "a"}]


@pytest.mark.parametrize(
    "change, named",
    [
        ({"input": 3}, "input is 3"),
        ({"context": None}, "context is None"),
        ({"answers": []}, r"answers is \[\]"),
        ({"answers": [None]}, "answers is"),
        ({"answers": "Ann"}, "answers is 'Ann'"),
        ({"all_classes": [1]}, "all_classes"),
    ],
)
def test_longbench_records_that_do_not_fit(tmp_path, change, named):
    _write(tmp_path / "qasper.jsonl", _QUESTION | change)
    _write(tmp_path / "config" / "dataset2prompt.json", {"qasper": "{context}{input}"})
    with pytest.raises(ConfigError, match=named) as error:
        longbench.TASK.cases(lab(longbench=tmp_path))
    assert one_line(error)


@pytest.mark.parametrize("prompts", ["[]", "{", '{"trec": "{context}"}', '{"qasper": 3}', "\udcff"])
def test_prompts_of_longbench_that_are_damaged(tmp_path, prompts):
    _write(tmp_path / "qasper.jsonl", _QUESTION)
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "dataset2prompt.json").write_bytes(prompts.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=r"dataset2prompt\.json") as error:
        longbench.TASK.cases(lab(longbench=tmp_path))
    assert one_line(error)


@pytest.mark.parametrize(
    "record",
    [
        {"context": "", "multi_turns": ["x"]},
        {"context": "", "multi_turns": "x"},
        {"context": 3, "multi_turns": [{"input": "x", "answer": "y"}]},
        {"context": "a", "multi_turns": [{"input": None, "answer": "y"}]},
        {"context": "a", "multi_turns": [{"input": "x", "answer": {}}]},
        {"context": "a", "multi_turns": [{"input": "x", "answer": []}]},
        {"context": "a", "multi_turns": [{"input": "x", "answer": "y", "options": 7}]},
    ],
)
def test_scbench_records_that_do_not_fit(tmp_path, record):
    _write(tmp_path / "scbench_kv.jsonl", record)
    with pytest.raises(ConfigError) as error:
        scbench.TASK.cases(lab(scbench=tmp_path))
    assert one_line(error)


def test_scbench_functions_have_names_and_code(tmp_path):
    turn = {"input": "x", "answer": 3, "name": "f"}
    _write(tmp_path / "scbench_repoqa.jsonl", {"context": "c", "repo": "r", "lang": "go", "multi_turns": [turn]})
    with pytest.raises(ConfigError, match="name of each function"):
        scbench.TASK.cases(lab(scbench=tmp_path))


@pytest.mark.parametrize(
    "file, content",
    [
        ("synthetic.yaml", "a: [unclosed"),
        ("synthetic.yaml", "[]"),
        ("synthetic.yaml", "one: {task: other}"),
        ("synthetic.yaml", "one: {task: niah}"),
        ("data/synthetic/constants.py", "raise ValueError('several\\nlines')"),
        ("data/synthetic/constants.py", "TASKS = {'niah': {'template': 3, 'tokens_to_generate': 1}}"),
    ],
)
def test_a_damaged_ruler_package_is_named(tmp_path, monkeypatch, file, content):
    _package(tmp_path)
    (tmp_path / "long_context_eval" / file).write_text(content)
    with pytest.raises(ConfigError, match="long_context_eval"):
        ruler.TASK.cases(_ruler_lab(monkeypatch, tmp_path))


def test_a_ruler_generator_that_finds_nothing_leaves_its_family_out(tmp_path, monkeypatch, capsys):
    _package(tmp_path, "import time; time.sleep(60)")
    monkeypatch.setattr(ruler, "_SECONDS", 0.3)
    assert ruler.TASK.cases(_ruler_lab(monkeypatch, tmp_path)) == []
    assert "one_key is left out" in capsys.readouterr().err


def test_a_ruler_generator_may_say_anything(tmp_path, monkeypatch):
    _package(tmp_path, r"import sys; sys.stderr.buffer.write(b'\xff bad'); sys.exit(1)")
    with pytest.raises(ConfigError, match="bad"):
        ruler.TASK.cases(_ruler_lab(monkeypatch, tmp_path))


@pytest.mark.parametrize("prompt, turns", [((), 1), ((1,), 0), ((1,), 2)])
def test_what_is_written_follows_a_context_and_a_question(prompt, turns):
    empty = [written.Turn(question, (), 1, float) for question in ((1,), ())][:turns]
    with pytest.raises(ConfigError, match="empty"):
        written.case("name", "group", prompt, empty)


def test_two_texts_of_one_name_are_refused(tmp_path):
    for name in ("one.txt", "text__one.txt"):
        (tmp_path / name).write_text("words " * 9)
    with pytest.raises(ConfigError, match=r"text__one\.txt is text/one"):
        texts.documents(tmp_path)


def test_a_text_that_is_too_short_is_tried_once(monkeypatch):
    tried = []
    monkeypatch.setattr(
        texts, "documents", lambda _: [texts.Document("a/b", "word " * 30), texts.Document("c/d", "x" * 9)]
    )
    monkeypatch.setattr(texts, "split_of", lambda _: "dev")
    monkeypatch.setattr(Characters, "__call__", lambda self, text: tried.append(text) or {"input_ids": [1] * len(text)})
    with pytest.raises(ConfigError, match="has 200 tokens"):
        list(texts.passages(lab(limit=10_000), 200))
    assert len(tried) <= 2


# ---- runs on disk --------------------------------------------------------------------------------------------------

SOUND = _item("full", [1.0], "c", "lines")


@pytest.mark.promise("A damaged file of an unfinished evaluation is named; nothing is measured on top of it")
def test_damaged_items_are_named(tmp_path, figure):
    identity = run.identity("tiny", task.Settings())
    store.begin(tmp_path, identity)
    rng, line = draws.rng(), json.dumps(SOUND)
    damaged = [line[: rng.integers(1, len(line))] for _ in range(100)]
    for name in SOUND:
        damaged += [json.dumps({key: x for key, x in SOUND.items() if key != name})]
        damaged += [
            json.dumps(SOUND | {name: x}) for x in (None, [], {"lines": []}, {"lines": "x"}, {"lines": math.nan})
        ]
    damaged += ["null", "[]", "7", "NaN", "[" * 100_000, '"\\ud800"', "{}"]
    for text in damaged:
        (tmp_path / store.ITEMS).write_text(f"{line}\n{text}\n")
        with pytest.raises(ConfigError, match="line 2 is damaged") as error:
            store.held(tmp_path, identity)
        assert one_line(error)
    (tmp_path / store.ITEMS).write_bytes(line.encode() + b"\n\xff\xfe\n" + line.encode() + b"\n")
    with pytest.raises(ConfigError, match="line 2 is damaged"):
        store.held(tmp_path, identity)
    for text in ("[]", "{", "\xff", "[" * 100_000):
        (tmp_path / store.RUN).write_text(text, encoding="latin-1")
        with pytest.raises(ConfigError, match=r"run\.json is damaged"):
            store.held(tmp_path, identity)
    figure(f"{len(damaged) + 5} damaged files, each named in one line")


def test_a_cut_off_line_is_measured_again_and_others_stay_as_they_are(tmp_path):
    identity, line = run.identity("tiny", task.Settings()), json.dumps(SOUND | {"case": "\u00e9"}, ensure_ascii=False)
    store.begin(tmp_path, identity)
    (tmp_path / store.ITEMS).write_bytes(f"{line}\n{line[:20]}".encode())
    assert store.held(tmp_path, identity) == [SOUND | {"case": "\u00e9"}]
    assert (tmp_path / store.ITEMS).read_bytes() == f"{line}\n".encode()


def test_figures_of_an_unknown_task_are_named(tmp_path):
    store.begin(tmp_path, run.identity("tiny", LAB.settings))
    store.add(tmp_path, [SOUND | {"values": {"of_another_version": 1.0}}])
    with pytest.raises(ConfigError, match="of_another_version"):
        run.run(LAB, "tiny", {}, by_names("kl"), tmp_path, "")


def test_an_interrupted_run_begins_nothing_more(tmp_path):
    """Workers end their processes, and what waits for a thread is dropped."""
    begun = []

    def work(workers, i):
        with workers.process([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
            begun.append(i)
            process.wait()
        return process.returncode

    with pytest.raises(KeyboardInterrupt), Workers(2) as workers:
        futures = [workers.submit(work, workers, i) for i in range(9)]
        while len(begun) < 2:
            time.sleep(0.01)
        raise KeyboardInterrupt
    assert len(begun) == 2
    assert [future.result() for future in futures[:2]] == [-signal.SIGKILL] * 2
    assert all(future.cancelled() for future in futures[2:])
    with pytest.raises(RuntimeError, match="has been left"), workers.process(["true"]):
        pass


def lost():
    os._exit(3)


def refuses():
    raise ConfigError("the model is not there")


@pytest.mark.parametrize("load, named", [(lost, "the process ended"), (refuses, "the model is not there")])
def test_processes_that_cannot_begin_are_told(tmp_path, load, named, capfd):
    todo = parallel.orders("", ["spread"], {}, LAB.settings)
    with pytest.raises(MiniKVError, match=f"Not measured: spread under full: {named}") as error:
        parallel.run_orders(todo, 16, load, "tiny", tmp_path, "")
    assert one_line(error) and "Traceback" not in capfd.readouterr().err


def test_a_worker_whose_parent_is_gone_ends_quietly():
    mine, theirs = parallel.multiprocessing.Pipe()
    mine.close()
    before = signal.getsignal(signal.SIGINT)
    try:
        assert parallel._serve(theirs, lost) is None
    finally:
        signal.signal(signal.SIGINT, before)


# ---- files that are written ----------------------------------------------------------------------------------------


def test_outputs_are_checked_and_nothing_is_left(tmp_path):
    (tmp_path / "file").write_text("old")
    outputs.require_file(tmp_path / "a" / "b" / "c.json", "--out")
    outputs.require_file(tmp_path / "file", "--out")
    outputs.require_folder(tmp_path / "a" / "b", "--out")
    outputs.require_file(tmp_path.joinpath("/dev/null"), "--out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "old"
    for check, path in (
        (outputs.require_file, tmp_path),
        (outputs.require_file, tmp_path / "file" / "c.json"),
        (outputs.require_file, tmp_path / ("x" * 300)),
        (outputs.require_file, tmp_path / "a" / ("x" * 300) / "c"),
        (outputs.require_folder, tmp_path / "file"),
        (outputs.require_folder, tmp_path / "file" / "folder"),
        (outputs.require_picture, tmp_path / "c.json"),
    ):
        with pytest.raises(ConfigError, match="--option") as error:
            check(path, "--option")
        assert one_line(error) or "x" * 300 in str(path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_files_are_written_in_one_step(tmp_path, monkeypatch):
    path, link = tmp_path / "new" / "file", tmp_path / "link"
    outputs.write_text(path, "old")
    link.symlink_to(path)

    def full(self, *_, **__):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OSError, match="No space"):
        outputs.write_text(link, "new")
    monkeypatch.undo()
    assert path.read_text() == "old" and [x.name for x in path.parent.iterdir()] == ["file"]
    outputs.write_text(link, "new")
    assert path.read_text() == "new" and link.is_symlink()
    outputs.write_text(tmp_path.joinpath("/dev/null"), "gone")


def test_results_are_json_whatever_the_figures(tmp_path):
    rows = [{"x": math.nan, "y": [1.0, -math.inf], "z": (2, "NaN")}]
    timing.write_results(tmp_path / "x.json", "quality", "", "", rows)
    strict = json.loads((tmp_path / "x.json").read_text(), parse_constant=lambda x: pytest.fail(x))
    assert strict["rows"] == [{"x": None, "y": [1.0, None], "z": [2, "NaN"]}]
    assert timing.read_results(tmp_path / "x.json", "quality") == strict
    with pytest.raises(ConfigError, match="'quality', not of 'e2e'"):
        timing.read_results(tmp_path / "x.json", "e2e")


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"[]", b"{}", b'{"rows": 3}', b'{"rows": [3]}', b"[" * 100_000, None]
)
def test_results_that_are_damaged_are_named(tmp_path, content):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    for read in (
        timing.read_results,
        lambda path: picture.main([str(path), "--out", str(tmp_path / "x.png")]),
    ):
        with pytest.raises(ConfigError, match=r"x\.json") as error:
            read(path)
        assert one_line(error)


def test_pictures_are_drawn_of_results(tmp_path):
    items = [
        _item(method, value, f"{n}/{depth}", metric, group="g", place={"length": 64, "depth": depth}, **bits)
        for method, bits in (("full", {"bits_per_element": 16.0}), ("kivi", {}), ("kivi:residual=32", {"bytes": 7}))
        for depth in (0.0, 1.0)
        for n, (metric, value) in enumerate((("kl", 0.1), ("ppl", 0.2), ("passkey", 1.0), ("run_kl_path", [0.1, 0.2])))
    ]
    timing.write_results(tmp_path / "x.json", "quality", "", "", summary.rows(items, METRICS, "m"))
    names = {"--out": "x.png", "--heatmap": "y.svg", "--paths": "z.pdf"}
    arguments = [part for option, name in names.items() for part in (option, str(tmp_path / name))]
    assert picture.main([str(tmp_path / "x.json"), *arguments]) == 0
    assert all((tmp_path / name).stat().st_size > 1000 for name in names.values())
    one = tmp_path / "one.svg"
    assert picture.main([str(tmp_path / "x.json"), "--out", str(one), "--panels", "kl"]) == 0
    assert "m: kl" in one.read_text() and "m: ppl" not in one.read_text()
    with pytest.raises(ConfigError, match="'klx'"):
        picture.main([str(tmp_path / "x.json"), "--out", str(one), "--panels", "kl,klx"])
    timing.write_results(tmp_path / "none.json", "quality", "", "", [])
    with pytest.raises(ConfigError, match="nothing to show for --out"):
        picture.main([str(tmp_path / "none.json"), "--out", str(tmp_path / "none.png")])


def test_documents_are_rewritten_and_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    document = tmp_path / "quality.md"
    document.write_text("".join(f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in tables.DOCUMENTS["quality.md"]))
    assert tables.main(["--check", str(document)]) == 1 and "make format" in capsys.readouterr().err
    assert tables.main(["--write", str(document)]) == 0 and "Not measured yet." in document.read_text()
    assert tables.main(["--check", str(document)]) == 0
    with pytest.raises(MiniKVError, match="no document"):
        tables.main(["--check", "no/such/file.md"])


# ---- calibration, the study, and times on a CPU --------------------------------------------------------------------


def test_calibration_counts_the_answers_of_its_records():
    reading = calibrate._records(lab(lengths=(700,), limit=2))
    decode = lab().tokenizer.decode
    assert len(reading.prompts) == 2 and reading.counted.sum(axis=1).min() == 8 * len(" 12345")
    for row, counted in zip(reading.follows, reading.counted):
        # What follows a token that counts is what is predicted.
        answers = decode([int(x) for x in row[1:][counted[:-1]]]).split()
        assert len(answers) == 8 and all(x.isdigit() and len(x) == 5 for x in answers)


@pytest.mark.parametrize(
    "change, precise, named",
    [
        (dict(), 2, "1 precise and 1 brief layers of 1|2 precise"),
        (dict(new_tokens=1), 0, "at least 2 tokens"),
        (dict(lengths=(64,)), 0, "No record fits"),
    ],
)
def test_calibration_that_cannot_be_is_named(change, precise, named):
    config = presets.minikv_plus(group_size=16, residual=32, precise=[0], brief=[0])
    with pytest.raises(ConfigError, match=named):
        calibrate.calibrate(lab(**change), config, precise, 0)


def test_calibration_needs_a_method_that_can_be_exchanged_and_loses_something(monkeypatch):
    with pytest.raises(ConfigError, match="as minikv_plus has"):
        calibrate.calibrate(lab(), presets.minikv(), 0, 0)
    monkeypatch.setattr(calibrate, "_records", calibrate._texts)
    full = presets.full()
    all_the_same = full.method.replace(codec=Codec(key_group=32), allocation=Allocation(heavy=1.0, recent=0.5))
    same = full.replace(layers=((0, all_the_same),))
    with pytest.raises(ConfigError, match="nothing to calibrate"):
        calibrate.calibrate(lab(limit=1), same, 1, 0)


def test_methods_of_all_kinds_are_fitted_to_a_share_of_bfloat16():
    model = dataclasses.replace(shape_of("qwen2.5-1.5b"), num_layers=2)
    names = ("streaming_llm", "pyramidkv", "qhitter", "snapkv")
    lines = {name: study.at_share(name, 0.3, model, 1024, 128) for name in names}
    assert lines["streaming_llm"] and lines["snapkv"] and lines["pyramidkv"].startswith("pyramidkv:budget=")
    assert all(presets.parse(line) for line in lines.values() if line)
    # Seventy-two channels can be neither rotated nor cut into groups of 64.
    assert study.at_share("minikv_plus", 0.3, dataclasses.replace(model, head_dim=72), 1024, 128) is None
    assert list(study.by_names("all")) == list(study.STUDY)


@pytest.fixture
def small_text(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("some words of a text. " * 20)
    monkeypatch.setattr(cpu, "TEXT", tmp_path / "text.txt")
    monkeypatch.setattr(cpu, "load", lambda _: (MODEL, Characters()))
    monkeypatch.setattr(cpu, "_export", lambda _: None)


def test_times_on_a_cpu_are_written(small_text, tmp_path, capsys):
    out = tmp_path / "new" / "cpu.json"
    numbers = ["--prompt-tokens", "40", "--new-tokens", "4", "--rounds", "1"]
    cpu.main(["--out", str(out), *numbers, "--methods", "full,h2o"])
    results = timing.read_results(out, "cpu")
    assert [row["method"] for row in results["rows"]] == ["full", "h2o"] and "cores" in results["device"]
    assert all(row["decode_ms"] > 0 and row["bytes"] > 0 and row["rounds"] == 1 for row in results["rows"])
    assert results["rows"][0]["tokens_as_full"] == 4 and capsys.readouterr().out.count("round") == 4


@pytest.mark.parametrize(
    "change, named",
    [
        ({"rounds": 0}, "rounds=0"),
        ({"new_tokens": 2}, "new_tokens=2"),
        ({"prompt_tokens": 10**6}, "has 440 tokens"),
        ({"methods": ["full", "none"]}, "none"),
        ({"torch_python": "no/such/python"}, "no/such/python"),
    ],
)
def test_times_that_cannot_be_measured_are_named(small_text, tmp_path, change, named):
    with pytest.raises((ConfigError, OSError), match=named):
        cpu.run(tmp_path / "cpu.json", **{"prompt_tokens": 40} | change)


def test_times_on_a_cpu_need_the_repositorys_text(monkeypatch, tmp_path):
    assert cpu.TEXT.is_file() and cpu.TEXT.is_absolute()
    monkeypatch.setattr(cpu, "TEXT", tmp_path / "none.txt")
    with pytest.raises(ConfigError, match="checkout"):
        cpu.run(tmp_path / "cpu.json")


# ---- processes of a study, as threads -------------------------------------------------------------------------------


@pytest.fixture
def threads(monkeypatch):
    """Workers of a study that are threads of this process."""
    monkeypatch.setattr(parallel.signal, "signal", lambda *_: None)

    @contextlib.contextmanager
    def workers(count, load):
        pairs = [parallel.multiprocessing.Pipe() for _ in range(count)]
        running = [threading.Thread(target=parallel._serve, args=(theirs, load)) for _, theirs in pairs]
        for thread in running:
            thread.start()
        try:
            yield [mine for mine, _ in pairs]
        finally:
            for mine, _ in pairs:
                mine.close()
            for thread in running:
                thread.join()

    monkeypatch.setattr(parallel, "_workers", workers)


def test_a_study_is_spread_and_goes_on_after_an_order_that_fails(threads, tmp_path, capsys):
    asked = dataclasses.replace(LAB.settings, limit=1)
    todo = parallel.orders("", ["kl", "longbench", "spread"], {"snapkv": METHODS["snapkv"]}, asked)
    done = []
    with pytest.raises(MiniKVError, match=r"longbench under full: This task needs .*; longbench under snapkv") as error:
        parallel.run_orders(todo, 1, loaded, "tiny", tmp_path, "", lambda *x: done.append(x))
    assert one_line(error) and done == [(i + 1, len(todo)) for i in range(len(todo))] and len(todo) == 5
    assert "Traceback" not in capsys.readouterr().err
    rows = timing.read_results(tmp_path / "results.json", "quality")["rows"]
    assert {(row["task"], row["method"]) for row in rows if row["task"] in ("kl", "spread")} == {
        ("kl", "full"), ("kl", "snapkv"), ("spread", "full")
    }  # fmt: skip
    # What is there is not measured again.
    before = (tmp_path / store.ITEMS).read_bytes()
    parallel.run_orders([x for x in todo if x.title != "longbench"], 2, loaded, "tiny", tmp_path, "")
    assert (tmp_path / store.ITEMS).read_bytes() == before


def test_a_mistake_of_ours_in_one_order_is_told_and_others_go_on(threads, tmp_path, monkeypatch, capsys):
    def measured(lab, title, methods, done):
        if title == "spread":
            raise ZeroDivisionError("of\nours")
        yield [SOUND]

    monkeypatch.setattr(run, "measured", measured)
    todo = parallel.orders("", ["spread", "persistence"], {}, LAB.settings)
    with pytest.raises(MiniKVError, match=r"^Not measured: spread under full: ZeroDivisionError: of$"):
        parallel.run_orders(todo, 1, loaded, "tiny", tmp_path, "")
    assert "Traceback" in capsys.readouterr().err and json.loads((tmp_path / store.ITEMS).read_text()) == SOUND


def test_a_study_that_is_stopped_writes_what_it_has(threads, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "measured", lambda *_: iter([[SOUND]]))

    def stopped(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        parallel.run_orders(parallel.orders("", ["spread"], {}, LAB.settings), 1, loaded, "tiny", tmp_path, "", stopped)
    assert timing.read_results(tmp_path / "results.json")["rows"][0]["task"] == "lines"


# ---- what tasks make of figures ------------------------------------------------------------------------------------


def _answered(follow, right: bool):
    """Figures of a follow whose every next token is predicted, or none."""
    tokens = np.array(follow.tokens)
    best = np.append(tokens[1:], 0) if right else np.zeros_like(tokens)
    zero = np.zeros(len(tokens))
    return engine.Figures(zero, best == tokens, zero + 0.5, zero, best)


@pytest.mark.parametrize("title", ["lines", "shared", "aware", "passkey", "needle"])
def test_right_answers_count(title):
    asked = lab(lengths=(3000,), limit=1)
    reduce = TASKS[title].measure.keywords["reduce"]
    found = {}
    for case in TASKS[title].cases(asked):
        values = {x: reduce(asked, case, [_answered(f, x) for f in case.follows]) for x in (True, False)}
        found |= values[True]
        assert set(values[True]) == set(values[False]) <= set(TASKS[title].metrics)
        for metric in values[True]:
            assert all(x == (0.5 if metric.endswith("nll") else 1.0) for x in values[True][metric])
            assert metric.endswith("nll") or all(x < 0.5 for x in values[False][metric])
    assert set(found) == set(TASKS[title].metrics)


def test_methods_at_equal_bytes(monkeypatch):
    monkeypatch.setattr(study, "SHARES", (0.3,))
    model = dataclasses.replace(shape_of("qwen2.5-1.5b"), num_layers=2)
    methods = study.at_equal_bytes(model, task.Settings(lengths=(1024,), new_tokens=128))
    names = {label.partition(":")[0] for label in methods}
    assert {"full", "kivi", "minikv", "minikv_plus", "mikv", "h2o"} <= names and len(methods) > 10
