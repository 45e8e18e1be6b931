"""A rank refines scores: each correction against its formula in NumPy."""

import draws
import jax.numpy as jnp
import numpy as np
import reference

from minikv_jax import rank
from minikv_jax.config import Rank


def test_scores_are_normalised_pooled_and_weighted():
    rng = draws.rng()
    scores, value = rng.random((1, 1, 20)).astype(np.float32), rng.standard_normal((1, 1, 20, 8)).astype(np.float32)
    lengths, recent = jnp.array([20]), jnp.array([5])

    def refined(**knobs):
        return np.asarray(rank.refine(jnp.asarray(scores), jnp.asarray(value), lengths, recent, Rank(**knobs)))[0, 0]

    rows = np.arange(20, 0, -1)
    np.testing.assert_allclose(refined(by="attention", normalize=True), scores[0, 0] / rows, rtol=1e-5)
    expected = scores[0, 0] / np.minimum(rows, 4)
    np.testing.assert_allclose(refined(by="last_queries", queries=4, normalize=True), expected, rtol=1e-5)
    norms = np.linalg.norm(value[0, 0], axis=-1)
    np.testing.assert_allclose(refined(by="attention", value_norm=True), scores[0, 0] * norms, rtol=1e-5)
    for pool in ("avg", "max"):
        expected = reference.pool(scores[0, 0, :15], 5, pool)
        np.testing.assert_allclose(refined(by="attention", pooling=5, pool=pool)[:15], expected, rtol=1e-5)
