"""Bases change the coordinates in which a layer holds keys and values: what each gains, and what it must not lose."""

import dataclasses

import draws
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from layer import draw, run
from models import CONFIG, tokens

from minikv_jax import ConfigError, prefill, presets
from minikv_jax.basis import Balance, Moments, Quantized
from minikv_jax.models.llama import Llama
from pallas_kernels import quantize
from pallas_kernels.hadamard import hadamard, rotate


def test_quantised_first_keeps_the_ranges_of_neighbours_that_left():
    # Heads with few enough tokens that groups of 8 break, and an end that fills no group.
    prompt, stream = draw(draws.rng(), 2, 64, 3, 2, 2, 16)
    dense, lengths = presets.minikv(0.3, 0.2, bits=16), np.array([64, 43])
    codec = presets.minikv(group_size=8).method.codec
    plain, coded = (run(c, *prompt, lengths, stream).prompt for c in (dense, dense.replace(basis=(Quantized(codec),))))
    rounded = [np.asarray(x).copy() for x in prompt[1:]]
    for b, length in enumerate(lengths):
        whole = length // 8 * 8
        keys, values = (x[b, :whole] for x in prompt[1:])  # groups of 8 tokens, and of 8 channels
        rounded[0][b, :whole] = np.moveaxis(reference.roundtrip_per_token(np.moveaxis(keys, 0, -1), 2, 8), -1, 0)
        rounded[1][b, :whole] = reference.roundtrip_per_token(values, 2, 8)
    for b, head in np.ndindex(2, 2):
        held = int(plain.first.length[b])
        keys = prompt[1][b, :, head]
        rows = [int(np.abs(keys - row).sum(-1).argmin()) for row in plain.first.key[b, head, :held]]
        assert len(set(rows)) == held == int(coded.first.length[b]) < lengths[b]
        np.testing.assert_allclose(coded.first.key[b, head, :held], rounded[0][b, rows, head], atol=1e-4)
        np.testing.assert_allclose(coded.first.value[b, head, :held], rounded[1][b, rows, head], atol=1e-4)


def test_rotation_helps_where_one_channel_is_loud():
    # Groups over channels share the loud channel's range; rotated, every channel has a quarter of it.
    x = draws.rng().standard_normal((1, 2, 128, 16)) * np.where(np.arange(16) == 5, 30, 1)
    x = jnp.asarray(x, jnp.float32)
    errors = []
    for y in (x, rotate(x)):
        errors.append(
            float(jnp.square(quantize.decode(quantize.encode(y, 2, 16, "channels"), 16, "channels") - y).mean())
        )
    assert errors[1] < 0.7 * errors[0]
    np.testing.assert_allclose(hadamard(16) @ hadamard(16), np.eye(16), atol=1e-6)


def test_a_head_that_cannot_be_rotated_is_named():
    model = Llama(dataclasses.replace(CONFIG, head_dim=24), rngs=nnx.Rngs(params=0))
    with pytest.raises(ConfigError, match="power of two, not 24"):
        prefill(model, tokens(1, 20), jnp.array([20]), presets.minikv_plus(group_size=8, residual=16))


@pytest.mark.parametrize("length", [1, 4, 5, 6, 9])
def test_a_few_tokens_say_little_about_channels(length):
    """A channel that happens to be silent in a short prompt is not scaled up as if it stayed so."""
    rng, rows = draws.rng(), 9
    key, value = (jnp.asarray(rng.normal(size=(1, 2, rows, 64)), jnp.float32) for _ in range(2))
    key, value = (jnp.where(jnp.arange(rows)[:, None] < length, x, 0) for x in (key, value))
    asked = jnp.asarray(rng.normal(size=(2, 3 * length, 64)), jnp.float32)
    moment = jnp.einsum("kth,kti->khi", asked, asked)[None]
    for factors in Balance().fit(key, value, Moments(moment, None), jnp.asarray([length]), 4):
        assert float(factors.min()) >= 0.25 and float(factors.max()) <= 4
