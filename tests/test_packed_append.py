"""The append kernels: code for code what the cache does without them, on a CUDA device and in Triton's interpreter."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minikv_jax import codec as codec_of
from minikv_jax import segments
from minikv_jax.codec import Codec
from pallas_kernels import packed_rows, quantize
from pallas_kernels.hadamard import rotate
from pallas_kernels.packed_append import triton as implementation
from pallas_kernels.packed_append.api import Options, Rotation, Run, packed_append, packed_write
from pallas_kernels.packed_append.arguments import Appended
from pallas_kernels.rows import put_row

# Compiled once for all tests of a shape.
build = jax.jit(segments.build, static_argnums=(0, 4, 5))
encode_values = jax.jit(codec_of.encode_values, static_argnums=0)
write_codes, turn = jax.jit(packed_rows.write_codes), jax.jit(rotate)


@jax.jit
def encode_new_keys(segment, key):
    """New keys as the segment stores them."""
    coupling = None if segment.coupling is None else quantize.unfold(segment.coupling)
    return codec_of.encode_keys(segment.codec, key, segment.balance, coupling)


CODECS = {
    "2-bit": Codec(2, 2, 16, 16),
    "KIVI's groups": Codec(2, 2, 32, 32),
    "3 and 2 bits, fp8, clipped": Codec(
        3, 2, 64, 64, metadata_dtype="float8_e4m3fn", key_clip=(0.95, 0.9, 0.85), value_clip=(0.95, 0.9)
    ),
    "by feedback": Codec(2, 2, 64, 64, metadata_dtype="float8_e4m3fn", key_clip=(0.95, 0.9, 0.85), key_feedback="all"),
    "by feedback, 4 bits, float16": Codec(4, 2, 32, 32, key_feedback="all"),
    "4 and 8 bits, bfloat16": Codec(4, 8, 128, "head", metadata_dtype="bfloat16"),
    "8 and 4 bits, balanced": Codec(8, 4, 32, "half_head", value_clip=(0.9,), balance=True),
}


def numbers(rng, *shape):
    loud = np.where(rng.random(shape[-1]) < 0.1, 8.0, 1.0)
    return draws.array(rng.standard_normal(shape) * loud + rng.standard_normal(shape[-1]))


def segment(rng, codec, b, heads, blocks, h, dtype=jnp.float32):
    x = [numbers(rng, b, heads, 128 * blocks, h).astype(dtype) for _ in range(2)]
    balance = draws.array(rng.uniform(0.5, 2, (b, heads, h)))
    queries = rng.standard_normal((b, heads, 400, h // 4)) @ rng.standard_normal((b, heads, h // 4, h))
    moment = draws.array(np.swapaxes(queries, 2, 3) @ queries)
    return build(codec, *x, jnp.zeros((b,), jnp.int32), 128 * blocks, dtype, balance, moment)


def options(packed):
    return Options(packed.codec.key_clip, packed.codec.value_clip, packed.balance, packed.coupling)


def expected_write(packed, key, value):
    """What the cache's own functions make of two runs."""

    def rows(run):
        at = run.first[:, None, None, None] + jnp.arange(run.count)[:, None]
        return jnp.take_along_axis(run.rows, at, axis=2)

    def per_head(x):
        return jnp.broadcast_to(x[:, None], key.rows.shape[:2])

    codes = encode_new_keys(packed, rows(key)), encode_values(packed.codec, rows(value))
    keys = write_codes(packed.keys, codes[0], per_head(key.start), key.when)
    return keys, write_codes(packed.values, codes[1], per_head(value.start), value.when)


def expected_append(new, accept, window, filled, packed, length, first, keeps) -> Appended:
    b, heads, rows, _ = window[0].shape
    slot = jnp.broadcast_to(filled[:, None], (b, heads))
    window = [put_row(x, slot, y, accept) for x, y in zip(window, new)]
    full = accept & (filled + 1 == rows)
    start = jnp.full((b,), first, jnp.int32)
    count = rows - first - keeps
    runs = (Run(x, start, length, full, count) for x in window)
    keys, values = expected_write(packed, *runs)
    moved = jnp.where(full, count, 0)
    window = [np.array(x) for x in window]
    for x in window:
        for i in np.flatnonzero(full):
            x[i, :, first : first + keeps] = x[i, :, first + count :].copy()
    return Appended(*window, filled + accept - moved, keys, values, length + moved)


def by_group(packed):
    """Codes, scales and minima of each group of tokens, float32 [B, K, groups, ...]."""
    parts = [np.asarray(x, np.float32) for x in quantize.from_packed(packed)]
    return [x.reshape(*x.shape[:2], parts[1].shape[2], -1) for x in parts]


def same_codes(got, want, steady=True):
    """Equal arrays, but for few numbers that lie between two codes, or groups that fit two ranges or scales alike;
    only groups that are `steady` [B, K, groups]."""
    got, want = ([x[np.broadcast_to(steady, x.shape[:3])] for x in by_group(packed)] for packed in (got, want))
    for a, b in zip(got, want):
        assert np.mean(a != b) < 1e-2
    assert np.mean(np.abs(got[0] - want[0]) > 1) < 1e-3


def steady_groups(rng, packed, want, append):
    """Groups of keys [B, K, groups] that stay as they are if feedback is some 1e-7 more or less. Elsewhere a code that
    tips over tips a range, and so most of what follows in its group, as sums in another order may."""
    steady = True
    away = 3e-7 * rng.choice([-1, 1], packed.coupling.shape)
    for sign in (-1, 1):
        coupling = jnp.asarray(np.asarray(packed.coupling, np.float64) * (1 + sign * away), jnp.float32)
        moved = append(dataclasses.replace(packed, coupling=coupling))
        for a, b in zip(by_group(moved.keys), by_group(want.keys)):
            steady = steady & (a == b).all(-1)
    return steady


def untouched(got, before, start, count, when):
    """Nothing outside the run has changed."""
    for part, old in zip(quantize.from_packed(got), quantize.from_packed(before)):
        part, old = (np.asarray(x, np.float32) for x in (part, old))
        per_row = 128 * before.codes.shape[2] // part.shape[2]
        for b, (first, yes) in enumerate(zip(np.asarray(start), np.asarray(when))):
            row = np.arange(part.shape[2]) * per_row
            outside = (row < first) | (row >= first + count) if yes else row >= 0
            np.testing.assert_array_equal(part[b][:, outside], old[b][:, outside])


def draw_append(rng, codec, h=64, heads=2, window=128, first=0, dtype=jnp.float32):
    """Three sequences: one with a full window, one without, and one that does not accept."""
    group = codec.token_group
    packed = segment(rng, codec, 3, heads, 3, h, dtype)
    rows = [numbers(rng, 3, heads, window, h).astype(dtype) for _ in range(2)]
    new = [numbers(rng, 3, heads, 1, h).astype(dtype) for _ in range(2)]
    filled = jnp.asarray([window - 1, rng.integers(0, window - 1), window - 1], jnp.int32)
    length = jnp.asarray(rng.integers(0, 256 // group, 3) * group, jnp.int32)
    return new, jnp.asarray([True, True, False]), rows, filled, packed, length


def draw_rotation(rng, new, group) -> tuple[Rotation, list, jax.Array]:
    """Queries, units and, of several queries, balances, and what new rows and queries become."""
    b, heads, _, h = new[0].shape
    query = numbers(rng, b, 1, heads * group, h).astype(new[0].dtype)
    # Of smaller units rows would become larger than scales of eight bits can hold.
    units = [jnp.asarray(2.0 ** rng.integers(-2, 4, (b, heads)), jnp.float32) for _ in range(2)]
    balances = [jnp.asarray(2.0 ** rng.integers(-4, 4, (b, heads, h)), jnp.bfloat16) for _ in range(2)]
    if group == 1:
        balances = [jnp.ones_like(x) for x in balances]

    def balanced(x, balance):  # exact in every dtype
        return x * balance.astype(x.dtype)

    held = [balanced(x, balance[:, :, None]) for x, balance in zip(new, balances)]
    held = [(turn(x) / unit[..., None, None]).astype(x.dtype) for x, unit in zip(held, units)]
    asked = balanced(query, jnp.repeat(1 / balances[0], group, axis=1)[:, None])
    asked = turn(asked) * jnp.repeat(units[0], group, axis=1)[:, None, :, None]
    return Rotation(query, *units, *(balances if group > 1 else ())), held, asked.astype(query.dtype)


def check_append(run, rng, codec, first=0, keeps=0, group=None, **sizes):
    """With `group`, so many queries of each head come along, and all that is new is rotated."""
    new, accept, rows, filled, packed, length = draw_append(rng, codec, first=first, **sizes)
    rotation, held, asked = (None, new, None) if group is None else draw_rotation(rng, new, group)

    def append(packed):
        return expected_append(held, accept, rows, filled, packed, length, first, keeps)

    # A GPU's short products would round what feedback adds: one code in some goes another way, and all after it.
    with jax.default_matmul_precision("highest"):
        want = append(packed)
        steady = steady_groups(rng, packed, want, append) if codec.key_feedback == "all" else True
    about = dict(first=first, keeps=keeps, options=options(packed), rotation=rotation)
    got = run(*new, accept, *rows, filled, packed.keys, packed.values, length, **about)
    for name in ("window_length", "length"):
        np.testing.assert_array_equal(np.asarray(getattr(got, name)), np.asarray(getattr(want, name)))
    pairs = [(got.window_key, want.window_key), (got.window_value, want.window_value), (got.query, asked)]
    for one, other in pairs[: 2 if group is None else 3]:
        # A rotation's sums come in another order, and what that tips is a last digit of the rows' dtype.
        other, eps = np.asarray(other, np.float32), float(jnp.finfo(other.dtype).eps)
        off = {"rtol": eps, "atol": 1e-6 * np.abs(other).max()} if group else {"rtol": 0}
        np.testing.assert_allclose(np.asarray(one, np.float32), other, **off)
    full = accept & (filled + 1 == rows[0].shape[2])
    count = rows[0].shape[2] - first - keeps
    assert np.sum(np.logical_not(steady)) <= np.sum(full) * rows[0].shape[1] * count // codec.token_group / 2
    for name, groups in (("keys", steady), ("values", True)):
        same_codes(getattr(got, name), getattr(want, name), groups)
        untouched(getattr(got, name), getattr(packed, name), length, count, full)


def check_write(run, rng, codec, h=64, ring=129, window=128):
    """KIVI's way: a window of keys, and one value out of a ring."""
    packed = segment(rng, codec, 3, 2, 3, h)
    start = jnp.asarray(rng.integers(0, 256 // 128, 3) * 128, jnp.int32)
    key = Run(numbers(rng, 3, 2, window, h), jnp.zeros(3, jnp.int32), start, jnp.asarray([True, False, True]), window)
    at, first = (jnp.asarray(rng.integers(0, n, 3), jnp.int32) for n in (384, ring))
    value = Run(numbers(rng, 3, 2, ring, h), first, at, jnp.asarray([True, True, False]), 1)
    want = expected_write(packed, key, value)
    got = run(key, value, packed.keys, packed.values, options=options(packed))
    for part, expected, before, run_ in zip(got, want, (packed.keys, packed.values), (key, value)):
        same_codes(part, expected)
        untouched(part, before, run_.start, run_.count, run_.when)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("h", [64, 128])
@pytest.mark.parametrize("name", CODECS)
def test_append_matches_the_cache_on_a_gpu(name, h, dtype):
    check_append(packed_append,
                 draws.rng(), CODECS[name], h=h, heads=8, dtype=dtype)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("h", [64, 128])
@pytest.mark.parametrize("group", [1, 4, 6])
def test_append_rotates_on_a_gpu(group, h, dtype):
    codec = CODECS["3 and 2 bits, fp8, clipped"]
    check_append(packed_append, draws.rng(), codec, h=h, heads=8, dtype=dtype, group=group)


@pytest.mark.gpu
@settings(max_examples=10)
@given(first=st.sampled_from([0, 4]), keeps=st.sampled_from([0, 64]))
def test_append_takes_every_length_on_a_gpu(first, keeps):
    name = "3 and 2 bits, fp8, clipped"
    check_append(packed_append, draws.rng(), CODECS[name], first=first, keeps=keeps, window=128 + first)


@pytest.mark.gpu
def test_write_matches_the_cache_on_a_gpu():
    for _ in range(5):
        check_write(packed_write, draws.rng(), CODECS["KIVI's groups"])


QUICK = "test_append and 2-bit or merging"


@pytest.mark.parametrize("which", [QUICK, pytest.param("test", marks=pytest.mark.slow)])
@pytest.mark.promise("The append kernels write the codes that the cache writes without them")
def test_the_interpreter_agrees(which):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", which]
    command.append(str(Path(__file__).with_name("interpreted_kernels.py")))
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({}, "CUDA GPU"),
        ({"codec": Codec(2, 2, 8, 16)}, "groups of 8 tokens"),
        ({"codec": Codec(1, 2, 16, 16)}, "1-bit keys"),
        ({"codec": Codec(2, 2, 16, 16, key_axis="channels")}, "channels"),
        ({"h": 16}, "head size 16"),
    ],
)
def test_what_cannot_run_is_declined(change, match):
    if not change and jax.default_backend() == "gpu":
        pytest.skip("this machine can")
    codec = change.get("codec", CODECS["2-bit"])
    new, accept, rows, filled, packed, length = draw_append(draws.rng(), codec, h=change.get("h", 64), heads=1)
    with pytest.raises(NotImplementedError, match=match):
        packed_append(*new, accept, *rows, filled, packed.keys, packed.values, length, implementation="triton")


def test_windows_of_two_dtypes_are_declined():
    new, accept, rows, *rest, packed, length = draw_append(draws.rng(), CODECS["2-bit"], heads=1)
    rows[0] = rows[0].astype(jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="bfloat16 and float32"):
        packed_append(*new, accept, *rows, *rest, packed.keys, packed.values, length, implementation="triton")


def test_shapes_that_contradict_each_other_are_refused():
    new, accept, rows, filled, packed, length = draw_append(draws.rng(), CODECS["2-bit"], heads=1)
    rest = (filled, packed.keys, packed.values, length)
    with pytest.raises(ValueError, match="do not fit windows"):
        packed_append(new[0][:, :, :, :8], new[1], accept, *rows, *rest)
    with pytest.raises(ValueError, match="Counters"):
        packed_append(*new, accept[:2], *rows, *rest)
    with pytest.raises(ValueError, match="first=128"):
        packed_append(*new, accept, *rows, *rest, first=128)
    with pytest.raises(ValueError, match="keeps=65"):
        packed_append(*new, accept, *rows, *rest, keeps=65)
    for query, unit, match in (((3, 1, 2, 32), (3, 1), "Query"), ((3, 1, 2, 64), (3, 2), "Units")):
        rotation = Rotation(jnp.zeros(query), jnp.ones(unit), jnp.ones(unit))
        with pytest.raises(ValueError, match=match):
            packed_append(*new, accept, *rows, *rest, rotation=rotation)
    half = Rotation(jnp.zeros((3, 1, 2, 64)), jnp.ones((3, 1)), jnp.ones((3, 1)), jnp.ones((3, 1, 64)))
    with pytest.raises(ValueError, match="Balances"):
        packed_append(*new, accept, *rows, *rest, rotation=half)
    with pytest.raises(ValueError, match="key_coupling"):
        packed_append(*new, accept, *rows, *rest, options=Options(key_coupling=jnp.zeros((3, 1, 64, 64))))


COMPILED = [
    (90, "2-bit", "append_kernel"),
    pytest.param(90, "3 and 2 bits, fp8, clipped", "append_kernel", marks=pytest.mark.slow),
    pytest.param(80, "3 and 2 bits, fp8, clipped", "append_kernel", marks=pytest.mark.slow),
    pytest.param(90, "by feedback", "append_kernel", marks=pytest.mark.slow),
    pytest.param(80, "by feedback", "append_kernel", marks=pytest.mark.slow),
    pytest.param(100, "4 and 8 bits, bfloat16", "append_kernel", marks=pytest.mark.slow),
    pytest.param(80, "KIVI's groups", "write_kernel", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("capability", "name", "kernel"), COMPILED)
def test_compiles_for(capability, name, kernel):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pallas_kernels.packed_append import _triton_kernels as kernels

    codec = CODECS[name]
    packed = segment(draws.rng(), codec, 1, 1, 1, 128)
    constants = implementation.constants(packed.keys, packed.values, options(packed), capability >= 89)
    kind = {0: "*fp16", 1: "*bf16", 2: "*fp8e4nv", 3: "*u8"}[constants["KKIND"]]
    metadata = dict.fromkeys(("ks", "kz", "vs", "vz"), kind) | dict.fromkeys(("kc", "vc"), "*u8")
    metadata |= {f"_{key}": value for key, value in metadata.items()} | dict.fromkeys(("heads", "blocks"), "i32")
    scratch = dict.fromkeys(("key_scratch", "value_scratch"), "*u8") | {"unfolded": "*fp32"}
    if kernel == "append_kernel":
        constants |= {"WINDOW": 128, "FIRST": 0, "KEEPS": 64 if packed.keys.group_size <= 64 else 0}
        constants["BALANCED"] = constants["KKIND"] >= 2  # what has metadata of 8 bits is balanced and rotated
        constants["QUERIES"] = 6 if constants["BALANCED"] else 0
        names = ("new_rows", "_window_key", "_window_value", "window_key", "window_value", "query")
        names += ("key_balance", "value_balance")
        types = dict.fromkeys(names, "*bf16") | dict.fromkeys(("key_unit", "value_unit"), "*fp32")
        counters = ("accept", "window_length", "length")
    else:
        constants |= {"KROWS": 128, "KCOUNT": 128, "VROWS": 129, "VCOUNT": 1}
        types = dict.fromkeys(("key_rows", "value_rows"), "*bf16")
        counters = [f"{part}_{name}" for part in ("key", "value") for name in ("first", "start", "when")]
    counters = (*counters, "key_factor")
    metadata["key_coupling"] = kind if codec.key_feedback == "all" else "*i32"
    types |= dict.fromkeys(counters, "*i32") | metadata | scratch | dict.fromkeys(constants, "constexpr")
    function = getattr(kernels, kernel)
    types = {name: types[name] for name in function.arg_names}
    source = ASTSource(function, types, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
    assert compiled.metadata.shared <= 48 << 10
