"""What `test_packed_append.py` runs with TRITON_INTERPRET=1: the append kernels' own source, on numpy."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import triton as triton_language
import triton.language as tl
from test_packed_append import CODECS, check_append, check_write, draw_append, options, same_codes

from pallas_kernels.packed_append import _triton_kernels as kernels
from pallas_kernels.packed_append import triton
from pallas_kernels.packed_append.triton import Appended


class Tensor:
    """As much of a torch tensor as the interpreter asks for, over a numpy array that it changes in place."""

    def __init__(self, array):
        array = np.asarray(array)
        self.dtype = {"bool": "int1"}.get(array.dtype.name, array.dtype.name)
        if self.dtype == "float8_e4m3fn":
            array, self.dtype = array.view(np.uint8), "uint8"
        self.array = np.array(array, order="C")

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def new_empty(self, *_, **__):
        return self

    def set_(self, *_):
        pass

    def copy_(self, _):
        pass

    def storage_offset(self):
        return 0

    size = stride = storage_offset


def tensors(*packed):
    return [Tensor(x) for p in packed for x in (p.codes, p.scale, p.zero)]


def factors(options, b):
    instead = np.zeros(b, np.int32)
    return [Tensor(instead if x is None else x) for x in (options.key_factor, options.value_factor)]


def append(new_key, new_value, accept, *state, first, options):
    window_key, window_value, window_length, keys, values, length = state
    b, heads, window, h = window_key.shape
    counters = [Tensor(np.asarray(x, np.int32)) for x in (accept, window_length, length)]
    changed = [Tensor(window_key), Tensor(window_value), *tensors(keys, values)]
    out = [Tensor(np.full(b, -1, np.int32)) for _ in range(2)]
    scratch = [Tensor(np.full((b, heads, window - first, h), 77, np.uint8)) for _ in range(2)]
    inputs = [Tensor(new_key), Tensor(new_value), *counters, *factors(options, b), *changed]
    kernels.append_kernel[(b * heads, 2)](
        *inputs, -heads, -keys.codes.shape[2], *changed, *out, *scratch,
        WINDOW=window, FIRST=first, **triton.constants(keys, values, options),
    )  # fmt: skip
    window_key, window_value, *packed = (x.array for x in changed)
    return Appended(window_key, window_value, out[0].array, *unpacked(packed, keys, values), out[1].array)


def write(key, value, keys, values, *, options):
    b, heads, _, h = key.rows.shape
    inputs, scratch = [], []
    for run in (key, value):
        inputs += [Tensor(run.rows), *(Tensor(np.asarray(x, np.int32)) for x in (run.first, run.start, run.when))]
        scratch.append(Tensor(np.full((b, heads, run.count, h), 77, np.uint8)))
    changed = tensors(keys, values)
    constants = triton.constants(keys, values, options)
    kernels.write_kernel[(b * heads, 2)](
        *inputs, *factors(options, b), *changed, -heads, -keys.codes.shape[2], *changed, *scratch,
        KROWS=key.rows.shape[2], KCOUNT=key.count, VROWS=value.rows.shape[2], VCOUNT=value.count, **constants,
    )  # fmt: skip
    return unpacked([x.array for x in changed], keys, values)


def unpacked(arrays, keys, values):
    def one(like, codes, scale, zero):
        dtype = like.scale.dtype
        scale, zero = (jnp.asarray(x.view(dtype)) for x in (scale, zero))
        return dataclasses.replace(like, codes=jnp.asarray(codes), scale=scale, zero=zero)

    return one(keys, *arrays[:3]), one(values, *arrays[3:])


@pytest.mark.parametrize(("first", "name"), [(0, name) for name in CODECS] + [(64, list(CODECS)[2])])
def test_append(name, first):
    check_append(append, np.random.default_rng(), CODECS[name], heads=1, first=first, window=128 + first)


@pytest.mark.parametrize("name", ["KIVI's groups"])
def test_write(name):
    check_write(write, np.random.default_rng(), CODECS[name])


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", 1), ("float8_e4m3fn", 2)])
@pytest.mark.parametrize("towards", [-1, 0, 1])
def test_metadata_rounds_to_the_neighbour_it_should(dtype, kind, towards):
    rng = np.random.default_rng()
    x = np.concatenate([rng.standard_normal(500) * 10.0 ** rng.uniform(-4, 2, 500), np.arange(-6, 6) / 1024])
    x = np.clip(x, -448, 448).astype(np.float32)
    got = Tensor(np.zeros(512, np.uint8 if kind == 2 else np.uint16))
    got.dtype = "uint8" if kind == 2 else "bfloat16"
    round_kernel[(1,)](Tensor(x), got, KIND=kind, TOWARDS=towards)
    every = np.arange(1 << (8 * got.array.itemsize)).astype(got.array.dtype).view(jnp.dtype(dtype)).astype(np.float32)
    every = np.unique(every[np.isfinite(every)])
    down, up = every[np.searchsorted(every, x, "right") - 1], every[np.searchsorted(every, x, "left")]
    want = {-1: down, 1: up, 0: np.asarray(jnp.asarray(x).astype(dtype), np.float32)}[towards]
    np.testing.assert_array_equal(got.array.view(jnp.dtype(dtype)).astype(np.float32), want)


@pytest.mark.parametrize("name", ["2-bit", list(CODECS)[2]])
def test_factors_multiply_what_is_encoded(name):
    rng, codec = np.random.default_rng(), CODECS[name]
    new, accept, rows, filled, packed, length = draw_append(rng, codec, heads=2)
    unit = jnp.asarray(2.0 ** rng.integers(-3, 3, (3, 2)), jnp.float32)
    state = filled, packed.keys, packed.values, length
    more = options(codec)._replace(
        key_factor=jnp.broadcast_to(unit[..., None], (3, 2, 64)), value_factor=1 / unit
    )  # fmt: skip
    got = append(*new, accept, *rows, *state, first=0, options=more)
    new, rows = ([x * f[..., None, None] for x, f in zip(pair, (unit, 1 / unit))] for pair in (new, rows))
    want = append(*new, accept, *rows, *state, first=0, options=options(codec))
    for a, b in zip(got[3:5], want[3:5]):
        same_codes(a, b)


@triton_language.jit
def round_kernel(source, target, KIND: tl.constexpr, TOWARDS: tl.constexpr):
    at = tl.arange(0, 512)
    tl.store(target + at, kernels.to_stored(tl.load(source + at), KIND, TOWARDS))
