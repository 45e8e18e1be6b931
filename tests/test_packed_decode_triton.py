"""The Triton kernel without a GPU: its arithmetic lane by lane in numpy, and its compilation for several chips."""

import draws
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_packed_decode import FORMATS, attention, dequantised, error, poison, segment

from pallas_kernels.partial import Partial

pytest.importorskip("triton")

import triton
import triton_warp
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pallas_kernels.packed_decode import _triton_kernels as kernels
from pallas_kernels.packed_decode.api import Part
from pallas_kernels.packed_decode.triton import choose_splits, choose_window_splits, constants


def simulate(query, keys, values, lengths, splits, window=None, window_splits=0, float8=True) -> Partial:
    """The kernel's programs in numpy, and the merge of their shares. `window` is a `Part`."""
    b, t, n, h = query.shape
    heads, blocks = keys.codes.shape[1:3]
    group = n // heads
    rows = t * group
    shares = splits + window_splits
    tensors = [query.astype(jnp.float32), *(x for p in (keys, values) for x in (p.codes, p.scale, p.zero)), lengths]
    tensors += window or [query, query, query, lengths]
    arrays = [np.asarray(x) for x in tensors]
    arrays += [np.full((b * heads, shares, rows, width), np.nan, np.float32) for width in (h, 2)]
    arrays.append(np.full((b * heads, rows, blocks * 128), np.nan, np.float32))
    window_rows = window.keys.shape[2] if window else 0
    sizes = [
        np.float32(h**-0.5),
        *(-x for x in (blocks, heads, group, rows, splits, window_rows, window_splits, b * heads)),
    ]
    grid = (-(-rows // 8), shares * b * heads, 1)
    scalars = dict(zip(range(12, 21), sizes))
    kind = {"LOGITS": True, "PER_HEAD": True, "WINDOW": {None: 0, "float16": 1, "bfloat16": 2}[_dtype(window)]}
    result = triton_warp.run(
        kernels, "decode_kernel", grid, arrays, scalars, constants(keys, values, rows, float8) | kind
    )
    part, stats = (x.reshape(b * heads, shares, rows, -1) for x in result[-3:-1])
    check_logits(result[-1].reshape(b * heads, rows, -1), query, keys, lengths)
    top = stats[..., 0].max(axis=1)
    weight = np.exp2(stats[..., 0] - np.where(np.isneginf(top), 0, top)[:, None])
    output = (part * weight[..., None]).sum(axis=1)

    def unrows(x):
        x = x.reshape(b, heads, t, group, *x.shape[2:])
        return x.swapaxes(1, 2).reshape(b, t, n, *x.shape[4:])

    return Partial(unrows(output), unrows(top) * np.log(2), unrows((stats[..., 1] * weight).sum(axis=1)))


def _dtype(window) -> str | None:
    return window.keys.dtype.name if window else None


def check_logits(logits, query, keys, lengths):
    """Of the tokens held, those of the definition; of others, nothing is written."""
    b, t, n, h = query.shape
    heads = keys.codes.shape[1]
    query = np.asarray(query.astype(jnp.float32), np.float64).reshape(b, t, heads, n // heads, h).swapaxes(1, 2)
    want = np.einsum("bktgh,bksh->bktgs", query, dequantised(keys)) * h**-0.5 / np.log(2)
    want = want.reshape(logits.shape)
    held = np.broadcast_to((np.arange(want.shape[-1]) < lengths.reshape(-1)[:, None])[:, None], want.shape)
    assert np.isnan(logits[~held]).all()
    largest = np.abs(want[held]).max(initial=1e-30)
    np.testing.assert_allclose(logits[held] / largest, want[held] / largest, atol=3e-3)


def check(
    fmt, *, h=64, heads=1, group=2, t=1, scales=None, query_size=1.0, splits=2, lengths=((200,), (128,), (0,)), **more
):
    rng = draws.rng()
    b = len(lengths)
    keys, values = segment(rng, b, heads, 2, h, fmt, scales=scales)
    query = jnp.asarray(rng.normal(size=(b, t, heads * group, h)) * query_size, jnp.bfloat16)
    lengths = np.asarray(lengths, np.int32)
    got = simulate(query, keys, values, lengths, splits, **more)
    return error(got, attention(query, dequantised(keys), dequantised(values), lengths, h**-0.5))


@pytest.mark.parametrize("h", [64, 128])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.promise("Triton's decode kernel computes attention in every format of codes")
def test_lanes_compute_attention(name, h):
    assert check(FORMATS[name], h=h) < 1e-3


@pytest.mark.parametrize("name", ["3 and 2 bits, fp8", "2-bit, fp8", "3-bit, half heads, fp8"])
def test_lanes_take_float8_on_chips_without_it(name):
    assert check(FORMATS[name], float8=False) < 1e-3


# Up to four rows meet both halves of a block at once, in formats that allow it.
@pytest.mark.parametrize("name", ["2-bit", "2-bit, fp8"])
@pytest.mark.parametrize(("group", "t"), [(1, 1), (4, 1), (1, 3), (5, 1), (8, 1), (3, 3), (4, 8)])
def test_lanes_take_every_grouping(group, t, name):
    assert check(FORMATS[name], group=group, t=t) < 1e-3


@pytest.mark.parametrize("name", ["2-bit", "2 and 4 bits, groups of 128"])
@pytest.mark.parametrize("scales", [[0.0], [1e-6], [1e4], [0.0, 1e-6, 0.1, 1e4]])
def test_lanes_take_adversarial_scales(scales, name):
    # Scales of 1e4 make logits of 20 to 80, sums of 64 products. The kernel rounds a query times its scale to bfloat16:
    # up to 2^-9 of each product, 80 / 8 times that of their sum, and a weight is off by as much. 4.5e-3 in 120 draws.
    assert check(FORMATS[name], scales=scales, query_size=1e-3) < (2e-3 if max(scales) < 1 else 2**-9 * 10)


@pytest.mark.parametrize("length", [1, 64, 65, 127, 200])
@pytest.mark.parametrize("name", ["2-bit", "3 and 2 bits, fp8", "2-bit, fp8"])
def test_lanes_read_nothing_beyond_the_length(name, length):
    rng = draws.rng()
    keys, values = segment(rng, 1, 1, 2, 64, FORMATS[name])
    query, lengths = jnp.asarray(rng.normal(size=(1, 1, 2, 64)), jnp.float32), np.asarray([[length]], np.int32)
    clean = simulate(query, keys, values, lengths, 1)
    for a, b in zip(clean, simulate(query, poison(keys, length), poison(values, length), lengths, 1)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("dtype", "h", "group", "t", "window_splits"),
    [("bfloat16", 128, 4, 1, 2), ("float16", 64, 3, 3, 1), ("bfloat16", 64, 1, 1, 3)],
)
def test_lanes_take_a_window_along(dtype, h, group, t, window_splits):
    """Codes and a window, each from nothing to full; what lies beyond a window's length is NaN."""
    rng = draws.rng()
    form = FORMATS["2-bit, fp8"] if group == 4 else FORMATS["2-bit"]
    held = np.asarray([[200, 33], [0, 50], [130, 0], [128, 1], [0, 0], [5, 17]])
    b, heads = len(held), 2
    keys, values = segment(rng, b, heads, 2, h, form)
    query = jnp.asarray(rng.normal(size=(b, t, heads * group, h)), dtype)
    rows = [np.asarray(rng.normal(size=(b, heads, 50, h)), jnp.dtype(dtype)) for _ in range(2)]
    for x in rows:
        for i in range(b):
            x[i, :, held[i, 1] :] = np.nan
    window = Part(query, *rows, held[:, 1].astype(np.int32))
    lengths = np.repeat(held[:, :1], heads, axis=1).astype(np.int32)
    got = simulate(query, keys, values, lengths, 2, window, window_splits)
    for i in range(b):
        both = [
            np.concatenate([dequantised(p)[i, :, : held[i, 0]], np.asarray(x[i, :, : held[i, 1]], np.float64)], axis=1)
            for p, x in zip((keys, values), rows)
        ]
        want = attention(query[i : i + 1], *(x[None] for x in both), np.full((1, heads), held[i].sum()), h**-0.5)
        assert error([x[i : i + 1] for x in got], want) < 4e-3


@given(work=st.integers(1, 600), blocks=st.integers(1, 2000), tokens=st.integers(1, 512))
def test_shares_of_a_window(work, blocks, tokens):
    """As many as 32 tokens each make; fewer, by half at most, only where all shares then are a power of two."""
    splits = choose_splits(work, blocks, 132)
    beside = choose_window_splits(work, splits, tokens, 132)
    most = max(1, min(1320 // work - splits, -(-tokens // 32)))
    assert 1 <= beside <= most <= 2 * beside
    assert beside == most or (splits + beside).bit_count() == 1


@pytest.mark.usefixtures("triton_cache")
@pytest.mark.parametrize(
    ("capability", "name", "window"),
    [
        (90, "2-bit", 2),
        pytest.param(80, "2-bit", 1, marks=pytest.mark.slow),
        pytest.param(100, "2-bit", 0, marks=pytest.mark.slow),
        (90, "2-bit, fp8", 2),
        pytest.param(80, "3 and 2 bits, fp8", 2, marks=pytest.mark.slow),
        pytest.param(90, "groups of 16", 2, marks=pytest.mark.slow),
        pytest.param(90, "3-bit, half heads, fp8", 0, marks=pytest.mark.slow),
    ],
)
def test_compiles_for(capability, name, window):
    keys, values = segment(draws.rng(), 1, 1, 1, 128, FORMATS[name])
    constant = constants(keys, values, 4, capability >= 89) | {"LOGITS": False, "PER_HEAD": False, "WINDOW": window}
    types = dict.fromkeys(("kc", "ks", "kz", "vc", "vs", "vz"), "*u8")
    types = {"q": "*bf16", **types, "lengths": "*i32", **dict.fromkeys(("wq", "wk", "wv"), "*bf16")}
    types |= {"wlengths": "*i32", "softmax_scale": "fp32"}
    types |= dict.fromkeys(("capacity", "heads", "group", "rows", "splits", "window", "wsplits", "all_heads"), "i32")
    types |= dict.fromkeys(("out", "stats", "logits"), "*fp32")
    source = ASTSource(kernels.decode_kernel, types | dict.fromkeys(constant, "constexpr"), constexprs=constant)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 1})
    assert "mma.sync.aligned.m16n8k16" in compiled.asm["ptx"]
    assert "cp.async" in compiled.asm["ptx"]
    assert ".maxnreg" in compiled.asm["ptx"]
    assert ("e4m3x2" in compiled.asm["ptx"]) == ("fp8" in name and capability >= 89)
