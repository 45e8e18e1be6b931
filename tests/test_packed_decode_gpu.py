"""The Triton kernel on a CUDA device, against float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from test_packed_decode import (
    FORMATS,
    attention,
    check_nothing_beyond_the_length,
    compare,
    dequantised,
    error,
    segment,
)

from pallas_kernels.packed_decode.api import packed_decode_attention

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("h", [64, 128])
@pytest.mark.parametrize("name", FORMATS)
def test_triton_matches_float64(name, h):
    assert compare("triton", FORMATS[name], h=h, blocks=3, lengths=[[384, 100], [0, 257]]) < 2e-3


@pytest.mark.parametrize("t", [1, 2, 8])
@pytest.mark.parametrize("heads", [(1, 8), (8, 4), (4, 1), (3, 3)])
def test_triton_takes_every_grouping(heads, t):
    k, group = heads
    assert compare("triton", FORMATS["2-bit"], heads=k, group=group, t=t, h=128, blocks=9) < 2e-3


@pytest.mark.parametrize("blocks", [1, 40, 300])
def test_triton_takes_every_capacity(blocks):
    assert compare("triton", FORMATS["2-bit"], h=128, blocks=blocks) < 2e-3


@pytest.mark.parametrize("length", [0, 1, 127, 128, 200, 384])
def test_triton_reads_nothing_beyond_the_length(length):
    check_nothing_beyond_the_length("triton", length, FORMATS["2-bit"], h=128)


@pytest.mark.parametrize("scales", [[0.0], [1e-6], [1e4], [0.0, 1e-6, 0.1, 1e4]])
def test_triton_takes_adversarial_scales(scales):
    rng = np.random.default_rng(1)
    keys, values = segment(rng, 1, 2, 2, 128, FORMATS["2-bit"], scales=scales)
    query = jnp.asarray(rng.normal(size=(1, 1, 4, 128)) * 1e-3, jnp.bfloat16)
    got = packed_decode_attention(query, keys, values, jnp.asarray([200]), implementation="triton")
    want = attention(query, dequantised(keys), dequantised(values), np.full((1, 2), 200), 128**-0.5)
    assert error(got, want) < 2e-3
