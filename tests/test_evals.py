"""The evaluation's machinery: reading on equals decode_step, tasks ask what they say, figures and runs are sound."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CONFIG, METHODS, MODEL, tokens
from test_flags import FLAGS
from tiny import lab

from minikv_jax import ConfigError, MiniKVError, decode_step, nbytes, prefill, presets
from minikv_jax.bench import timing
from minikv_jax.evals import engine, known, parallel, picture, records, run, shared, store, summary, task, texts
from minikv_jax.evals.kl import TASK as KL
from minikv_jax.evals.tasks import METRICS, TASKS, by_names
from minikv_jax.report import cache_report

# One shape for all that runs a model: programs are compiled once.
LAB = lab(lengths=(150,))

# ---- engine --------------------------------------------------------------------------------------------------------


def test_one_reading_serves_all_and_goes_on_as_decode_step():
    prompt, more, other = tokens(2, 40), tokens(2, 20), tokens(2, 3)  # 20 tokens fill a window of 16
    lengths, counts = jnp.array([40, 31]), np.array([20, 4])
    chosen = {name: METHODS[name].replace(generated_capacity=20) for name in ("minikv", "mikv")}
    follows = [(np.asarray(more), counts), (np.asarray(other), np.array([3, 1]))]
    hidden = engine.read_follows(MODEL, prompt, lengths, chosen, follows)
    step = jax.jit(decode_step)
    for name, config in chosen.items():
        for (row_tokens, row_counts), found in zip(follows, hidden[name], strict=True):
            _, cache = prefill(MODEL, prompt, lengths, config)
            found = np.asarray(MODEL.logits(found))
            for i in range(row_tokens.shape[1]):
                expected, cache = step(MODEL, cache, row_tokens[:, i])
                for row in np.flatnonzero(i < row_counts):
                    np.testing.assert_allclose(found[row, i], expected[row], atol=1e-3)


def test_a_kept_cache_goes_on_as_decode_step():
    prompt, more = tokens(2, 40), tokens(2, 20)
    lengths, counts = jnp.array([40, 31]), np.array([20, 4])
    chosen = {name: METHODS[name].replace(generated_capacity=20) for name in ("minikv", "snapkv")}
    read = engine.read_prompt(MODEL, prompt, lengths, chosen)
    logits, cache = prefill(MODEL, prompt, lengths, chosen["minikv"])
    np.testing.assert_allclose(read.logits, logits, atol=1e-4)
    hidden, after = engine.read_on(MODEL, read.caches["minikv"], more, jnp.asarray(counts))
    assert after.lengths.tolist() == [60, 35] and after.room.tolist() == [0, 16]
    step, found = jax.jit(decode_step), np.asarray(MODEL.logits(hidden))
    for i in range(more.shape[1]):
        expected, cache = step(MODEL, cache, more[:, i])
        for row in np.flatnonzero(i < counts):
            np.testing.assert_allclose(found[row, i], expected[row], atol=1e-3)


@pytest.mark.parametrize("name", ["minikv", "pyramidkv", "mikv"])
def test_weights_are_those_of_what_prefill_makes(name):
    config = METHODS[name].replace(generated_capacity=8, dtype="bfloat16")
    model = type(MODEL)(dataclasses.replace(CONFIG, num_layers=3), rngs=nnx.Rngs(params=1))
    _, cache = prefill(model, tokens(1, 60), jnp.array([60]), config)
    total = cache_report(dataclasses.replace(cache, lengths=jnp.array([68]))).total  # once the room is used
    weight = engine.weight_of(model.config, config, 60, 8)
    # But for the counters of the batch, four bytes each.
    counters = nbytes((cache.lengths, cache.room, cache.prompts))
    assert weight.bytes == total.bytes_held - counters == nbytes(cache.layers)
    assert weight.bits_per_element == 16 * weight.bytes / total.bytes_bfloat16 > weight.bits_of_tiers
    # Codes of 2 bits; scale and minimum of 16 bits for each group of 8.
    assert name != "minikv" or weight.bits_of_tiers == 3 * weight.bits_of_codes > 0


def test_known_answers_are_what_greedy_decoding_writes():
    prompts, questions = tokens(2, 150).tolist(), tokens(2, 6).tolist()
    cases = [task.Case(str(i), "g", tuple(prompt)) for i, prompt in enumerate(prompts)]
    cache = known.read_cases(LAB, cases, {}, 10).caches["full"]
    padded = jnp.array([[*question, 0, 0, 0, 0] for question in questions])
    hidden, cache = engine.read_on(MODEL, cache, padded, jnp.array([6, 6]))
    written, _ = engine.write_on(MODEL, cache, engine.best(MODEL, hidden, jnp.array([5, 5])), 4)

    def exact(lab, case, found):
        return {"x": [known.answers(lab, case.follows[0], found[0])[0].digits]}

    def outcome(answers):
        follows = [task.Follow((*q, *answer), ((6, 10),)) for q, answer in zip(questions, answers)]
        asked = [dataclasses.replace(case, follows=(follow,)) for case, follow in zip(cases, follows)]
        return [one.values["x"][0] for one in known.measure(LAB, asked, {"full": presets.full()}, exact)["full"]]

    right = written.tolist()
    assert outcome(right) == [1.0, 1.0]
    second_is_wrong = [right[0], [*right[1][:2], (right[1][2] + 1) % CONFIG.vocab_size, right[1][3]]]
    assert outcome(second_is_wrong)[0] == 1.0 > outcome(second_is_wrong)[1]


def test_writing_stops_at_an_end():
    cases = [task.Case("", "g", tuple(prompt)) for prompt in tokens(2, 150).tolist()]
    cache = known.read_cases(LAB, cases, {}, 10).caches["full"]
    first = jnp.array([3, 5])
    free, _ = engine.write_on(MODEL, cache, first, 6)
    end = int(free[0, 2])
    ended, _ = engine.write_on(MODEL, cache, first, 6, (end,))
    at = free[0].tolist().index(end)
    assert ended[0].tolist() == [*free[0, :at], *[end] * (6 - at)]


# ---- tasks ---------------------------------------------------------------------------------------------------------


@given(st.integers(24, 300), st.integers(1, 8), st.integers(0, 2**32))
def test_records_hold_what_they_ask_for(lines, questions, seed):
    import random

    drawn = records.record(random.Random(seed), records.CODES, lines, questions)
    assert len(drawn.questions) == questions
    for key, value, depth in drawn.questions:
        line = f"The code of {key} is {value}."
        assert drawn.text.count(line) == 1  # never among the worked examples
        assert drawn.text.splitlines().index(line) - 2 == round(depth * lines)
    assert len(drawn.text.splitlines()) == 2 + lines + min(records.EXAMPLES, lines - questions)


def test_questions_end_where_the_number_begins():
    for form, lead in ((records.CODES, " "), (records.REGISTER, "")):
        follow = records.question(lab(), form, "lamp", "12345", 0.5)
        ((start, stop),) = follow.answers
        text = lab().tokenizer.decode(follow.tokens)
        assert text[start:stop] == lead + "12345" and stop == len(text)


def test_cases_of_a_split_are_its_own_and_repeat():
    def names_and_prompts(title, split, seed=0):
        return {case.name: case.prompt for case in TASKS[title].cases(lab(split=split, seed=seed, lengths=(3000,)))}

    for title in ("kl", "lines", "shared", "aware", "passkey", "needle"):
        dev, test = names_and_prompts(title, "dev"), names_and_prompts(title, "test")
        assert dev and dev == names_and_prompts(title, "dev")
        assert not set(dev.values()) & set(test.values())
        assert dev != names_and_prompts(title, "dev", seed=1)
    assert len({texts.split_of(f"python/{i}") for i in range(20)}) == 2
    assert {texts.split_of(f"perl/{i}") for i in range(20)} == {"dev"}  # the default was chosen on them


def test_shared_context_is_compressed_before_and_with_the_question():
    asked = lab(lengths=(3000,), limit=2)
    cases = [case for case in (*shared.TASK.cases(asked), *shared.AWARE.cases(asked)) if "/0" in case.name]
    kinds = {case.about["batch"].partition(", ")[2] for case in cases}
    assert kinds == {"before", "before, turns", "aware", "aware, turns"}
    before = next(case for case in cases if case.about["batch"].endswith("before"))
    assert len(before.follows) == 8
    decode = lab().tokenizer.decode
    for case, follow in zip([c for c in cases if c.about["batch"].endswith("aware")], before.follows, strict=True):
        # Prompt and follow together are the same text, cut one token before the answer instead of before the question.
        assert decode(case.prompt + case.follows[0].tokens) == decode(before.prompt + follow.tokens)
        assert case.follows[0].answers == ((1, 1 + len(" 12345")),)
    turns = next(case for case in cases if case.about["batch"].endswith("before, turns")).follows[0]
    assert len(turns.answers) == 4
    for start, stop in turns.answers:
        assert decode(turns.tokens[start:stop]).strip().isdigit()


def test_a_needle_stands_at_its_depth():
    for case in TASKS["needle"].cases(lab(lengths=(900,), limit=1)):
        text = lab().tokenizer.decode(case.prompt)
        at = text.index("one of the special numbers") / len(text)
        assert abs(at - min(case.follows[0].depth, 0.9)) < 0.12
        assert lab().tokenizer.decode(case.follows[0].tokens)[-7:] in text


def test_the_full_cache_is_no_distance_from_itself():
    measured = KL.measure(LAB, KL.cases(LAB), {"full": presets.full(), "snapkv": METHODS["snapkv"]})
    for one in measured["full"]:
        assert one.values == {"kl": 0, "kl_p99": 0, "top1": 1, "ppl": 0}
    assert all(one.values["kl"] > 0 for one in measured["snapkv"])


@pytest.mark.parametrize("title", ["running", "layers", "spread", "persistence"])
def test_looking_inside(title):
    asked = {"full": presets.full(), "snapkv": METHODS["snapkv"]}
    ten = LAB if title == "layers" else lab(lengths=(150,), new_tokens=10)  # tokens after the prompt, in either case
    measured = TASKS[title].measure(ten, TASKS[title].cases(ten), asked)
    values = {name: column[0].values for name, column in measured.items()}
    if title == "running":
        assert (
            values["full"]["run_kl"] == values["full"]["run_ppl"] == 0
            and values["full"]["run_top1"] == 1
            and values["full"]["run_same"] == 9
        )
        assert len(values["snapkv"]["run_kl_path"]) == 8 and values["snapkv"]["run_kl"] > 0
    elif title == "layers":
        assert values["full"]["attention_error"] == [0] and 0 < values["snapkv"]["attention_error"][0] < 1
    else:
        (figures,) = values.values()
        assert all(0 < x <= 1 for profile in figures.values() for x in profile)
        assert set(values) == {"full"}


@pytest.mark.slow
@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_of_jax_changes_no_figure(flag):
    methods = {"full": presets.full(), "two_tiers": METHODS["two_tiers"], "mikv": METHODS["mikv"]}
    asked = lab(lengths=(150,), new_tokens=20, limit=1)

    def figures():
        found = {}
        for title in ("kl", "running", "passkey", "layers", "spread", "persistence"):
            mine = methods if TASKS[title].compares else {"full": presets.full()}
            for items in run.measured(asked, title, mine, set()):
                found |= {(title, item["case"], item["method"]): item["values"] for item in items}
        return found

    plain = figures()
    with FLAGS[flag]():
        jax.clear_caches()  # everything is traced again
        flagged = figures()
    assert plain.keys() == flagged.keys()
    for key, values in plain.items():
        for metric, value in values.items():
            assert flagged[key][metric] == pytest.approx(value, abs=1e-3), (key, metric)


# ---- figures -------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.floats(-5, 5), min_size=1, max_size=4), min_size=2, max_size=12))
def test_an_interval_holds_its_mean_and_stays_within_the_cases(cases):
    mean, low, high = summary.interval(cases)
    assert mean == pytest.approx(np.mean([x for case in cases for x in case]), abs=1e-9)
    means = [np.mean(x) for x in cases]
    assert min(means) - 1e-9 <= low <= high <= max(means) + 1e-9


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        _, low, high = summary.interval([[x] for x in rng.normal(1.0, 1.0, 30)])
        inside += low <= 1.0 <= high
    assert 0.88 <= inside / 200 <= 0.99
    assert math.isnan(summary.interval([[3.0]])[1]) and summary.interval([[0.0, 1.0]])[1] == 0


def _item(method, value, case="c", metric="lines", **more):
    weights = {"group": "g", "bytes": 10, "bits_per_element": 4.0, "bits_of_tiers": 3.0, "bits_of_codes": 2.0}
    return {"task": "t", "case": case, "method": method, "values": {metric: value}, **weights, **more}


def test_what_the_full_cache_cannot_do_is_said():
    rows = summary.rows([_item("full", [0, 1, 0]), _item("kivi", [0, 1, 1])], METRICS, "m")
    assert all(row["cannot"] for row in rows)
    table = summary.table(rows, METRICS)
    assert table.count("model cannot") == 2
    rows = summary.rows([_item("full", [1, 1, 0]), _item("kivi", [0, 0, 1])], METRICS, "m")
    assert not any("cannot" in row for row in rows)
    assert "| `kivi` | 4.00 | 3.00 | 2.00 | 0.00 | 33.3 % (0.0 to 100.0) |" in summary.table(rows, METRICS)


@pytest.mark.parametrize(
    ("metric", "shown"),
    [("kl", "0.6 (0.2 to 1; median 0.6, worst 1)"), ("top1", "0.6 (0.2 to 1; median 0.6, worst 0.2)"),
     ("lines", "60.0 % (20.0 to 100.0; median 60.0, worst 20.0)")],
)  # fmt: skip
def test_a_mean_stands_beside_its_median_and_its_worst_case(metric, shown):
    rows = summary.rows([_item("full", x, case, metric) for x, case in ((0.2, "a"), (1.0, "b"))], METRICS, "m")
    assert shown in summary.table(rows, METRICS)


def test_a_table_says_what_the_first_metric_weighs():
    items = [_item(name, value, metric=metric, **more) for name, value, metric, more in (
        ("full", [1, 1], "lines", {"bits_per_element": 16.0}),
        ("full", 0.0, "kl", {"bits_per_element": 16.0}),
        ("kivi", [1, 0], "lines", {"bits_per_element": 5.0, "bytes": 3 << 20}),
        ("kivi", 0.5, "kl", {}),
        ("mikv", [0, 0], "lines", {"bits_per_element": 6.0}),
    )]  # fmt: skip
    rows = summary.rows(items, METRICS, "m")
    full, mikv, kivi = summary.table(rows, METRICS, ("kl", "lines")).splitlines()[2:]
    assert "`full`" in full and mikv.startswith("| `mikv` | 6.00 |") and "| - |" in mikv
    assert kivi.startswith("| `kivi` | 4.00 |")
    assert "| `kivi` | 5.00 | 3.00 | 2.00 | 3.00 | 50.0 %" in summary.table(rows, METRICS, ("lines", "kl"))


def test_growth_is_of_the_mean_likelihood():
    items = [_item("full", 0.0, metric="ppl"), _item("kivi", math.log(1.1), metric="ppl")]
    row = next(row for row in summary.rows(items, METRICS, "m") if row["method"] == "kivi")
    assert row["value"] == pytest.approx(0.1) and row["low"] is None
    profile = summary.rows(
        [_item("full", [1.0, 3.0], metric="spread"), _item("full", [2.0, 4.0], "d", "spread")], METRICS, "m"
    )
    assert profile[0]["profile"] == [1.5, 3.5]


# ---- runs ----------------------------------------------------------------------------------------------------------


def _run(out, tasks="kl,layers"):
    return run.run(LAB, "tiny", {"snapkv": METHODS["snapkv"]}, by_names(tasks), out, "a command")


def test_a_run_writes_everything_and_goes_on_after_a_kill(tmp_path, monkeypatch):
    rows = _run(tmp_path / "whole")
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert names == {"items.jsonl", "run.json", "results.json", "table.md", "quality.png"}
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert results["benchmark"] == "quality" and results["rows"] == rows
    wanted = {"model", "case", "task", "method", "bits_per_element", "bytes", "value", "low", "high", "median", "worst"}
    assert all(wanted <= row.keys() for row in rows)

    # Killed in the midst of a write, then started again. Pictures were drawn once above.
    monkeypatch.setattr(run.picture, "save_quality", lambda *_: None)
    add, calls = store.add, []

    def killed(out, items):
        calls.append(items)
        if len(calls) == 2:
            with (out / store.ITEMS).open("a") as file:
                file.write(json.dumps(items[0])[:30])
            raise KeyboardInterrupt
        add(out, items)

    monkeypatch.setattr(store, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "cut")
    monkeypatch.setattr(store, "add", add)
    assert (tmp_path / "cut" / "results.json").exists()  # what was there when it was killed
    assert _run(tmp_path / "cut") == rows
    # Nothing is measured twice.
    again = (tmp_path / "cut" / "items.jsonl").read_bytes()
    assert _run(tmp_path / "cut") == rows
    assert (tmp_path / "cut" / "items.jsonl").read_bytes() == again


@pytest.mark.slow
def test_processes_measure_what_one_does(tmp_path, monkeypatch):
    asked = dataclasses.replace(LAB.settings, limit=1)
    methods = {"snapkv": METHODS["snapkv"]}
    todo = parallel.orders("first", ["kl"], methods | {"minikv": METHODS["minikv"]}, asked)
    assert [list(order.methods) for order in todo] == [["full"], ["snapkv"], ["minikv"]]
    todo = todo[:2]
    todo = todo[1:] + parallel.orders("second", ["spread", "longbench"], methods, asked)[:2]
    with pytest.raises(MiniKVError, match="longbench under full"), monkeypatch.context() as patch:  # it has no data
        patch.setattr(timing, "environment", lambda: {"device": "where nothing is measured"})
        parallel.run_orders(todo, 2, tiny.loaded, "tiny", tmp_path / "many", "a command")
    results = json.loads((tmp_path / "many" / "results.json").read_text())
    rows = results["rows"]
    assert results["device"] == jax.devices()[0].device_kind
    one = run.run(
        dataclasses.replace(LAB, settings=asked), "tiny", methods, by_names("kl,spread"), tmp_path / "one", ""
    )
    known_rows = {(row["task"], row["method"], row["case"]): row for row in one}
    assert {(row["task"], row["method"]) for row in rows} == {
        *((metric, method) for metric in KL.metrics for method in methods),
        *((metric, "full") for metric in TASKS["spread"].metrics),
    }
    for row in rows:
        expected = known_rows[row["task"], row["method"], row["case"]]
        assert row["value"] == pytest.approx(expected["value"], rel=1e-3, abs=1e-6)
        assert row["bytes"] == expected["bytes"]
    # Nothing is left to measure.
    again = parallel.run_orders(todo[:-1], 1, tiny.loaded, "tiny", tmp_path / "many", "a command")
    assert again == rows


def test_retrieval_is_mapped_over_depth_and_length(tmp_path):
    items = [
        _item(
            method,
            value,
            f"{length}/{depth}",
            "passkey",
            group=f"{length}/{depth}",
            place={"length": length, "depth": depth},
        )
        for method, value in (("full", 1.0), ("kivi", 0.5))
        for length in (1024, 2048)
        for depth in (0.0, 0.5)
    ]
    rows = summary.rows(items, METRICS, "m")
    assert sum("depth" in row for row in rows) == 8  # and one row a method over all
    assert picture.save_heatmap(rows, tmp_path / "map.svg") is not None
    assert "passkey, kivi" in (tmp_path / "map.svg").read_text()
    assert picture.save_heatmap([], tmp_path / "none.png") is None and not (tmp_path / "none.png").exists()


def test_paths_of_long_answers_are_drawn(tmp_path):
    items = [_item(method, [0.1, 0.2, 0.4], metric="run_kl_path") for method in ("full", "kivi", "minikv")]
    rows = summary.rows(items, METRICS, "m")
    drawn = picture.save_paths(rows, tmp_path / "paths.svg").read_text()
    assert "kivi (4.00 bits)" in drawn and "minikv (4.00 bits)" in drawn and "full (" not in drawn
    assert picture.save_paths([], tmp_path / "none.png") is None and not (tmp_path / "none.png").exists()


def test_another_run_in_the_same_folder_is_refused(tmp_path):
    _run(tmp_path, tasks="kl")
    with pytest.raises(ConfigError, match="seed=0"):
        run.run(lab(seed=1), "tiny", {}, by_names("kl"), tmp_path, "")
    (tmp_path / "items.jsonl").write_text('{"task": \n{}\n')
    with pytest.raises(ConfigError, match="line 1 is damaged"):
        _run(tmp_path, tasks="kl")


def test_a_folder_holds_items_of_one_kind(tmp_path):
    first = run.identity("m", task.Settings(seed=1, dtype="bfloat16"))
    assert store.held(tmp_path / "new", first) == [] and not (tmp_path / "new").exists()
    store.begin(tmp_path, first)
    for other in (task.Settings(seed=2, dtype="bfloat16"), task.Settings(seed=1), task.Settings(seed=1, split="test")):
        with pytest.raises(ConfigError, match="another folder"):
            store.held(tmp_path, run.identity("m", other))
    assert store.held(tmp_path, first) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        store.held(tmp_path / "file" / "out", {})


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"limit": 0}, "limit=0"),
        ({"lengths": ()}, "lengths"),
        ({"lengths": (4,)}, "16 tokens"),
        ({"split": "train"}, "train"),
        ({"texts": "no/such"}, "no/such"),
    ],
)
def test_settings_are_checked(changes, named):
    from pathlib import Path

    changes = {k: Path(v) if k == "texts" else v for k, v in changes.items()}
    with pytest.raises(ConfigError, match=named):
        lab(**changes)


def test_texts_of_ones_own(tmp_path):
    with pytest.raises(ConfigError, match=r"no \.txt file"):
        texts.documents(tmp_path)
    (tmp_path / "novel__one.txt").write_text("A line.\n" * 200)
    (tmp_path / "two.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"two\.txt"):
        texts.documents(tmp_path)
    (tmp_path / "two.txt").unlink()
    assert "novel/one" in [document.name for document in texts.documents(tmp_path)]
    with pytest.raises(ConfigError, match="tokens"):
        list(texts.passages(lab(texts=tmp_path), 10**7))


def test_unknown_tasks_are_named():
    with pytest.raises(ConfigError, match="'klx'"):
        by_names("kl,klx")


@settings(max_examples=20)
@given(st.sampled_from(["kivi", "minikv", "full"]), st.integers(1, 400))
def test_methods_in_one_line(name, residual):
    line = f"{name},minikv:heavy=0.1,recent=0.1,clip=[0.9, 1.0],kivi:residual={32 * residual}"
    parsed = presets.parse(line)
    assert next(iter(parsed)) == name and len(parsed) == 3
    assert parsed[f"kivi:residual={32 * residual}"] == presets.kivi(residual=32 * residual)
    assert parsed["minikv:heavy=0.1,recent=0.1,clip=[0.9, 1.0]"] == presets.minikv(0.1, 0.1, clip=(0.9, 1.0))


@pytest.mark.parametrize(
    "line, named",
    [
        ("heavy=1", "begins with a setting"),
        ("x", "'x'"),
        ("kivi:residual=", "residual"),
        ("minikv:heavy=[]", "heavy"),
        ("", "''"),
    ],
)
def test_methods_that_are_none(line, named):
    with pytest.raises(ConfigError, match=named):
        presets.parse(line)
