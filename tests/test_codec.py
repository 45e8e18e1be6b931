"""A codec's knobs change how numbers are rounded, each as its paper says, and nothing else."""

import draws
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from layer import draw, run

from minikv_jax import presets
from pallas_kernels import quantize


def outputs(config, prompt, stream, lengths):
    return np.asarray(run(config, *prompt, np.array(lengths), stream).outputs)


@pytest.mark.parametrize(
    "knob", [{"rotate": True}, {"balance": True}, {"clip": (0.95, 0.9)}, {"metadata_dtype": "bfloat16"}]
)
@pytest.mark.parametrize("method", ["minikv", pytest.param("kivi", marks=pytest.mark.slow)])
def test_a_codec_knob_changes_rounding_only(method, knob):
    # At 8 bits the codes hardly round, so what is stored and what is asked must fit together whatever the knob.
    base = {"group_size": 8, "residual": 16}
    base |= {"bits": 8} if method == "minikv" else {"key_bits": 8, "value_bits": 8}
    prompt, stream = draw(draws.rng(), 2, 64, 40, 2, 2, 16)
    plain, turned = (outputs(presets.by_name(method, **base, **more), prompt, stream, (64, 33)) for more in ({}, knob))
    assert np.abs(plain - turned).mean() < 0.05 < np.abs(plain).mean()
    # A range is clipped only where that helps, which it hardly does at 8 bits.
    assert "clip" in knob or not np.array_equal(plain, turned)


def test_clipping_never_loses_precision():
    x = jnp.asarray(draws.rng().standard_t(2, (1, 2, 64, 32)), jnp.float32)
    errors = []
    for clip in ((), (0.9,), (0.9, 0.8, 0.7)):
        codes = quantize.encode(x, 2, 16, "tokens", "float16", clip)
        errors.append(float(jnp.square(quantize.decode(codes, 16, "tokens") - x).sum()))
    assert errors[0] > errors[1] > errors[2]


def test_the_balancer_is_the_papers():
    prompt, stream = draw(draws.rng(), 1, 48, 1, 2, 3, 16)
    cache = run(presets.mikv(), *prompt, np.array([48]), stream).prompt
    np.testing.assert_allclose(cache.rest.balance[0], reference.channel_balancer(prompt[0][0], prompt[1][0]), rtol=1e-5)


def test_whole_numbered_minima_are_q_hitters():
    x = draws.rng().standard_normal((1, 1, 128, 32)).astype(np.float32)
    codes = quantize.encode(jnp.asarray(x), 4, 32, "channels", "float16", (), True)
    expected = reference.integer_zero_roundtrip(x[0, 0], 4)
    # The minimum is stored in float16: its rounding, and now and then a number half-way between two codes.
    difference = np.abs(quantize.decode(codes, 32, "channels")[0, 0] - expected)
    assert np.mean(difference > 4e-3) < 1e-3
