"""Sampling draws tokens with the probabilities it is given, and no token from NaN."""

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import METHODS, MODEL

from minikv_jax import ConfigError, Sampling, generate, stream
from minikv_jax.sampling import sample


def test_sampling_stays_within_top_p_and_follows_the_temperature():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    keys = jax.random.split(jax.random.key(int(draws.rng().integers(1 << 30))), 4000)

    def shares(sampling):
        drawn = jax.vmap(lambda key: sample(logits, key, sampling)[0])(keys)
        return np.bincount(np.asarray(drawn), minlength=4) / len(keys)

    np.testing.assert_allclose(shares(Sampling(1.0)), [0.5, 0.3, 0.15, 0.05], atol=0.04)
    np.testing.assert_allclose(shares(Sampling(1.0, top_p=0.7)), [0.625, 0.375, 0, 0], atol=0.04)
    assert shares(Sampling(0.0)).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, "0", None, True])
def test_a_temperature_is_a_finite_number(value):
    with pytest.raises(ConfigError, match="temperature"):
        Sampling(temperature=value)
    with pytest.raises(ConfigError, match="top_p"):
        Sampling(top_p=value if value != float("inf") else 2.0)


@pytest.mark.promise("A model that answers NaN generates -1, which is no token, and not token 0")
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(1.0, 0.5)])
def test_nan_becomes_no_token(sampling):
    key = jax.random.key(0)
    logits = jnp.zeros((3, 8)).at[1, 5].set(jnp.nan).at[2].set(jnp.nan)
    assert (sample(logits, key, sampling) >= 0).tolist() == [True, False, False]
    broken = jax.tree.map(lambda x: x, MODEL)
    broken.norm.set_value(broken.norm[...].at[0].set(jnp.nan))
    text, lengths = np.array([[5, 6, 7, 8], [9, 10, 11, 12]], np.int32), np.array([4, 4], np.int32)
    config = METHODS["full"].replace(prompt_capacity=16, generated_capacity=8)
    written, cache = generate(broken, text, lengths, config, 5, sampling=sampling)
    assert (np.asarray(written) == -1).all() and cache.lengths.tolist() == [4, 4]
    assert [token.tolist() for token, _ in stream(broken, text, lengths, config, 3, sampling=sampling)] == [
        [-1, -1]
    ] * 3
