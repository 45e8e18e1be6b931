"""One layer's prompt becomes its cache: the same one, however many heads are compressed at once."""

import chex
import draws
import jax.numpy as jnp
import pytest
from models import METHODS

from minikv_jax import allocate
from minikv_jax.cache import Readers, Shape
from minikv_jax.compress import compress_in_pieces


@pytest.mark.parametrize(
    "method", ["minikv", *(pytest.param(x, marks=pytest.mark.slow) for x in ("h2o", "mikv", "kivi", "minikv_plus"))]
)
def test_a_layer_compressed_in_pieces_is_the_layer(method):
    config = METHODS[method].replace(prompt_capacity=40)
    rng, shape = draws.rng(), Shape.of(config, 0, 1)
    key, value = (jnp.asarray(rng.standard_normal((2, 40, 4, 16)), jnp.float32) for _ in range(2))
    scores, lengths = jnp.asarray(rng.random((2, 4, 40)), jnp.float32), jnp.array([40, 23])
    readers = Readers.of(key, 4, jnp.ones((2, 40), bool), jnp.ones((2, 40), bool))
    arguments = key, value, scores, readers, lengths, allocate.budgets(config, 0, 1, lengths, 40)
    whole, parts = (compress_in_pieces(*arguments, config.method, shape, at_once=n) for n in (1 << 26, 40 * 16 * 2))
    chex.assert_trees_all_close(whole, parts)
