"""Benchmarks as far as a CPU can run them: what is measured is replaced, what becomes of it is not."""

import io
import itertools
import json
import sys
import threading

import jax.numpy as jnp
import pytest
from models import CONFIG

from minikv_jax import ConfigError, MiniKVError
from minikv_jax.bench import cpu, decode, e2e, timing

ABOUT = {"device": "a GPU", "versions": {}}


def test_a_step_takes_time_and_a_copy_has_a_bandwidth():
    assert timing.device_seconds(lambda x, y: x * y, jnp.ones(8), jnp.ones(8), steps=2, repeats=2) > 0
    assert timing.copy_bandwidth(1 << 12) > 0


# ---- whole models --------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch):
    """End-to-end rows without a GPU: each case that was asked for, and how its processes were started."""
    rows = []

    def child(command, settings, turn, start):
        with turn:
            rows.append(command)
        if "ceilings" in command:
            return {"copy_bandwidth": 1e12, "gpu_s": 1.0, **ABOUT}
        if command[-2] == "rehearse":
            return {"decode_compile_s": 1.0, "gpu_s": 1.0}
        return {"step_ms": 2.0, "tokens_per_s": 500.0, "shape": {"B": 1, "S": 4096}, "gpu_s": 2.0}

    monkeypatch.setattr(e2e, "_child", child)
    return rows


def test_cases_that_are_chosen_are_measured_and_join_those_there(measured, tmp_path, capsys):
    out = tmp_path / "e2e.json"
    e2e.run(out, ["B1-S4096 minikv", "B1-S4096 full"], jobs=2)
    rows = timing.read_results(out, "e2e")["rows"]
    assert [(row["case"], row["method"], row["gpu_s"]) for row in rows] == [
        ("llama3-8b-B1-S4096", "minikv", 3.0), ("llama3-8b-B1-S4096", "full", 3.0)
    ]  # fmt: skip
    assert rows[0]["speedup_vs_full"] == 1 and "500.0 tokens/s" in capsys.readouterr().out
    e2e.run(out, ["B1-S131072 minikv decode"], jobs=1)
    assert len(timing.read_results(out, "e2e")["rows"]) == 3
    out.write_text("{}")
    with pytest.raises(ConfigError, match="no results file"):
        e2e.run(out, ["B1-S4096 minikv"])


def test_a_part_that_fails_is_a_row_that_says_so(measured, tmp_path, monkeypatch, capsys):
    child = e2e._child

    def failing(command, *rest):
        return {"failed": "too big"} if "rehearse" in command else child(command, *rest)

    monkeypatch.setattr(e2e, "_child", failing)
    e2e.run(tmp_path / "e2e.json", ["B1-S4096 full"])
    assert timing.read_results(tmp_path / "e2e.json")["rows"][0]["failed"] == "rehearse: too big"
    assert "FAILED rehearse: too big" in capsys.readouterr().out


def test_an_interrupted_benchmark_begins_no_other_case(measured, tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    begun = []
    monkeypatch.setattr(e2e, "_row", lambda case, *_: begun.append(case) or {"case": case.name, "method": case.method})
    monkeypatch.setattr(e2e, "write_results", stopped)
    with pytest.raises(KeyboardInterrupt):
        e2e.run(tmp_path / "e2e.json", jobs=1)
    assert len(begun) < len(e2e.CASES)


def test_rows_of_transformers_come_from_another_program(monkeypatch):
    commands = []
    monkeypatch.setattr(e2e, "_child", lambda command, *_: commands.append(command) or {"step_ms": 4.0, "gpu_s": 1.0})
    case = e2e.Case("llama3-8b", "transformers", 8, 1024)
    row = e2e._row(case, {}, threading.Lock(), e2e.Workers(1))
    assert row["tokens_per_s"] == 2000 and row["implementation"] == "transformers"
    about = json.loads(commands[0][1])
    assert about["cache"] == "dynamic" and about["shape"]["num_key_value_heads"] == 8 and about["batch"] == 8
    quantised = e2e._row(e2e.Case("llama3-8b", e2e.QUANTISED, 8, 1024), {}, threading.Lock(), e2e.Workers(1))
    assert "optimum-quanto" in quantised.get("failed", "optimum-quanto")


def test_a_model_file_of_another_shape_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(e2e, "open_checkpoint", lambda _: type("Checkpoint", (), {"config": CONFIG}))
    with pytest.raises(ConfigError, match=r"not of the shape of qwen2\.5-1\.5b"):
        e2e._chosen((), tmp_path / "model.gguf")
    monkeypatch.setattr(
        e2e, "open_checkpoint", lambda _: type("Checkpoint", (), {"config": e2e.shape_of("qwen2.5-1.5b")})
    )
    chosen = e2e._chosen(("qwen2.5-1.5b-B1 ", "llama3-8b-B1-S4096 full"), tmp_path / "model.gguf")
    assert {case.model: case.file is not None for case in chosen}["llama3-8b"] is False


def test_a_process_waits_only_while_its_benchmark_is_there(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(MiniKVError, match="is gone"):
        e2e._take_turn()
    with pytest.raises(MiniKVError, match="JAX sees none"):
        e2e.ceilings()
    monkeypatch.setattr(e2e, "measure", lambda case, turn: {"case": case.label})
    case = e2e.Case("llama3-8b", "full", 1, 64, ("decode", "prefill"))
    e2e.main(["measure", json.dumps(vars(case))])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"case": case.label}


@pytest.mark.parametrize("arguments", [[], ["measure"], ["measure", "{"], ["nothing"], ["--plot", "x"]])
def test_parts_that_are_none_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        e2e.main(arguments)
    assert ended.value.code == 2


def test_kernels_of_a_step_are_summed_by_name():
    kernels = [("gemm", 4e-6), ("gemm", 6e-6), ("small", 1e-7)]
    rows = e2e._by_name(kernels, 2, {"gemm": 100})
    assert rows[0] == {"kernel": "gemm", "calls": 1.0, "us": pytest.approx(5.0), "bytes": 100}
    assert rows[1] == {"kernel": "others", "calls": 0.5, "us": pytest.approx(0.05)}


# ---- attention over codes ------------------------------------------------------------------------------------------


def test_rows_of_decode_join_those_there(tmp_path, monkeypatch, capsys):
    times = itertools.count(1)
    for name in ("baseline_seconds", "packed_seconds", "dense_seconds"):
        monkeypatch.setattr(decode, name, lambda *_, **__: {"us": float(next(times)), "bytes": 10**9})
    monkeypatch.setattr(decode, "copy_bandwidth", lambda: 1e12)
    out = tmp_path / "decode.json"
    decode.run(out, ["A triton 2-bit, groups of 16"])
    rows = timing.read_results(out, "decode")["rows"]
    assert rows[0]["implementation"] == "cudnn" and rows[1]["speedup"] == 0.5 and rows[1]["bits_per_element"] > 0
    decode.run(out, ["C mosaic"])
    assert len(timing.read_results(out, "decode")["rows"]) == 4 and "us" in capsys.readouterr().out
    timing.write_results(out, "cpu", "", "", [])
    with pytest.raises(ConfigError, match="'cpu', not of 'decode'"):
        decode.run(out, ["C mosaic"])


# ---- times on a CPU beside transformers ----------------------------------------------------------------------------

CONTENDER = """
import json, sys
print(json.dumps({"versions": {"torch": "9"}}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    print(json.dumps({"prefill_s": 1.0, "token_s": [0.1] * asked["new"], "tokens": [0] * asked["new"]}), flush=True)
"""


def test_another_interpreter_takes_turns(tmp_path, monkeypatch):
    (tmp_path / "_torch_contender.py").write_text(CONTENDER)
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "cpu.py"))
    with cpu._Torch(sys.executable, tmp_path, "dynamic") as child:
        assert child.read() == {"versions": {"torch": "9"}} and child.turn([1, 2], 3)["tokens"] == [0, 0, 0]
    (tmp_path / "_torch_contender.py").write_text("raise SystemExit(1)")
    with cpu._Torch(sys.executable, tmp_path, "dynamic") as child, pytest.raises(MiniKVError, match="process ended"):
        child.turn([1], 1)


@pytest.mark.slow
def test_the_model_is_written_for_transformers(tmp_path):
    from minikv_jax import load

    cpu._export(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_hidden_layers"] == 30 and (tmp_path / "model.safetensors").stat().st_size > 4 * 134e6
    with pytest.raises(MiniKVError, match="tokenizer"):
        load(tmp_path)


def test_a_processor_has_a_name(monkeypatch, tmp_path):
    assert cpu._processor().endswith("cores")
    monkeypatch.setattr(cpu, "Path", lambda _: tmp_path / "none")
    assert cpu._processor().endswith("cores")
