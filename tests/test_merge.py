"""KVMerger's inflow: what merges, what stays alone, and what a budget leaves."""

import draws
import jax.numpy as jnp
import numpy as np
import pytest

from minikv_jax import ConfigError, layer, presets

B, RUNS, RUN, K, H = 2, 8, 3, 2, 16


def held(config, key, value):
    """Keys and values [B, K, kept, H] of a prompt whose queries see all tokens alike."""
    query = jnp.zeros((*key.shape[:2], 2 * K, H))
    lengths = jnp.full((B,), key.shape[1])
    state = layer.prefill(query, key, value, lengths, config.replace(generated_capacity=1))[1]
    first = state.cache.first
    kept = int(first.length[0])
    assert first.length.tolist() == [kept] * B
    return np.asarray(first.key[:, :, :kept]), np.asarray(first.value[:, :, :kept])


def drawn():
    """Runs of tokens with one key each, and values of their own."""
    rng = draws.rng()
    runs = np.repeat(rng.standard_normal((B, RUNS, K, H)), RUN, axis=1)
    return jnp.asarray(runs, jnp.float32), jnp.asarray(rng.standard_normal(runs.shape), jnp.float32)


def test_runs_of_one_key_become_that_key_and_their_values_sum():
    key, value = drawn()
    keys, values = held(presets.kvmerger(1 / RUN, heavy=0, recent=0, threshold=0.99), key, value)
    np.testing.assert_allclose(keys, np.moveaxis(np.asarray(key)[:, ::RUN], 1, 2), atol=1e-6)
    summed = np.asarray(value).reshape(B, RUNS, RUN, K, H).sum(axis=2)
    np.testing.assert_allclose(values, np.moveaxis(summed, 1, 2), atol=1e-5)


def test_recent_tokens_stay_as_they_are():
    key, value = drawn()
    keys, values = held(presets.kvmerger(0.5, heavy=0, recent=0.25, threshold=-1), key, value)
    for found, given in ((keys, key), (values, value)):
        np.testing.assert_array_equal(found[:, :, -6:], np.moveaxis(np.asarray(given)[:, -6:], 1, 2))


@pytest.mark.parametrize("budget", [1, 1.0])
def test_a_whole_budget_keeps_everything(budget):
    key, value = drawn()
    keys, values = held(presets.kvmerger(budget), key, value)
    np.testing.assert_array_equal(keys, np.moveaxis(np.asarray(key), 1, 2))
    np.testing.assert_array_equal(values, np.moveaxis(np.asarray(value), 1, 2))


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"budget": 0.0, "recent": 0.0}, "budget=0.0"),
        ({"budget": 0.1, "recent": 0.2}, "recent=0.2"),
        ({"threshold": 2.0}, "threshold=2.0"),
        ({"sigma": 0.0}, "sigma=0.0"),
        ({"whole": (-1,)}, r"layers=\[-1\]"),
    ],
)
def test_knobs_out_of_range_are_named(knobs, named):
    with pytest.raises(ConfigError, match=named):
        presets.kvmerger(**knobs)
