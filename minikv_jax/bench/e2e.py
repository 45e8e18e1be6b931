"""Whole models on one GPU: `minikv bench e2e --out FILE [--only PATTERN ...] [--jobs N] [--model-file FILE]`.

Every case has two processes of its own. The first rehearses: it compiles all programs of the case into JAX's persistent
cache, where XLA tries out products on the device, and says how long that took. The second, which finds them there,
measures: its allocator's peak is the case's alone. First the real decode loop, sampling included, then the prompt.

    case 1   start, trace ─► [compile] ─► start, trace ─► [measure]
    case 2   start, trace ────────────► [compile] ─► start, trace ─► [measure]      [ ]: has the GPU to itself

`jobs` cases are in work at once; whatever uses the GPU's time or memory waits for its turn, so times of steps
and prompts and peaks do not depend on their number. Seconds of compiling do: they hold tracing, beside other cases.

Weights are random in bfloat16, or those of a model file. The cache that is decoded from is filled with random codes in
the shapes and with the counters that `prefill` would leave (`"cache": "synthetic"`), so that a row costs seconds; time
and memory of the prompt itself are measured where a case says so. New tokens alone count as throughput.

A step's floor is the bytes it must read, all weights but the embedding table and the whole cache, over the bandwidth of
a copy measured in the same run.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from minikv_jax import allocate, nbytes, outputs, presets, program
from minikv_jax.bench.timing import copy_bandwidth, environment, matching, read_results, traced_kernels, write_results
from minikv_jax.cache import KVCache, Shape, is_counter
from minikv_jax.compress import compress_in_pieces
from minikv_jax.config import CacheConfig
from minikv_jax.decode import decode_loop
from minikv_jax.errors import ConfigError, MiniKVError
from minikv_jax.models import load_model, open_checkpoint
from minikv_jax.models.config import ModelConfig
from minikv_jax.models.llama import Llama
from minikv_jax.models.shapes import shape_of
from minikv_jax.prefill import prefill
from minikv_jax.processes import Workers
from minikv_jax.reading import chunk_rows, embed, logits_at, read_layer
from minikv_jax.report import planned_report
from minikv_jax.sampling import Sampling, sample

GENERATED = 512
_MIB = 1 << 20
_RESERVE = 1 << 30  # what a step needs beside weights and cache, with room for the allocator's fragments
# Prompts up to this many tokens are read a second time, without compilation.
_READ_TWICE = 140_000


@dataclasses.dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        model: a shape's name.
        method: a preset, with settings as `presets.parse` reads them, or a way of transformers.
        batch: sequences; 0: as many as fit beside the weights.
        prompt: tokens of each; 0: as many as fit, predicted from their bytes.
        parts: of "decode", "prefill" and "profile".
        steps: of the decode loop, which is timed three times.
        longest: the case belongs to the longest prompts.
        file: a checkpoint of the model; without one its weights are random.
    """

    model: str
    method: str
    batch: int
    prompt: int
    parts: tuple[str, ...] = ("decode",)
    steps: int = 128
    longest: bool = False
    file: str | None = None

    @property
    def name(self) -> str:
        if self.longest:
            return f"{self.model}-longest"
        return f"{self.model}-B{self.batch}-S{self.prompt}" if self.batch else f"{self.model}-S{self.prompt}-largest"

    @property
    def label(self) -> str:
        return f"{self.name} {self.method} {'+'.join(self.parts)}"

    @property
    def fills_the_card(self) -> bool:
        return self.longest or not self.batch


QUANTISED = "transformers-quanto-2bit"
# An eighth of the layers in 4 bits and a quarter that keep half of the prompt, as `minikv calibrate` gives a model.
# Which ones changes nothing here.
_OWN_LAYERS = "minikv_plus:precise=[7,14,16,20],brief=[0,1,5,11,18,22,27,31]"
# The sixteenth of the prompt that is attended to most in 4 bits: three launches of attention where others have one.
_TWO_TIERS = "minikv_plus:important=0.0625"
# Without the balance of channels, which kernels do in registers.
_UNBALANCED = "minikv_plus:balance=false"
_8B, _7B, _REAL = "llama3-8b", "llama2-7b", "qwen2.5-1.5b"
_BOTH = ("decode", "prefill")
_SLOW = ("h2o", "mikv")  # score every token at every step: fewer steps say the same


def _each(methods: Sequence[str], model: str, batch: int, prompt: int, *parts: str) -> Iterator[Case]:
    for method in methods:
        steps = 16 if method in _SLOW else 128 if batch else 64
        yield Case(model, method, batch, prompt, parts or ("decode",), steps)


# Most important first.
CASES = (
    *_each(("minikv", "full", "minikv_plus", _OWN_LAYERS), _8B, 8, 32768, "decode", "profile"),
    *_each(("minikv", "full"), _8B, 1, 32768, *_BOTH),
    *_each(("minikv_plus",), _8B, 1, 32768),
    *_each(("minikv", "full"), _8B, 0, 32768),
    *_each(("minikv", "full"), _8B, 1, 131072),
    *_each(("minikv", "full"), _8B, 1, 4096, *_BOTH),
    *_each((QUANTISED, "transformers"), _8B, 8, 32768),
    *_each((QUANTISED, "transformers"), _8B, 1, 32768, *_BOTH),
    *_each((_UNBALANCED,), _8B, 8, 32768),
    *_each((_UNBALANCED,), _8B, 1, 32768, *_BOTH),
    *_each((_TWO_TIERS, "kivi", "snapkv", "minikv_pyramid", "mikv", "h2o"), _8B, 8, 32768),
    Case(_7B, "minikv", 1, 400_000, _BOTH, steps=32, longest=True),
    Case(_7B, "full", 1, 0, _BOTH, steps=32, longest=True),
    *_each(("minikv", "full", "minikv_plus"), _REAL, 8, 32256),
    *_each(("minikv", "full"), _REAL, 1, 32256, *_BOTH),
    *_each(("minikv_plus",), _REAL, 1, 32256),
    *_each(("minikv_plus", "kivi", "snapkv", "minikv_pyramid", "mikv", "h2o"), _8B, 0, 32768),
    *_each(("minikv_plus", "kivi", "snapkv", "minikv_pyramid", "mikv", "h2o"), _8B, 1, 32768, "prefill"),
    *_each(("minikv", "full"), _8B, 8, 32768, "prefill"),
    *_each(("minikv", "full"), _8B, 1, 2048, *_BOTH),
    *_each(("minikv", "full"), _8B, 32, 4096),
    *_each(("minikv", "full"), _8B, 8, 8192),
    *_each(("minikv", "full"), _8B, 1, 131072, "prefill"),
    *_each(("minikv", "full"), _7B, 4, 16384),
    *_each(("minikv_plus", "kivi", "snapkv", "minikv_pyramid", "mikv", "h2o"), _8B, 1, 131072),
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


def model_shapes(shape: ModelConfig) -> Llama:
    """The model in bfloat16, abstract."""
    return nnx.eval_shape(lambda: Llama(shape, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(params=0)))


def random_model(shape: ModelConfig, alike: bool = False) -> Llama:
    """A model of the shape with random weights, made on the device; `alike`: all layers are one, in its memory."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(model_shapes(shape))

    def fill(i, x):
        if x.ndim == 1:
            return jnp.ones(x.shape, x.dtype)
        return _noise(i, x.shape, x.dtype) * jnp.asarray((3 / x.shape[0]) ** 0.5, x.dtype)

    fill = jax.jit(fill, static_argnums=1)
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    if alike:
        names = [re.sub(r"\[\d+\]", "", name) for name in names]
    filled = {}
    for i, (name, (_, x)) in enumerate(zip(names, leaves)):
        if name not in filled:
            filled[name] = fill(i, jax.ShapeDtypeStruct(x.shape, x.dtype))
    return jax.tree.unflatten(structure, [filled[name] for name in names])


def _read_model(path: str) -> Callable[[], Llama]:
    """A model file in the host's memory, and how it gets to the device."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        model = load_model(path, jnp.bfloat16)
    return lambda: jax.tree.map(lambda x: jax.device_put(np.asarray(x)), model)


def cache_shapes(model: Llama, config: CacheConfig, batch: int, prompt: int) -> KVCache:
    """The cache that `prefill` leaves, abstract."""
    tokens, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((batch, prompt), (batch,)))
    return jax.eval_shape(prefill, model, tokens, lengths, config)[1]


def cache_counters(shape: ModelConfig, config: CacheConfig, batch: int, prompt: int) -> list[np.ndarray]:
    """The counters, one a sequence, of the cache that `prefill` leaves, computed on the host."""
    # They depend on lengths alone: a tiny model has the same, and XLA drops what it takes to make the rest.
    tiny = shape.replace(vocab_size=8, hidden_size=8, intermediate_size=8, num_heads=1, num_kv_heads=1)

    @jax.jit
    def counters(tiny, tokens, lengths):
        return [x for x in jax.tree.leaves(prefill(tiny, tokens, lengths, config)[1]) if is_counter(x)]

    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        tokens, lengths = jnp.zeros((1, prompt), jnp.int32), jnp.full((1,), prompt, jnp.int32)
        one = jax.device_get(counters(Llama(tiny, rngs=nnx.Rngs(params=0)), tokens, lengths))
    return [np.repeat(x, batch) for x in one]


def synthetic_cache(like: KVCache, counters: Sequence[np.ndarray]) -> KVCache:
    """What `prefill` leaves of a prompt, in shapes and counters, with random codes and rows."""
    counted = iter(counters)
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    filled = []
    for i, (path, x) in enumerate(leaves):
        if is_counter(x):
            filled.append(jnp.asarray(next(counted)))
        elif ".coupling" in jax.tree_util.keystr(path):  # random ones let errors grow without end
            filled.append(jnp.zeros(x.shape, x.dtype))
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

    def _add(self, event: str, duration_secs: float, **_) -> None:
        if event.endswith(("backend_compile_duration", "jaxpr_to_mlir_module_duration")):
            self.seconds += duration_secs


class Setting(NamedTuple):
    """What a case comes to on this device; model and cache are abstract."""

    shape: ModelConfig
    config: CacheConfig
    batch: int
    prompt: int
    model: Llama
    cache: KVCache

    @classmethod
    def of(cls, case: Case) -> tuple["Setting", dict]:
        """The setting, and what there is to say of it."""
        shape = open_checkpoint(case.file).config if case.file else shape_of(case.model)
        weights = nbytes(model_shapes(shape))
        read = weights - (0 if shape.tie_word_embeddings else 2 * shape.vocab_size * shape.hidden_size)
        limit = _stats().get("bytes_limit", 1 << 62)
        row = {"weights": "file" if case.file else "random", "weights_bytes": weights, "weights_read_bytes": read}
        row["bytes_limit"] = limit
        (config,), batch, prompt = presets.parse(case.method).values(), case.batch, case.prompt
        config = config.replace(generated_capacity=GENERATED)
        if case.longest:
            row["longest_prompt_predicted"] = longest_prompt(shape, config, limit - weights)
            prompt = prompt or row["longest_prompt_predicted"] // 1024 * 1024
        config = config.replace(prompt_capacity=prompt)
        shape = shape.replace(max_position_embeddings=max(shape.max_position_embeddings, prompt + GENERATED))
        if not batch:
            batch, one = largest_batch(shape, config, prompt, limit - weights)
            row |= {"bytes_per_sequence": one, "bytes_of_one_more": weights + _RESERVE + (batch + 1) * one}
        layer = 2 * 2 * batch * prompt * shape.num_kv_heads * shape.head_dim
        model = model_shapes(shape)
        cache = cache_shapes(model, config, batch, prompt)
        row |= {"cache_bytes": nbytes(cache), "planned_bytes": weights + nbytes(cache) + layer + 256 * _MIB}
        return cls(shape, config, batch, prompt, model, cache), row | {"shape": {"B": batch, "S": prompt}}


def _decode_arguments(setting: Setting) -> tuple:
    """The decode loop's, without model and cache."""
    return jnp.zeros((setting.batch,), jnp.int32), jax.random.key(0), Sampling(temperature=1.0)


def _lower_decode(setting: Setting, steps: int) -> jax.stages.Lowered:
    """The decode loop for abstract arguments: the same program in every process, and nothing runs on the device."""
    arguments = jax.eval_shape(functools.partial(_decode_arguments, setting))
    return decode_loop.lower(setting.model, setting.cache, *arguments, steps + 1, ())


def _decode(model: Llama, cache: KVCache, setting: Setting, loop: jax.stages.Compiled, case: Case) -> dict:
    """The decode loop's figures."""
    steps, arguments = case.steps, _decode_arguments(setting)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        tokens, cache = loop(model, cache, *arguments)
        jax.block_until_ready(tokens)
        times.append((time.perf_counter() - start) / steps)
    assert int(cache.room.min()) >= 0
    step = statistics.median(times[1:])
    row: dict[str, Any] = {
        "step_ms": 1e3 * step,
        "step_ms_all": [1e3 * t for t in times],
        "steps": steps,
        "tokens_per_s": setting.batch / step,
        "cache": "synthetic",
        "decode_peak_bytes": _stats().get("peak_bytes_in_use"),
    }
    if "profile" in case.parts:
        kernels = traced_kernels(lambda: jax.block_until_ready(loop(model, cache, *arguments)[0]))
        row["kernels"] = _by_name(kernels, steps, product_bytes(cast(str, loop.as_text())))
    return row


def product_bytes(text: str) -> dict[str, int]:
    """Bytes that each kernel of a matrix product reads and writes, by its name, from the text of a compiled program."""
    sizes, products = {}, {}
    for name, dtype, shape, rest in re.findall(r"%?([\w.-]+) = \(?(\w+?)\[([\d,]*)\]([^\n]*)", text):
        bits = int((re.search(r"\d+", dtype) or ["8"])[0])
        sizes[name] = math.prod(int(n) for n in shape.split(",") if n) * bits // 8
        operands = re.search(r" fusion\(([^)]*)\)", rest)
        if operands and "dot" in name:
            products[name] = re.findall(r"%([\w.-]+)", operands[1])
    return {
        re.sub(r"\W", "_", name): sizes[name] + sum(sizes.get(x, 0) for x in operands)
        for name, operands in products.items()
    }


def _by_name(kernels: Sequence[tuple[str, float]], steps: int, read: Mapping[str, int]) -> list[dict]:
    """Device time of each kernel in one step, the longest first, those under a microsecond together; bytes if known."""
    sums: dict[str, list[float]] = {}
    for name, seconds in kernels:
        entry = sums.setdefault(name, [0, 0.0])
        entry[0] += 1
        entry[1] += seconds
    rows = [
        {"kernel": n, "calls": round(c / steps, 2), "us": 1e6 * s / steps}
        | ({"bytes": round(read[n] * c / steps)} if n in read else {})
        for n, (c, s) in sums.items()
    ]
    rows.sort(key=lambda row: -row["us"])
    rest = [row for row in rows if row["us"] < 1]
    return [row for row in rows if row["us"] >= 1] + [
        {"kernel": "others", "calls": sum(x["calls"] for x in rest), "us": sum(x["us"] for x in rest)}
    ]


def _prompt(setting: Setting) -> tuple[jax.Array, jax.Array]:
    """Tokens and lengths."""
    tokens = _noise(0, (setting.batch, setting.prompt), jnp.int32) % setting.shape.vocab_size
    return tokens, jnp.full((setting.batch,), setting.prompt, jnp.int32)


class _Rehearsed(Exception):
    """A layer has been read, so all programs of reading are there."""


def _rehearse_prefill(setting: Setting) -> dict:
    """Compiles what `prefill` needs by reading one layer; the time of doing so again is not compilation."""
    model = random_model(setting.shape, alike=True)
    tokens, lengths = _prompt(setting)

    def stop(done: int, layers: int) -> None:
        raise _Rehearsed

    def read() -> float:
        start = time.perf_counter()
        with contextlib.suppress(_Rehearsed):
            prefill(model, tokens, lengths, setting.config, progress=stop)
        x = embed(model, tokens, chunk_rows(*tokens.shape))
        jax.block_until_ready(sample(logits_at(model, x, lengths - 1), jax.random.key(0), Sampling(1.0)))
        return time.perf_counter() - start

    return {"prefill_compile_s": read() - read()}


def _prefill(model: Llama, setting: Setting, compilation: _Compilation) -> dict:
    """Time to the first token, and what compression is of it."""
    tokens, lengths = _prompt(setting)
    key = jax.random.key(0)

    def read():
        start = time.perf_counter()
        logits, cache = prefill(model, tokens, lengths, setting.config)
        jax.block_until_ready((sample(logits, key, Sampling(1.0)), cache))
        return time.perf_counter() - start

    before = compilation.seconds
    first = read()
    warm = tokens.size <= _READ_TWICE
    row = {
        "ttft_s": read() if warm else first - (compilation.seconds - before),
        "ttft_warm": warm,
        "prefill_peak_bytes": _stats().get("peak_bytes_in_use"),
    }
    return row | (_layer_seconds(model, setting.config, tokens, lengths) if warm else {})


def _layer_seconds(model: Llama, config: CacheConfig, tokens, lengths) -> dict:
    """Seconds of the first layer and of its compression, with the programs that `prefill` has compiled."""
    rows, layers = chunk_rows(*tokens.shape), model.config.num_layers
    config = config.replace(prompt_capacity=tokens.shape[1])
    largest, method = Shape.largest(config, layers), config.of_layer(0)
    budget = allocate.budgets(config, 0, layers, lengths, tokens.shape[1])
    times = []
    for _ in range(3):
        x = jax.block_until_ready(embed(model, tokens, rows))
        start = time.perf_counter()
        _, *attended = jax.block_until_ready(
            read_layer(model.layers[0], x, lengths, rows, score_rows=method.score_rows, sliding_window=None)
        )
        middle = time.perf_counter()
        jax.block_until_ready(compress_in_pieces(*attended, lengths, budget, method, largest, config.dtype))
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
    # Next to the finished cache exist x, the last layer's keys and values as they were read and as they are laid out,
    # and about one layer's worth of holes between the allocator's blocks.
    return int((free - _RESERVE) / (cache + 3 * layer + 2 * shape.hidden_size))


def _import_kernels() -> None:
    """Imports what kernels are made with, which is no part of compiling them."""
    for name in ("jax_triton", "jax.experimental.pallas.mosaic_gpu"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def rehearse(case: Case, take_turn: Callable[[], None] = lambda: None) -> dict:
    """Compiles the case's large programs, into the persistent cache if there is one: seconds of compiling.

    All that it costs on the device is after `take_turn()`.
    """
    _import_kernels()
    setting, _ = Setting.of(case)
    row, lowered = {}, None
    if "decode" in case.parts:
        start = time.perf_counter()
        lowered = _lower_decode(setting, case.steps)
        row["decode_lower_s"] = time.perf_counter() - start
    take_turn()
    if lowered is not None:
        tuned = _tuned()
        start = time.perf_counter()
        temporary = cast(Any, lowered.compile().memory_analysis()).temp_size_in_bytes
        row["decode_compile_s"] = row["decode_lower_s"] + time.perf_counter() - start
        row |= {"decode_products_tuned": _tuned() - tuned, "decode_temporary_bytes": temporary}
    return row | (_rehearse_prefill(setting) if "prefill" in case.parts else {})


def _tuned() -> int:
    """Products whose implementation XLA has tried out and noted."""
    folder = jax.config.jax_compilation_cache_dir
    return sum(1 for _ in Path(folder, "xla_gpu_per_fusion_autotune_cache_dir").glob("*")) if folder else 0


def measure(case: Case, take_turn: Callable[[], None] = lambda: None) -> dict:
    """One case's figures, in this process; what it does to the device is after `take_turn()`."""
    _import_kernels()
    if case.fills_the_card:  # and so does the allocator, as soon as JAX starts
        take_turn()
    compilation = _Compilation()
    setting, row = Setting.of(case)
    load = _read_model(case.file) if case.file else functools.partial(random_model, setting.shape)
    lowered, counters, lower_s = None, [], 0.0
    if "decode" in case.parts:
        start = time.perf_counter()
        lowered = _lower_decode(setting, case.steps)
        lower_s = time.perf_counter() - start
        counters = cache_counters(*setting[:4])
    if not case.fills_the_card:
        take_turn()
    tuned, start = _tuned(), time.perf_counter()
    # Compiled before anything is there: if the cache misses, XLA tries products out on copies of their operands.
    loop = None if lowered is None else lowered.compile()
    if loop is not None:
        row["decode_cached_compile_s"] = lower_s + time.perf_counter() - start
    start = time.perf_counter()
    model = jax.block_until_ready(load())
    row["model_s"] = time.perf_counter() - start
    if loop is not None:
        row |= _decode(model, synthetic_cache(setting.cache, counters), setting, loop, case)
        del loop, lowered
    if "prefill" in case.parts:
        row |= _prefill(model, setting, compilation)
    # Anything but 0 says that the rehearsal missed a program, and that time and memory of trials are in the figures.
    return row | {"products_tuned_while_measured": _tuned() - tuned}


def ceilings(take_turn: Callable[[], None] = lambda: None) -> dict:
    """The bandwidth of a copy, and what it was measured on."""
    if jax.default_backend() != "gpu":
        raise MiniKVError(f"bench e2e measures a GPU, and JAX sees none: it runs on {jax.devices()[0]}.")
    about = environment()
    take_turn()
    return {"copy_bandwidth": copy_bandwidth(), **about}


# ---- all cases -----------------------------------------------------------------------------------------------------


def _child(
    command: Sequence[str],
    settings: Mapping[str, str],
    turn: AbstractContextManager,
    start: Callable[..., AbstractContextManager[subprocess.Popen]] = subprocess.Popen,
) -> dict:
    """The row that a process prints, which gets ready, says so, and waits until `turn` is entered.

    {"failed": the last line of its message} where there is none. The turn ends with the process, its memory given back.
    """
    pipe, output, seconds = subprocess.PIPE, "", 0.0
    with (
        tempfile.TemporaryFile("w+") as errors,
        start([sys.executable, *command], env=settings, stdin=pipe, stdout=pipe, stderr=errors, text=True) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        if any(line == _READY for line in process.stdout):
            with turn, contextlib.suppress(BrokenPipeError):
                begun = time.perf_counter()
                os.write(process.stdin.fileno(), b"go\n")
                output = process.stdout.read()
                process.wait()
                seconds = time.perf_counter() - begun
        if process.wait() or not output:
            errors.seek(0)
            message = errors.read().strip().splitlines() or ["it ended without a word"]
            return {"failed": message[-1][:600]}  # what a traceback ends with
    return json.loads(output.splitlines()[-1]) | {"gpu_s": seconds}


_READY = "ready\n"


def _take_turn() -> None:
    """Says that this process is ready, and waits until it is told to go on."""
    print(_READY, end="", flush=True)
    if not sys.stdin.readline():
        raise MiniKVError("The benchmark that started this process is gone.")


def _torch_command(case: Case) -> list[str]:
    shape = shape_of(case.model)
    cache = "dynamic" if case.method == "transformers" else case.method.removeprefix("transformers-")
    sizes = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "max_position_embeddings": case.prompt + GENERATED,
    }
    about = {
        "shape": sizes,
        "cache": cache,
        "batch": case.batch,
        "prompt": case.prompt,
        "seconds": 8,
        "parts": case.parts,
    }
    return [str(Path(__file__).with_name("_torch_e2e.py")), json.dumps(about)]


def _row(case: Case, settings: Mapping[str, str], turn: AbstractContextManager, workers: Workers) -> dict:
    """A case's figures, or {"failed": why not}."""
    row: dict[str, Any] = {"case": case.name, "model": case.model, "method": case.method}
    if case.method.startswith("transformers"):
        row |= {"implementation": "transformers", "cache": "synthetic", "shape": {"B": case.batch, "S": case.prompt}}
        if "quanto" in case.method and importlib.util.find_spec("optimum") is None:
            return row | {"failed": "needs the package optimum-quanto"}
        row |= _child(_torch_command(case), settings, turn, workers.process)
        return row | ({"tokens_per_s": 1e3 * case.batch / row["step_ms"]} if "step_ms" in row else {})
    row["implementation"] = "minikv_jax"
    frugal = {**settings, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    seconds = 0.0
    for part in ("rehearse", "measure"):
        command = ["-m", "minikv_jax.bench.e2e", part, json.dumps(dataclasses.asdict(case))]
        chosen = settings if part == "measure" and case.fills_the_card else frugal
        row |= _child(command, chosen, turn, workers.process)
        if "failed" in row:
            return row | {"failed": f"{part}: {row['failed']}"}
        seconds += row["gpu_s"]
    return row | {"gpu_s": seconds}


def _peak(row: dict) -> int:
    return max(row.get(name) or 0 for name in ("prefill_peak_bytes", "decode_peak_bytes"))


def finish(row: dict, done: Sequence[dict], bandwidth: float) -> dict:
    """The row with what follows from it, from its full-cache neighbour, and from the bandwidth (its own, if known)."""
    row, bandwidth = dict(row), row.get("copy_bandwidth", bandwidth)
    peak = _peak(row)
    if peak:
        row["peak_bytes"] = peak
        if "planned_bytes" in row:
            row["peak_over_planned"] = row["peak_bytes"] / row["planned_bytes"]
    if "step_ms" in row and "weights_read_bytes" in row:
        row["floor_ms"] = 1e3 * (row["weights_read_bytes"] + row["cache_bytes"]) / bandwidth
        row["share_of_floor"] = row["floor_ms"] / row["step_ms"]
    for other in (x for x in done if x["case"] == row["case"] and x["method"] == QUANTISED):
        if "tokens_per_s" in row and "tokens_per_s" in other and row["implementation"] == "minikv_jax":
            row["speedup_vs_quantised_transformers"] = row["tokens_per_s"] / other["tokens_per_s"]
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


def _chosen(only: Sequence[str], model_file: Path | None) -> list[Case]:
    """The cases of the table that contain one of `only`; those of the file's model take their weights from it."""
    chosen = matching(CASES, only)
    if not chosen:
        raise ConfigError(f"--only {' '.join(only)} names no case: they read like 'llama3-8b-B8-S32768 minikv decode'.")
    if model_file is None:
        return chosen
    given, expected = open_checkpoint(model_file).config, shape_of(_REAL)
    if (given.num_layers, given.hidden_size) != (expected.num_layers, expected.hidden_size):
        raise ConfigError(f"--model-file {model_file} is not of the shape of {_REAL}, whose cases it is for.")
    file = str(model_file.resolve())
    return [dataclasses.replace(case, file=file) if case.model == _REAL else case for case in chosen]


def _merged(rows: Sequence[dict], row: dict) -> list[dict]:
    """The rows with one more. What was measured before of its case and method stays where it says nothing else."""
    same = [x for x in rows if (x["case"], x["method"]) == (row["case"], row["method"])]
    before = {key: x for key, x in (same[0] if same else {}).items() if not key.startswith("failed")}
    if "failed" in row and "shape" in before:  # another part of the case stands
        row = {"failed_part": row["failed"]}
    place = {(case.name, case.method): i for i, case in reversed(list(enumerate(CASES)))}
    rows = [*(x for x in rows if x not in same), before | row]
    return sorted(rows, key=lambda x: place.get((x["case"], x["method"]), len(place)))


def run(out: Path, only: Sequence[str] = (), jobs: int = 4, model_file: Path | None = None) -> None:
    """Measures the cases whose "case method parts" contains one of `only` (`*` stands for anything), default all.

    Writes `out` after each. Rows of other cases that it already holds stay; what is measured again is replaced.

    Args:
        out: the JSON file.
        only: patterns.
        jobs: cases in work at once. Those that wait for their turn take about half a gigabyte of the device each.
        model_file: a checkpoint for the cases of Qwen2.5-1.5B, whose weights are random without one.
    """
    cases = _chosen(only, model_file)
    rows = read_results(out, "e2e")["rows"] if out.exists() else []
    # Rows of several runs may meet in a file, so its command names no patterns.
    command = f"minikv bench e2e --out {out}" + (f" --model-file {model_file.name}" if model_file else "")
    turn, futures = threading.Lock(), []
    with tempfile.TemporaryDirectory() as folder, Workers(jobs) as workers:
        settings = _SETTINGS | {"JAX_COMPILATION_CACHE_DIR": folder} | os.environ

        @contextlib.contextmanager
        def first_turn():
            with turn:
                futures.extend(workers.submit(_row, case, settings, turn, workers) for case in cases)
                yield

        alone = settings | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        about = _child(["-m", "minikv_jax.bench.e2e", "ceilings"], alone, first_turn(), workers.process)
        if "failed" in about:
            raise MiniKVError(f"No figures. {about['failed']}")
        del about["gpu_s"]
        bandwidth = about.pop("copy_bandwidth")
        for future in as_completed(futures):
            today = time.strftime("%Y-%m-%d")
            row = future.result() | {"copy_bandwidth": bandwidth, "date": today}
            rows = _merged(rows, row)
            finished = [finish(x, rows, bandwidth) for x in rows]
            write_results(out, "e2e", command, today, finished, about=about, copy_bandwidth=bandwidth)
            whole = next(x for x in finished if (x["case"], x["method"]) == (row["case"], row["method"]))
            print(_line(row if "failed" in row else whole), flush=True)


_SETTINGS = {
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
    # Every program is kept, be it small or quickly compiled.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def _line(row: dict) -> str:
    cells = [f"{row['case']:26} {row['method']:26}"]
    for name, form in (
        ("tokens_per_s", "{:8.1f} tokens/s"), ("step_ms", "{:7.2f} ms"), ("share_of_floor", "{:4.0%} of floor"),
        ("speedup_vs_full", "{:5.2f}x full"), ("throughput_vs_full", "{:5.2f}x full"),
        ("speedup_vs_quantised_transformers", "{:5.1f}x quantised transformers"), ("ttft_s", "{:6.2f} s ttft"),
        ("decode_compile_s", "compiled {:.1f} s"), ("prefill_compile_s", "compiled {:.1f} s"),
        ("peak_over_planned", "{:5.2f}x planned"), ("gpu_s", "({:.0f} s of the GPU)"), ("failed", "FAILED {}"),
    ):  # fmt: skip
        if row.get(name) is not None:
            cells.append(form.format(row[name]))
    return "  ".join(cells)


def plot(results: Path, picture: Path) -> None:
    """Tokens per second and peak memory of every method at 8 x 32k, and throughput at each one's largest batch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_results(results)["rows"]
    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        ("llama3-8b-B8-S32768", "tokens_per_s", 1, "new tokens a second,\nbatch 8, 32k prompt"),
        ("llama3-8b-B8-S32768", "decode_peak_bytes", 2.0**-30, "peak memory while decoding, GiB,\nbatch 8, 32k prompt"),
        ("llama3-8b-S32768-largest", "tokens_per_s", 1, "new tokens a second,\nlargest batch, 32k prompt"),
    )
    for axis, (case, name, unit, title) in zip(figure.subplots(1, 3), panels):
        shown = [
            (row["method"].replace(_OWN_LAYERS, "minikv_plus, own layers"), row[name] * unit)
            for row in rows
            if row["case"] == case and row.get(name)
        ]
        axis.barh([method for method, _ in shown], [number for _, number in shown])
        axis.invert_yaxis()
        axis.set(title=title)
        axis.title.set_fontsize("medium")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)


def main(arguments: Sequence[str]) -> None:
    """One part of the benchmark, which prints a row, or a picture of results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("ceilings", "rehearse", "measure"))
    parser.add_argument("case", nargs="?", type=_case_of, help="of `rehearse` and `measure`: its fields, in JSON")
    parser.add_argument("--plot", nargs=2, type=Path, metavar=("RESULTS", "PICTURE"), help="draw results")
    asked = parser.parse_args(arguments)
    if asked.plot:
        results, picture = asked.plot
        outputs.require_picture(picture, "--plot")
        plot(results, picture)
    elif asked.part == "ceilings":
        print(json.dumps(ceilings(_take_turn)))
    elif asked.case is not None:
        print(json.dumps({"rehearse": rehearse, "measure": measure}[asked.part](asked.case, _take_turn)))
    else:
        parser.error("give a part of the benchmark and its case, or --plot")


def _case_of(text: str) -> Case:
    fields = json.loads(text)
    return Case(**fields | {"parts": tuple(fields["parts"])})


if __name__ == "__main__":
    program.run(lambda: main(sys.argv[1:]))
