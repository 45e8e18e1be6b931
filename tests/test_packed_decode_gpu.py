"""The Triton kernel on a CUDA device, against float64."""

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_packed_decode import (
    FORMATS,
    TWO_TIERS,
    attention,
    check_nothing_beyond_the_length,
    check_together,
    compare,
    compare_dense,
    dequantised,
    error,
    segment,
)

from pallas_kernels.packed_decode.api import Part, decode_attention, packed_decode_attention

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("h", [64, 128])
@pytest.mark.parametrize("name", FORMATS)
def test_triton_matches_float64(name, h):
    assert compare("triton", FORMATS[name], h=h, blocks=3, lengths=[[384, 100], [0, 257]]) < 2e-3


@pytest.mark.parametrize("t", [1, 2, 8])
@pytest.mark.parametrize("heads", [(1, 8), (8, 4), (4, 1), (3, 3)])
def test_triton_takes_every_grouping(heads, t):
    k, group = heads
    for name in ("2-bit", "2-bit, fp8"):
        assert compare("triton", FORMATS[name], heads=k, group=group, t=t, h=128, blocks=9) < 2e-3


@pytest.mark.parametrize("blocks", [1, 40, 300])
def test_triton_takes_every_capacity(blocks):
    assert compare("triton", FORMATS["2-bit"], h=128, blocks=blocks) < 2e-3


@pytest.mark.parametrize("name", ["2-bit", "2-bit, fp8", "4-bit, fp8"])
@pytest.mark.parametrize("length", [0, 1, 64, 65, 127, 128, 200, 384])
def test_triton_reads_nothing_beyond_the_length(length, name):
    check_nothing_beyond_the_length("triton", length, FORMATS[name], h=128)


@pytest.mark.parametrize("name", ["2-bit", "2 and 4 bits, groups of 128"])
@pytest.mark.parametrize("scales", [[0.0], [1e-6], [1e4], [0.0, 1e-6, 0.1, 1e4]])
def test_triton_takes_adversarial_scales(scales, name):
    rng = draws.rng()
    keys, values = segment(rng, 1, 2, 2, 128, FORMATS[name], scales=scales)
    query = jnp.asarray(rng.normal(size=(1, 1, 4, 128)) * 1e-3, jnp.bfloat16)
    got = packed_decode_attention(query, keys, values, jnp.asarray([200]), implementation="triton")
    want = attention(query, dequantised(keys), dequantised(values), np.full((1, 2), 200), 128**-0.5)
    assert error(got, want) < 2e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("h", "t"), [(64, 1), (128, 1), (256, 2), (128, 8)])
@pytest.mark.parametrize("heads", [(1, 8), (8, 4), (4, 1), (3, 3)])
def test_dense_rows(heads, h, t, dtype):
    worst = compare_dense("triton", heads=heads[0], group=heads[1], t=t, h=h, s=777, dtype=dtype)
    assert worst < {"bfloat16": 4e-3, "float16": 1e-3, "float32": 1e-5}[dtype]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("h", "width"), [(64, 40), (128, 64), (128, 80), (256, 160)])
def test_dense_keys_narrower_than_values(h, width, dtype):
    worst = compare_dense("triton", heads=4, group=4, h=h, width=width, s=777, dtype=dtype)
    assert worst < {"bfloat16": 4e-3, "float32": 1e-5}[dtype]


@pytest.mark.parametrize("s", [1, 63, 64, 65, 5000])
def test_dense_rows_of_every_capacity(s):
    assert compare_dense("triton", h=128, s=s, dtype="float16") < 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("t", [1, 4])
@pytest.mark.parametrize("heads", [(2, 2), (8, 4), (1, 12)])
def test_segments_attend_together(heads, t, dtype):
    check_together("triton", t=t, heads=heads[0], group=heads[1], h=128, dtype=dtype)
    check_together("triton", t=t, heads=heads[0], group=heads[1], h=128, dtype=dtype, **TWO_TIERS)


@pytest.mark.parametrize(("tiers", "rows", "launches"), [(1, 128, 2), (1, 1024, 3), (2, 128, 3)])
def test_a_window_joins_the_launch_of_the_codes_before_it(tiers, rows, launches):
    rng = draws.rng()
    keys, values = segment(rng, 1, 8, 4, 128, FORMATS["2-bit"])
    query = jnp.zeros((1, 1, 32, 128), jnp.bfloat16)
    window = jnp.zeros((1, 8, rows, 128), jnp.bfloat16)

    @jax.jit
    def attend(query, keys, values, window, lengths):
        return decode_attention([Part(query, keys, values, lengths)] * tiers + [Part(query, window, window, lengths)])

    program = attend.lower(query, keys, values, window, jnp.asarray([100])).compile().as_text()
    assert program.count('custom_call_target="triton_kernel_call_ffi"') == launches
