"""What `test_packed_append.py` runs with TRITON_INTERPRET=1: the append kernels' own source, on numpy."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from test_packed_append import CODECS, check_append, check_write

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


def append(new_key, new_value, accept, window_key, window_value, window_length, keys, values, length, *, first,
           rotate_keys, rotate_values, clip):  # fmt: skip
    b, heads, window, h = window_key.shape
    counters = [Tensor(np.asarray(x, np.int32)) for x in (accept, window_length, length)]
    changed = [Tensor(window_key), Tensor(window_value), *tensors(keys, values)]
    out = [Tensor(np.full(b, -1, np.int32)) for _ in range(2)]
    scratch = [Tensor(np.full((b, heads, window - first, h), 77, np.uint8)) for _ in range(2)]
    constants = triton.format_constants(keys, values, (rotate_keys, rotate_values), clip)
    kernels.append_kernel[(b * heads, 2)](
        Tensor(new_key), Tensor(new_value), *counters, *changed, -heads, -keys.codes.shape[2], *changed, *out, *scratch,
        WINDOW=window, FIRST=first, **constants,
    )  # fmt: skip
    window_key, window_value, *packed = (x.array for x in changed)
    return Appended(window_key, window_value, out[0].array, *unpacked(packed, keys, values), out[1].array)


def write(key, value, keys, values, *, rotate_keys, rotate_values, clip):
    b, heads, _, h = key.rows.shape
    inputs, scratch = [], []
    for run in (key, value):
        inputs += [Tensor(run.rows), *(Tensor(np.asarray(x, np.int32)) for x in (run.first, run.start, run.when))]
        scratch.append(Tensor(np.full((b, heads, run.count, h), 77, np.uint8)))
    changed = tensors(keys, values)
    constants = triton.format_constants(keys, values, (rotate_keys, rotate_values), clip)
    kernels.write_kernel[(b * heads, 2)](
        *inputs, *changed, -heads, -keys.codes.shape[2], *changed, *scratch,
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
