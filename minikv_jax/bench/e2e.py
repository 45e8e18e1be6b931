"""Whole models on one GPU: `minikv bench e2e --out FILE [--only PATTERN ...]`.

Every case runs in a process of its own, because peak memory is a process's: first the real decode loop, sampling
included, then the prompt. Weights are random in bfloat16. The cache that is decoded from is filled with random codes in
the shapes and with the counters that `prefill` would leave (`"cache": "synthetic"`), so that a row costs seconds; time
and memory of the prompt itself are measured where a case says so. New tokens alone count as throughput.

A step's floor is the bytes it must read, all weights but the embedding table and the whole cache, over the bandwidth of
a copy measured in the same run.
"""

import dataclasses
import fnmatch
import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from minikv_jax import allocate, nbytes, presets
from minikv_jax.bench.timing import copy_bandwidth, environment, traced_kernels, write_results
from minikv_jax.cache import KVCache, Shape
from minikv_jax.config import CacheConfig
from minikv_jax.errors import ConfigError
from minikv_jax.generate import Sampling, _chunk_rows, _compress, _decode_loop, _embed, _read_layer, prefill, sample
from minikv_jax.models.config import ModelConfig
from minikv_jax.models.llama import Llama
from minikv_jax.models.shapes import shape_of
from minikv_jax.report import planned_report

GENERATED = 512
_MIB = 1 << 20
_RESERVE = 1 << 30  # what a step needs beside weights and cache, with room for the allocator's fragments
# Prompts up to this many tokens are read a second time, without compilation.
_READ_TWICE = 140_000


@dataclasses.dataclass(frozen=True)
class Case:
    """One row. A batch of 0 is the largest that fits; `longest` predicts the longest prompt that does, beside running.

    `parts` are "decode", "prefill" and "profile"; `steps` of the decode loop are timed three times.
    """

    model: str
    method: str
    batch: int
    prompt: int
    parts: tuple[str, ...] = ("decode",)
    steps: int = 128
    longest: bool = False

    @property
    def name(self) -> str:
        if self.longest:
            return f"{self.model}-longest"
        return f"{self.model}-B{self.batch}-S{self.prompt}" if self.batch else f"{self.model}-S{self.prompt}-largest"


_8B, _7B = "llama3-8b", "llama2-7b"
_BOTH = ("decode", "prefill")
# Most important first. Methods that rescore every token at every step are slow: fewer steps say the same.
CASES = (
    Case(_8B, "minikv", 8, 32768, ("decode", "profile")),
    Case(_8B, "full", 8, 32768, ("decode", "profile")),
    Case(_8B, "minikv", 1, 32768, _BOTH),
    Case(_8B, "full", 1, 32768, _BOTH),
    Case(_8B, "minikv", 0, 32768, steps=64),
    Case(_8B, "full", 0, 32768, steps=64),
    Case(_8B, "minikv", 1, 131072),
    Case(_8B, "full", 1, 131072),
    Case(_8B, "minikv", 1, 4096, _BOTH),
    Case(_8B, "full", 1, 4096, _BOTH),
    Case(_8B, "minikv_plus", 8, 32768),
    Case(_8B, "kivi", 8, 32768),
    Case(_8B, "snapkv", 8, 32768),
    Case(_8B, "minikv_pyramid", 8, 32768),
    Case(_8B, "h2o", 8, 32768, steps=16),
    Case(_8B, "mikv", 8, 32768, steps=16),
    Case(_8B, "transformers", 8, 32768),
    Case(_8B, "transformers-quanto-2bit", 8, 32768),
    Case(_8B, "minikv", 8, 32768, ("prefill",)),
    Case(_8B, "full", 8, 32768, ("prefill",)),
    Case(_7B, "full", 1, 65536, longest=True),
    Case(_7B, "minikv", 1, 400_000, _BOTH, steps=32, longest=True),
)


# ---- one case, in its own process ----------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _noise(seed, shape: tuple[int, ...], dtype):
    """Numbers from -1 to 1, or bytes, by hashing each place: one pass of writing, and no memory beside the result."""
    x = jnp.uint32(seed)
    for axis in range(len(shape)):
        x = (x + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)) * jnp.uint32(0x9E3779B1)
        x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    x = x ^ (x >> 16)
    if jnp.issubdtype(dtype, jnp.integer):
        return (x >> 24).astype(dtype)
    return ((x >> 8).astype(jnp.float32) * 2.0**-23 - 1).astype(dtype)


def random_model(shape: ModelConfig, dtype=jnp.bfloat16) -> Llama:
    """A model of the shape with random weights, made on the device."""
    leaves, structure = jax.tree.flatten(
        nnx.eval_shape(lambda: Llama(shape, param_dtype=dtype, rngs=nnx.Rngs(params=0)))
    )

    def fill(i, x):
        if x.ndim == 1:
            return jnp.ones(x.shape, x.dtype)
        return _noise(i, x.shape, x.dtype) * jnp.asarray((3 / x.shape[0]) ** 0.5, x.dtype)

    fill = jax.jit(fill, static_argnums=1)
    like = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)
    return jax.tree.unflatten(structure, [fill(i, x) for i, x in enumerate(like)])


def cache_shapes(model: Llama, config: CacheConfig, batch: int, prompt: int) -> KVCache:
    """The cache that `prefill` leaves, abstract."""
    tokens, lengths = jnp.zeros((batch, prompt), jnp.int32), jnp.full((batch,), prompt, jnp.int32)
    return jax.eval_shape(prefill, model, tokens, lengths, config)[1]


def synthetic_cache(model: Llama, config: CacheConfig, batch: int, prompt: int) -> KVCache:
    """What `prefill` leaves of a prompt, in shapes and counters, with random codes and rows."""
    tokens, lengths = jnp.zeros((batch, prompt), jnp.int32), jnp.full((batch,), prompt, jnp.int32)
    like = cache_shapes(model, config, batch, prompt)
    # Counters depend on lengths alone: a tiny model has the same, and XLA drops what it takes to make the rest.
    tiny = model.config.replace(vocab_size=8, hidden_size=8, intermediate_size=8, num_heads=1, num_kv_heads=1)
    tiny = Llama(tiny, rngs=nnx.Rngs(params=0))

    @jax.jit
    def counters(tiny, tokens, lengths):
        return [x for x in jax.tree.leaves(prefill(tiny, tokens, lengths, config)[1]) if x.ndim == 1]

    counted = iter(counters(tiny, tokens, lengths))
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    filled = []
    for i, (path, x) in enumerate(leaves):
        if x.ndim == 1:
            filled.append(next(counted))
        elif x.dtype == jnp.int32:  # positions of rows
            filled.append(jax.jit(jax.lax.broadcasted_iota, static_argnums=(0, 1, 2))(x.dtype, x.shape, x.ndim - 1))
        else:
            noise = _noise(i, x.shape, x.dtype)
            positive = any(name in jax.tree_util.keystr(path) for name in (".scale", ".balance", ".units"))
            filled.append(jnp.abs(noise) * 0.5 + 0.25 if positive and noise.dtype.itemsize > 1 else noise)
    return jax.tree.unflatten(structure, filled)


def _stats() -> dict:
    return jax.local_devices()[0].memory_stats() or {}


class _Compilation:
    """Seconds spent lowering and compiling."""

    def __init__(self):
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def _add(self, event: str, seconds: float, **_) -> None:
        if event.endswith(("backend_compile_duration", "jaxpr_to_mlir_module_duration")):
            self.seconds += seconds


def _decode(model: Llama, config: CacheConfig, batch: int, case: Case) -> dict:
    """The decode loop's figures."""
    steps = case.steps
    token, key, sampling = jnp.zeros((batch,), jnp.int32), jax.random.key(0), Sampling(temperature=1.0)
    start = time.perf_counter()
    # Compiled before the cache is there: XLA tries its products out, on copies of their operands.
    shapes = cache_shapes(model, config, batch, case.prompt)
    loop = _decode_loop.lower(model, shapes, token, key, sampling, steps + 1, ())
    lowered = time.perf_counter()
    loop = loop.compile()
    row: dict[str, Any] = {
        "decode_compile_s": time.perf_counter() - start,
        "decode_lower_s": lowered - start,
        "cache_bytes": nbytes(shapes),
        "decode_temporary_bytes": loop.memory_analysis().temp_size_in_bytes,
    }
    cache = synthetic_cache(model, config, batch, case.prompt)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        tokens, cache = loop(model, cache, token, key, sampling)
        jax.block_until_ready(tokens)
        times.append((time.perf_counter() - start) / steps)
    assert int(cache.room.min()) >= 0
    step = statistics.median(times[1:])
    row |= {
        "step_ms": 1e3 * step,
        "step_ms_all": [1e3 * t for t in times],
        "steps": steps,
        "tokens_per_s": batch / step,
    }
    row |= {"decode_peak_bytes": _stats().get("peak_bytes_in_use")}
    if "profile" in case.parts:
        kernels = traced_kernels(lambda: jax.block_until_ready(loop(model, cache, token, key, sampling)[0]))
        row["kernels"] = _by_name(kernels, steps)
    return row


def _by_name(kernels: Sequence[tuple[str, float]], steps: int) -> list[dict]:
    """Device time of each kernel in one step, the longest first; those under a microsecond together."""
    sums: dict[str, list[float]] = {}
    for name, seconds in kernels:
        entry = sums.setdefault(name, [0, 0.0])
        entry[0] += 1
        entry[1] += seconds
    rows = [{"kernel": n, "calls": round(c / steps, 2), "us": 1e6 * s / steps} for n, (c, s) in sums.items()]
    rows.sort(key=lambda row: -row["us"])
    rest = [row for row in rows if row["us"] < 1]
    return [row for row in rows if row["us"] >= 1] + [
        {"kernel": "others", "calls": sum(x["calls"] for x in rest), "us": sum(x["us"] for x in rest)}
    ]


def _prefill(model: Llama, config: CacheConfig, batch: int, prompt: int) -> dict:
    """Time to the first token, its compilation apart, and what compression is of it."""
    compilation = _Compilation()
    tokens = _noise(0, (batch, prompt), jnp.int32)
    lengths, key = jnp.full((batch,), prompt, jnp.int32), jax.random.key(0)

    def read():
        start = time.perf_counter()
        logits, cache = prefill(model, tokens, lengths, config)
        jax.block_until_ready((sample(logits, key, Sampling(1.0)), cache))
        return time.perf_counter() - start, cache

    first, cache = read()
    row = {
        "prefill_compile_s": compilation.seconds,
        "ttft_s": first - compilation.seconds,
        "cache_bytes": nbytes(cache),
    }
    row |= {"prefill_peak_bytes": _stats().get("peak_bytes_in_use"), "ttft_warm": batch * prompt <= _READ_TWICE}
    if row["ttft_warm"]:
        del cache
        row["ttft_s"], cache = read()
        del cache
        row |= _layer_seconds(model, config, tokens, lengths)
    return row


def _layer_seconds(model: Llama, config: CacheConfig, tokens, lengths) -> dict:
    """Seconds of the first layer and of its compression, with the programs that `prefill` has compiled."""
    rows, layers = _chunk_rows(*tokens.shape), model.config.num_layers
    config = config.replace(prompt_capacity=tokens.shape[1])
    shapes = [Shape.of(config, i, layers) for i in range(layers)]
    budget = allocate.budgets(config, 0, layers, lengths, tokens.shape[1])
    times = []
    for _ in range(3):
        x = jax.block_until_ready(_embed(model, tokens, rows))
        start = time.perf_counter()
        _, *attended = jax.block_until_ready(
            _read_layer(model.layers[0], x, lengths, rows, score_rows=config.score_rows, sliding_window=None)
        )
        middle = time.perf_counter()
        largest = Shape(*map(max, zip(*shapes)))
        jax.block_until_ready(_compress(*attended, lengths, budget, config=config, shape=largest))
        times.append((middle - start, time.perf_counter() - middle))
    layer, compression = (statistics.median(x) for x in zip(*times[1:]))
    return {"layer_ms": 1e3 * layer, "compression_share": compression / (layer + compression)}


def largest_batch(shape: ModelConfig, config: CacheConfig, prompt: int, free: int) -> tuple[int, int]:
    """Sequences whose caches fit into `free` bytes, and the bytes of one: its cache, and its row of float32 logits."""
    held = planned_report(shape, config, prompt, GENERATED).total.bytes_held
    one = held + 4 * 4 * shape.vocab_size
    return max((free - _RESERVE) // one, 0), one


def longest_prompt(shape: ModelConfig, config: CacheConfig, free: int) -> int:
    """Tokens of the longest prompt that fits into `free` bytes while it is read: its cache, one layer, activations."""
    probe = 1 << 16
    cache = planned_report(shape, config, probe, GENERATED).total.bytes_held / probe
    layer = 2 * 2 * shape.num_kv_heads * shape.head_dim
    # Of one layer compressed at the end, keys and values exist next to the finished cache, and so does x.
    return int((free - _RESERVE) / (cache + layer + 2 * shape.hidden_size))


def measure(case: Case) -> dict:
    """One case's figures, in this process."""
    shape = shape_of(case.model)
    shape = shape.replace(max_position_embeddings=max(shape.max_position_embeddings, case.prompt + GENERATED))
    config = presets.by_name(case.method).replace(prompt_capacity=case.prompt, generated_capacity=GENERATED)
    start = time.perf_counter()
    model = jax.block_until_ready(random_model(shape))
    weights = nbytes(model)
    limit = _stats().get("bytes_limit", 1 << 62)
    row: dict[str, Any] = {"model_s": time.perf_counter() - start, "weights_bytes": weights, "bytes_limit": limit}
    row["weights_read_bytes"] = weights - (0 if shape.tie_word_embeddings else 2 * shape.vocab_size * shape.hidden_size)
    batch = case.batch
    if not batch:
        batch, one = largest_batch(shape, config, case.prompt, limit - weights)
        row |= {"bytes_per_sequence": one, "bytes_of_one_more": weights + _RESERVE + (batch + 1) * one}
    if case.longest:
        row["longest_prompt_predicted"] = longest_prompt(shape, config, limit - weights)
    row["shape"] = {"B": batch, "S": case.prompt}
    if "decode" in case.parts:
        row["cache"] = "synthetic"
        row |= _decode(model, config, batch, case)
    if "prefill" in case.parts:
        row |= _prefill(model, config, batch, case.prompt)
    layer = 2 * 2 * batch * case.prompt * shape.num_kv_heads * shape.head_dim
    row["planned_bytes"] = weights + row["cache_bytes"] + layer + 256 * _MIB
    return row


def _ceilings() -> dict:
    return {"copy_bandwidth": copy_bandwidth(), **environment()}


# ---- all cases -----------------------------------------------------------------------------------------------------


def _child(argument: str, torch: dict | None = None) -> dict:
    """A row from a process of its own; {"failed": the end of its message} where there is none."""
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"} | os.environ
    command = [sys.executable, "-m", "minikv_jax.bench.e2e", argument]
    if torch is not None:
        command = [sys.executable, str(Path(__file__).with_name("_torch_e2e.py")), json.dumps(torch)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        return {"failed": result.stderr[-600:]}
    return json.loads(result.stdout.splitlines()[-1])


def _torch_row(case: Case) -> dict:
    shape = shape_of(case.model)
    cache = "dynamic" if case.method == "transformers" else case.method.removeprefix("transformers-")
    if cache.startswith("quanto") and importlib.util.find_spec("optimum") is None:
        return {"failed": "needs the package optimum-quanto"}
    sizes = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "max_position_embeddings": case.prompt + GENERATED,
    }
    row = _child("", {"shape": sizes, "cache": cache, "batch": case.batch, "prompt": case.prompt, "seconds": 8})
    if "step_ms" in row:
        row["tokens_per_s"] = 1e3 * case.batch / row["step_ms"]
    return row | {"cache": "synthetic", "shape": {"B": case.batch, "S": case.prompt}}


def _peak(row: dict) -> int:
    return max(row.get(name) or 0 for name in ("prefill_peak_bytes", "decode_peak_bytes"))


def finish(row: dict, done: Sequence[dict], bandwidth: float) -> dict:
    """The row with what follows from it, from its full-cache neighbour, and from the bandwidth."""
    row = dict(row)
    peak = _peak(row)
    if peak:
        row["peak_bytes"] = peak
        if "planned_bytes" in row:
            row["peak_over_planned"] = row["peak_bytes"] / row["planned_bytes"]
    if "step_ms" in row and "weights_read_bytes" in row:
        row["floor_ms"] = 1e3 * (row["weights_read_bytes"] + row["cache_bytes"]) / bandwidth
        row["share_of_floor"] = row["floor_ms"] / row["step_ms"]
    for other in (x for x in done if x["case"] == row["case"] and x["method"] == "full"):
        if "longest_prompt_predicted" in other:
            row["prompt_vs_full"] = row["shape"]["S"] / other["longest_prompt_predicted"]
            break
        if "tokens_per_s" in row and "tokens_per_s" in other:
            name = "throughput_vs_full" if row["case"].endswith("largest") else "speedup_vs_full"
            row[name] = row["tokens_per_s"] / other["tokens_per_s"]
            row["batch_vs_full"] = row["shape"]["B"] / other["shape"]["B"]
        if "ttft_s" in row and "ttft_s" in other:
            row["ttft_vs_full"] = row["ttft_s"] / other["ttft_s"]
        if peak and _peak(other):
            row["peak_saved_share"] = 1 - peak / _peak(other)
    return {key: round(x, 4) if isinstance(x, float) else x for key, x in row.items()}


def _rows(cases: Sequence[Case]) -> Iterator[dict]:
    for case in cases:
        start = time.perf_counter()
        row = {"case": case.name, "model": case.model, "method": case.method}
        if case.method.startswith("transformers"):
            row |= {"implementation": "transformers"} | _torch_row(case)
        else:
            row |= {"implementation": "minikv_jax"} | _child(json.dumps(dataclasses.asdict(case)))
        yield row | {"seconds": round(time.perf_counter() - start, 1)}


def run(out: Path, only: Sequence[str] = ()) -> None:
    """Measures the cases whose "case method parts" contains one of `only` (`*` stands for anything), default all.

    Writes `out` after each. Rows of other cases that it already holds stay; what is measured again is replaced.
    """
    cases = [case for case in CASES if case.method in presets.METHODS or case.method.startswith("transformers")]
    if only:
        labels = [f"{case.name} {case.method} {'+'.join(case.parts)}" for case in cases]
        chosen = [any(fnmatch.fnmatch(label, f"*{pattern}*") for pattern in only) for label in labels]
        cases = [case for case, wanted in zip(cases, chosen) if wanted]
    if not cases:
        raise ConfigError(f"--only {' '.join(only)} names no case: they read like 'llama3-8b-B8-S32768 minikv decode'.")
    about = _child("ceilings")
    if "failed" in about:
        raise SystemExit(f"No figures: {about['failed']}")
    rows = json.loads(out.read_text())["rows"] if out.exists() else []
    bandwidth = about.pop("copy_bandwidth")
    command = f"minikv bench e2e --out {out}" + "".join(f" --only '{pattern}'" for pattern in only)
    for row in _rows(cases):
        same = [x for x in rows if (x["case"], x["method"]) == (row["case"], row["method"])]
        rows = [x for x in rows if x not in same]
        before = {key: x for key, x in (same[0] if same else {}).items() if key != "failed"}
        rows.append(before | row)
        finished = [finish(x, rows, bandwidth) for x in rows]
        write_results(out, "e2e", command, time.strftime("%Y-%m-%d"), finished, about=about, copy_bandwidth=bandwidth)
        print(_line(finished[-1]), flush=True)


def _line(row: dict) -> str:
    cells = [f"{row['case']:26} {row['method']:26}"]
    for name, form in (
        ("tokens_per_s", "{:8.1f} tokens/s"), ("step_ms", "{:7.2f} ms"), ("share_of_floor", "{:4.0%} of floor"),
        ("speedup_vs_full", "{:5.2f}x full"), ("throughput_vs_full", "{:5.2f}x full"), ("ttft_s", "{:6.2f} s ttft"),
        ("decode_compile_s", "compiled {:.1f} s"), ("prefill_compile_s", "compiled {:.1f} s"),
        ("peak_over_planned", "{:5.2f}x planned"), ("seconds", "({:.0f} s)"), ("failed", "FAILED {}"),
    ):  # fmt: skip
        if row.get(name) is not None:
            cells.append(form.format(row[name]))
    return "  ".join(cells)


def plot(results: Path, picture: Path) -> None:
    """Tokens per second and peak memory of every method at 8 x 32k, and throughput at each one's largest batch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = json.loads(results.read_text())["rows"]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        ("llama3-8b-B8-S32768", "tokens_per_s", 1, "new tokens/s, batch 8, 32k prompt"),
        ("llama3-8b-B8-S32768", "decode_peak_bytes", 2.0**-30, "peak memory while decoding, GiB"),
        ("llama3-8b-S32768-largest", "tokens_per_s", 1, "new tokens/s at the largest batch, 32k prompt"),
    )
    for axis, (case, name, unit, title) in zip(figure.subplots(1, 3), panels):
        shown = [(row["method"], row[name] * unit) for row in rows if row["case"] == case and row.get(name)]
        axis.barh([method for method, _ in shown], [number for _, number in shown])
        axis.invert_yaxis()
        axis.set(title=title)
        axis.title.set_fontsize("medium")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)


def main(arguments: Sequence[str]) -> None:
    """`ceilings` or a case as JSON: prints its row. `--plot RESULTS PICTURE`: draws."""
    if arguments[0] == "--plot":
        plot(*map(Path, arguments[1:]))
        return
    if arguments[0] == "ceilings":
        print(json.dumps(_ceilings()))
        return
    fields = json.loads(arguments[0])
    print(json.dumps(measure(Case(**fields | {"parts": tuple(fields["parts"])}))))


if __name__ == "__main__":
    main(sys.argv[1:])
