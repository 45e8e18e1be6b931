"""Who is kept: budgets per layer, and the choice of tokens."""

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

from minikv_jax import ConfigError, allocate, presets, rank

best = jax.jit(rank.best, static_argnums=3)


def test_pyramid_of_the_paper():
    config = presets.minikv_pyramid()
    shares = [allocate.heavy_share(config.method.allocation, layer, 32) for layer in range(32)]
    np.testing.assert_allclose([shares[0], shares[31], np.mean(shares)], [0.464286, 0.035714, 0.25], atol=1e-6)
    np.testing.assert_allclose(shares, reference.pyramid_ratios(0.25, 32, 7))
    heavy = [int(budget.total - budget.recent) for budget in (allocate.budget(config, i, 32, 4096) for i in range(32))]
    assert heavy[:3] == [1901, 1845, 1788] and heavy[-2:] == [202, 146]


@given(length=st.integers(1, 5000), heavy=st.floats(0.001, 1), recent=st.floats(0, 1))
@pytest.mark.promise("Budgets add up exactly")
def test_counts_are_those_of_python(length, heavy, recent):
    budget = allocate.budget(presets.minikv(heavy, recent), 0, 1, length)
    kept = int(length * heavy) + int(length * recent)
    if heavy + recent >= 1:
        kept = length
    assert budget.total == min(max(kept, 1), length)


def test_pyramidkv_budgets_of_its_paper():
    config = presets.pyramidkv()
    totals = [int(allocate.budget(config, layer, 32, 8192).total) for layer in range(32)]
    assert (totals[0], totals[31]) == (3932 + 32, 119 + 32)


@given(length=st.integers(1, 9000), budget=st.integers(64, 3000), layers=st.integers(1, 40))
def test_pyramidkv_budgets_are_the_references(length, budget, layers):
    config = presets.pyramidkv(budget=budget)
    expected = reference.pyramidkv_budgets(budget, 32, layers, length)
    for layer in range(layers):
        kept = min(int(allocate.budget(config, layer, layers, length).total), length)
        assert kept == min(expected[layer] + 32, length)


@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.integers(1, 64),
    heavy=st.integers(0, 40),
    recent=st.integers(0, 40),
    sinks=st.integers(0, 3),
)
@pytest.mark.promise("The first and the newest tokens are always kept, and ties are settled by position")
def test_selection_is_sinks_recent_tokens_and_the_best_others(seed, length, heavy, recent, sinks):
    recent = min(recent, length)
    rng = np.random.default_rng(seed)
    scores = rng.random((1, 2, 64)).astype(np.float32)
    scores[0, 1] = rng.choice(np.array([-0.0, 0.0, 1e-30, 1.0, 1e30, -2.0], np.float32), 64)  # ties of every size
    always = set(range(min(sinks, length))) | set(range(length - recent, length))
    total = min(len(always) + heavy, length)
    chosen = rank.best(jnp.asarray(scores), jnp.array([length]), jnp.array([recent]), sinks, jnp.array([total]))
    rows, rest = (rank.in_text_order(x, 80) for x in (chosen, ~chosen & (jnp.arange(64) < length)))
    for head in range(2):
        others = sorted(set(range(length)) - always, key=lambda i: (-scores[0, head, i], i))
        expected = sorted([*always, *others[: total - len(always)]])
        assert rows[0, head].tolist() == expected + [64] * (80 - len(expected))
        left = sorted(set(range(length)) - set(expected))
        assert rest[0, head].tolist() == left + [64] * (80 - len(left))


@pytest.mark.promise("A larger budget never loses a token that a smaller one keeps")
@given(length=st.integers(1, 64), few=st.integers(0, 64), more=st.integers(0, 64))
def test_a_larger_budget_keeps_what_a_smaller_one_keeps(length, few, more):
    scores = draws.rng().choice(np.array([0.0, 0.5, 1.0, 2.0], np.float32), (1, 2, 64))
    few, more = sorted(min(n, length) for n in (few, more))
    kept = [best(scores, jnp.array([length]), jnp.array([0]), 0, jnp.array([n])) for n in (few, more)]
    assert not np.any(kept[0] & ~np.asarray(kept[1]))
    assert [int(np.sum(x[0, 0])) for x in kept] == [few, more]


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
