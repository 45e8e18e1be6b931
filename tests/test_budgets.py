"""Who is kept: budgets per layer, and the choice of tokens."""

import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

from minikv_jax import ConfigError, allocate, presets, rank
from minikv_jax.config import Allocation


def test_pyramid_of_the_paper():
    allocation = Allocation(0.25, 0.25, pyramid_depth=7)
    shares = [allocate.heavy_share(allocation, layer, 32) for layer in range(32)]
    np.testing.assert_allclose([shares[0], shares[31], np.mean(shares)], [0.464286, 0.035714, 0.25], atol=1e-6)
    np.testing.assert_allclose(shares, reference.pyramid_ratios(0.25, 32, 7))
    heavy = [int(allocate.kept_tokens(allocation, layer, 32, 4096)[0]) for layer in range(32)]
    assert heavy[:3] == [1901, 1845, 1788] and heavy[-2:] == [202, 146]


@given(length=st.integers(1, 5000), heavy=st.floats(0.001, 1), recent=st.floats(0, 1))
def test_counts_are_those_of_python(length, heavy, recent):
    counts = allocate.kept_tokens(Allocation(heavy, recent), 0, 1, length)
    kept = int(length * heavy) + int(length * recent)
    if heavy + recent >= 1:
        kept = length
    assert sum(counts) == min(max(kept, 1), length)


@given(seed=st.integers(0, 2**32 - 1), length=st.integers(1, 64), heavy=st.integers(0, 40), recent=st.integers(0, 40))
def test_selection_is_the_recent_tokens_and_the_best_others(seed, length, heavy, recent):
    recent = min(recent, length)
    heavy = min(heavy, length - recent)
    scores = np.random.default_rng(seed).random((1, 2, 64)).astype(np.float32)
    rows = rank.select(jnp.asarray(scores), *(jnp.array([n]) for n in (length, heavy, recent)), capacity=80)
    for head in range(2):
        best = sorted(range(length - recent), key=lambda i: -scores[0, head, i])[:heavy]
        expected = sorted([*best, *range(length - recent, length)])
        assert rows[0, head].tolist() == expected + [64] * (80 - len(expected))


@pytest.mark.parametrize(
    "name, knobs, named",
    [
        ("minikv", {"heavy": 1.5}, "heavy=1.5"),
        ("minikv", {"heavy": 0.0, "recent": 0.0}, "nothing would be kept"),
        ("minikv", {"bits": 5}, "bits=5"),
        ("minikv", {"group_size": 24}, "group=24"),
        ("minikv", {"residual": 100}, "window=100"),
        ("minikv", {"pyramid_depth": 0.5}, "pyramid_depth=0.5"),
        ("minikv", {"depth": 7}, "depth"),
        ("minikv3", {}, "minikv3"),
    ],
)
def test_a_wrong_method_or_knob_is_named(name, knobs, named):
    with pytest.raises(ConfigError, match=named):
        presets.by_name(name, **knobs)
