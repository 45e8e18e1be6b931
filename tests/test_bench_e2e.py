"""The end-to-end benchmark at a size for CPUs: its synthetic caches, its rows, and what is made of them."""

import json
import os
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from models import CONFIG, METHODS

from minikv_jax import ConfigError, MiniKVError, prefill
from minikv_jax.bench import decode, e2e, tables, timing
from minikv_jax.models.llama import Llama
from minikv_jax.models.shapes import SHAPES

TINY = CONFIG.replace(head_dim=64, num_layers=2, tie_word_embeddings=False)


@pytest.mark.parametrize(
    "method", ["minikv", *(pytest.param(x, marks=pytest.mark.slow) for x in METHODS if x != "minikv")]
)
def test_a_synthetic_cache_is_like_a_real_one(method):
    config = METHODS[method].replace(prompt_capacity=40, generated_capacity=20)
    model = Llama(CONFIG.replace(num_layers=2), rngs=nnx.Rngs(params=0))
    _, real = prefill(model, jnp.zeros((2, 40), jnp.int32), jnp.array([40, 40]), config)
    shapes = e2e.cache_shapes(model, config, 2, 40)
    made = e2e.synthetic_cache(shapes, e2e.cache_counters(model.config, config, 2, 40))
    chex.assert_trees_all_equal_shapes_and_dtypes(made, real)
    counters = [[x for x in jax.tree.leaves(cache) if x.ndim == 1] for cache in (made, real)]
    chex.assert_trees_all_equal(*counters)
    assert all(bool(jnp.isfinite(x.astype(jnp.float32)).all()) for x in jax.tree.leaves(made))


@pytest.mark.slow
def test_a_case_gives_the_figures_of_its_parts(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    case = e2e.Case("tiny", "minikv", 2, 200, ("decode", "prefill"), steps=3)
    row = e2e.rehearse(case)
    assert row["decode_compile_s"] > row["decode_lower_s"] > 0 and row["prefill_compile_s"] > 0
    turns = []
    row = e2e.measure(case, lambda: turns.append(1))
    assert row["tokens_per_s"] == pytest.approx(2e3 / row["step_ms"]) and row["ttft_s"] > 0
    assert 0 < row["compression_share"] < 1 and turns == [1]
    assert row["weights_bytes"] - row["weights_read_bytes"] == 2 * TINY.vocab_size * TINY.hidden_size
    assert row["planned_bytes"] > row["weights_bytes"] + row["cache_bytes"]


def child(program: str, turn=None) -> dict:
    return e2e._child(["-c", program], os.environ, threading.Lock() if turn is None else turn)


def test_a_process_waits_for_its_turn():
    turn = threading.Lock()
    program = "print('noise'); print('ready', flush=True); input(); print(); print('{\"x\": 1}')"
    with turn, ThreadPoolExecutor(1) as pool:
        row = pool.submit(child, program, turn)
        time.sleep(0.3)
        assert not row.done()
        turn.release()
        assert row.result()["x"] == 1 and 0 < row.result()["gpu_s"] < 10
        turn.acquire()


@pytest.mark.parametrize("program", ["raise SystemExit('too big')", "print('ready', flush=True); input(); 1 / 0"])
def test_a_process_that_fails_says_why_and_ends_its_turn(program):
    turn = threading.Lock()
    assert any(reason in child(program, turn)["failed"] for reason in ("too big", "ZeroDivisionError"))
    assert not turn.locked()


def test_without_a_gpu_nothing_is_started(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(MiniKVError, match="JAX sees none"):
        e2e.run(tmp_path / "e2e.json", jobs=1)


def test_layers_that_are_alike_share_their_memory():
    model = e2e.random_model(TINY, alike=True)
    chex.assert_trees_all_equal_shapes_and_dtypes(model, e2e.model_shapes(TINY))
    assert model.layers[0].gate_up[...] is model.layers[1].gate_up[...]
    assert e2e.random_model(TINY).layers[0].gate_up[...] is not e2e.random_model(TINY).layers[1].gate_up[...]


def test_what_fits_is_counted_in_bytes():
    shape = SHAPES["llama3-8b"]
    full, minikv = (METHODS[name] for name in ("full", "minikv"))
    batches = [e2e.largest_batch(shape, config, 32768, 60 << 30)[0] for config in (full, minikv)]
    assert 12 <= batches[0] <= 15 and batches[1] > 5 * batches[0]
    prompts = [e2e.longest_prompt(SHAPES["llama2-7b"], config, 60 << 30) for config in (full, minikv)]
    assert 100_000 < prompts[0] < 120_000 and prompts[1] > 3 * prompts[0]


def results(folder):
    rows = [
        {"case": case, "model": "llama3-8b", "method": method, "implementation": "minikv_jax", "step_ms": ms,
         "tokens_per_s": 8e3 / ms, "cache_bytes": 2**30, "weights_read_bytes": 2**34, "decode_peak_bytes": peak,
         "planned_bytes": 2**35, "shape": {"B": 8, "S": 32768}, "decode_compile_s": 10.0}
        for case in ("llama3-8b-B8-S32768", "llama3-8b-S32768-largest")
        for method, ms, peak in (("full", 20.0, 2**36), ("minikv", 8.0, 2**35))
    ]  # fmt: skip
    gemm = {"kernel": "gemm", "calls": 225.0, "us": 6000.0, "bytes": 2_700_000_000}
    rows[1]["kernels"] = [gemm, {"kernel": "others", "calls": 9, "us": 8.0}]
    theirs = {"case": rows[0]["case"], "method": e2e.QUANTISED, "implementation": "transformers", "step_ms": 80.0,
              "tokens_per_s": 100.0, "decode_peak_bytes": 2**36, "shape": {"B": 8, "S": 32768}}  # fmt: skip
    rows.append(theirs)
    rows.append({"case": rows[0]["case"], "method": "mikv", "implementation": "minikv_jax", "failed": "Error: too big"})
    rows = [e2e.finish(row, rows, 2.7e12) for row in rows]
    path = folder / "e2e.json"
    about = {"device": "H100", "versions": {"jax": "0.11"}, "date": "2026-01-01", "command": "minikv bench e2e"}
    path.write_text(json.dumps({**about, "copy_bandwidth": 2.7e12, "rows": rows}))
    return path, rows


def test_rows_are_compared_with_the_full_cache(tmp_path):
    _, rows = results(tmp_path)
    assert rows[1]["speedup_vs_full"] == 2.5 and rows[3]["throughput_vs_full"] == 2.5
    assert rows[1]["speedup_vs_quantised_transformers"] == 10 and rows[4]["speedup_vs_full"] == 0.25
    assert rows[1]["peak_saved_share"] == 0.5 and rows[1]["peak_over_planned"] == 1
    assert rows[1]["share_of_floor"] == pytest.approx((2**34 + 2**30) / 2.7e12 / 8e-3, rel=1e-3)


def test_results_become_a_table_and_a_picture(tmp_path):
    path, _ = results(tmp_path)
    text = tables.e2e(tmp_path)
    assert "2.50" in text and "gemm" in text and "1,000 µs" in text and "mikv`" not in text
    assert "10.0 (8 x 32,768)" in text
    e2e.main(["--plot", str(path), str(tmp_path / "e2e.png")])
    assert (tmp_path / "e2e.png").read_bytes().startswith(b"\x89PNG")


def test_cases_are_chosen_by_what_their_label_holds(tmp_path):
    with pytest.raises(ConfigError, match="names no case"):
        e2e.run(tmp_path / "e2e.json", ["no such case"])
    assert len({(case.name, case.method, case.parts) for case in e2e.CASES}) == len(e2e.CASES)


def test_rows_of_decode_are_chosen_by_their_label(tmp_path):
    with pytest.raises(ConfigError, match="names no row"):
        decode.run(tmp_path / "decode.json", ["no such row"])
    labels = [m.label for wanted in decode.planned(["A*groups of 16", "mosaic"]).values() for m in wanted]
    assert labels == ["A triton 2-bit, groups of 16", "A mosaic_gpu 2-bit", "C mosaic_gpu 2-bit"]
    everything = [m.label for wanted in decode.planned().values() for m in wanted]
    assert len(set(everything)) == len(everything)


def test_bytes_of_products_are_read_from_the_program():
    text = """
  %p.1 = bf16[8,64]{1,0} parameter(0)
  %weights = bf16[64,256]{1,0} get-tuple-element(%p), index=1
  %gemm_fusion_dot.7 = bf16[8,256]{1,0} fusion(%p.1, %weights), kind=kCustom, calls=%gemm_fusion_dot.7_computation
  %add = bf16[8,256]{1,0} fusion(%p.1), kind=kLoop"""
    assert e2e.product_bytes(text) == {"gemm_fusion_dot_7": 2 * (8 * 64 + 64 * 256 + 8 * 256)}


def test_a_part_that_fails_leaves_the_others_figures():
    old = {"case": "llama3-8b-B8-S32768", "method": "full", "shape": {"B": 8}, "step_ms": 9.0}
    first = {"case": "llama3-8b-B8-S32768", "method": "minikv", "failed": "no"}
    rows = e2e._merged([old], first)
    assert rows == [first, old]  # in the table's order
    rows = e2e._merged(rows, {"case": old["case"], "method": "full", "failed": "too big"})
    assert rows[1] == old | {"failed_part": "too big"}
    assert e2e._merged(rows, old | {"step_ms": 8.0})[1] == old | {"step_ms": 8.0}


def test_clock_and_power_are_reported_where_the_driver_can_be_asked(monkeypatch):
    driver = types.SimpleNamespace(
        NVML_CLOCK_SM=1,
        NVMLError=OSError,
        nvmlClocksEventReasonSwPowerCap=4,
        nvmlClocksEventReasonHwPowerBrakeSlowdown=128,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetClockInfo=lambda handle, kind: {1: 1725}[kind],
        nvmlDeviceGetPowerUsage=lambda handle: 698_500,
        nvmlDeviceGetCurrentClocksEventReasons=lambda handle: 4 | 1024,
    )
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    read = timing.sensor()
    assert read is not None and read() == (1725.0, 698.5, True)
    driver.nvmlDeviceGetCurrentClocksEventReasons = lambda handle: 8 | 1024
    assert read() == (1725.0, 698.5, False)

    def refuse(handle):
        raise OSError("not supported")

    driver.nvmlDeviceGetPowerUsage = refuse
    assert timing.sensor() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as if it were not installed
    assert timing.sensor() is None
