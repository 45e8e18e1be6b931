"""What `test_packed_append.py` runs in a process of its own: the append kernels, and the one that joins shares of
attention, called as they are, on numpy."""

import triton_interpreter  # isort: skip

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton
import triton.language as tl
from test_packed_append import CODECS, check_append, check_write
from test_packed_decode import compare_dense

from pallas_kernels.hadamard import hadamard
from pallas_kernels.packed_append import _triton_kernels as kernels
from pallas_kernels.packed_append.api import packed_append, packed_write
from pallas_kernels.packed_decode import triton as decode
from pallas_kernels.packed_decode.api import dense_decode_attention
from pallas_kernels.packed_decode.triton import Shares


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


FIRST_AND_KEEPS = [(0, 0, name) for name in CODECS] + [(4, 0, list(CODECS)[2]), (4, 64, list(CODECS)[2])]


@pytest.mark.parametrize(("first", "keeps", "name"), FIRST_AND_KEEPS)
def test_append(name, first, keeps):
    sizes = dict(heads=1, first=first, keeps=keeps, window=128 + first)
    check_append(packed_append, draws.rng(), CODECS[name], **sizes)


@pytest.mark.parametrize("group", [1, 6])
def test_append_rotates(group):
    codec = CODECS["3 and 2 bits, fp8, clipped"]
    check_append(packed_append, draws.rng(), codec, group=group)


@pytest.mark.parametrize(("h", "width"), [(64, 64), (64, 40), (128, 80)])
def test_dense_keys_as_wide_as_values_and_narrower(h, width):
    worst = compare_dense("triton", t=2, h=h, width=width, s=130, attend=dense_decode_attention)
    assert worst < 1e-5


@pytest.mark.parametrize(("splits", "h"), [((1,), 32), ((2,), 64), ((5, 3), 128), ((1, 1), 256)])
def test_merging_rotates(splits, h):
    """The kernel that joins shares of attention, beside plain sums and a product."""
    rng, (b, heads, group) = draws.rng(), (2, 3, 2)
    unit = 2.0 ** rng.integers(-4, 4, (b, heads))
    drawn, output, total = [], 0, 0
    for n in splits:
        part, top = rng.normal(size=(b * heads, n, group, h)), rng.normal(size=(b * heads, n, group))
        held = rng.uniform(0.1, 2, top.shape)
        output += (part * 2.0 ** top[..., None]).sum(1)
        total += (held * 2.0**top).sum(1)
        drawn.append(Shares(*(jnp.asarray(x, jnp.float32) for x in (part, np.stack([top, held], -1), top))))
    want = (output / total[..., None]) @ hadamard(h) * unit.reshape(-1, 1, 1)
    query, units = jnp.zeros((b, 1, heads * group, h)), jnp.asarray(unit, jnp.float32)
    got, lse, _ = decode._merge(query, heads, drawn[0], [*drawn, None][1], normalize=True, unit=units)
    np.testing.assert_allclose(np.asarray(got).reshape(want.shape), want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.asarray(lse).reshape(total.shape), np.log(total), rtol=1e-4, atol=1e-4)


def test_write():
    check_write(packed_write, draws.rng(), CODECS["KIVI's groups"])


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", 1), ("float8_e4m3fn", 3)])
@pytest.mark.parametrize("towards", [-1, 0, 1])
def test_metadata_rounds_to_the_neighbour_it_should(dtype, kind, towards):
    rng, dtype = draws.rng(), jnp.dtype(dtype)
    x = np.concatenate([rng.standard_normal(500) * 10.0 ** rng.uniform(-4, 2, 500), np.arange(-6, 6) / 1024])
    x = np.clip(x, -448, 448).astype(np.float32)
    stored = jnp.bfloat16 if kind == 1 else jnp.uint8
    got = triton_interpreter.triton_call(
        jnp.asarray(x), kernel=round_kernel, out_type=jax.ShapeDtypeStruct(x.shape, stored), grid=(1,), KIND=kind,
        TOWARDS=towards,
    )  # fmt: skip
    every = np.arange(1 << (8 * dtype.itemsize)).astype(f"uint{8 * dtype.itemsize}").view(dtype).astype(np.float32)
    every = np.unique(every[np.isfinite(every)])
    down, up = every[np.searchsorted(every, x, "right") - 1], every[np.searchsorted(every, x, "left")]
    want = {-1: down, 1: up, 0: np.asarray(jnp.asarray(x).astype(dtype), np.float32)}[towards]
    np.testing.assert_array_equal(np.asarray(got).view(dtype).astype(np.float32), want)


def test_division_rounds_as_it_should():
    """Quotients, ties between two codes and their neighbours among them, from reciprocals some digits off."""
    rng, n = draws.rng(), 512
    by = (rng.integers(1, 2048, n) * 2.0 ** rng.integers(-14, 0, n)).astype(np.float32)
    ties = ((rng.integers(0, 255, n) + 0.5) * by).astype(np.float32)
    ties = ties.view(np.int32) + rng.integers(-2, 3, n).astype(np.int32)
    x = np.where(rng.random(n) < 0.5, ties.view(np.float32), rng.uniform(0, 255, n).astype(np.float32) * by)
    over = (1 / by).view(np.int32) + rng.integers(-2, 3, n).astype(np.int32)
    arrays = [jnp.asarray(y) for y in (x, by, over.view(np.float32))]
    got = triton_interpreter.triton_call(
        *arrays, kernel=divide_kernel, out_type=jax.ShapeDtypeStruct(x.shape, jnp.float32), grid=(1,)
    )
    np.testing.assert_array_equal(np.asarray(got), x / by)


@triton.jit
def divide_kernel(x, by, over, target):
    at = tl.arange(0, 512)
    tl.store(target + at, kernels.divide(tl.load(x + at), tl.load(by + at), tl.load(over + at)))


@triton.jit
def round_kernel(source, target, KIND: tl.constexpr, TOWARDS: tl.constexpr):
    at = tl.arange(0, 512)
    tl.store(target + at, kernels.to_stored(tl.load(source + at), KIND, TOWARDS))
