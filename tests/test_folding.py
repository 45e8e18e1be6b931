"""Multipliers moved into weights."""

import pytest

from minikv_jax.errors import UnsupportedModelError
from minikv_jax.models.folding import scales

GRANITE = {"embedding": 12.0, "attention": 0.015625, "residual": 0.22, "logits": 8.0}


def test_each_multiplier_goes_where_it_does_the_same():
    untied, tied = scales(GRANITE, 64, tied=False), scales(GRANITE, 64, tied=True)
    assert untied == {"embedding": 12, "norm": 1 / 8, "query": 0.125, "output": 0.22, "down": 0.22}
    assert tied == {"head": 12, "norm": 1 / 96, "query": 0.125, "output": 0.22, "down": 0.22}


def test_no_multipliers_no_scales():
    assert scales({}, 64, tied=True) == {}


def test_a_multiplier_that_is_missing_does_nothing():
    assert set(scales({"logits": 2.0}, 64, tied=False).values()) == {1.0, 0.5}


def test_a_multiplier_that_is_not_positive_is_refused():
    with pytest.raises(UnsupportedModelError, match="multiplier of residual must be positive, got 0"):
        scales(GRANITE | {"residual": 0.0}, 64, tied=False)
