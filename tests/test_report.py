"""Honest sizes: the papers' figures, the sum of all arrays, and the compiled program's own count."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from models import METHODS, MODEL, every, tokens

from minikv_jax import ConfigError, cache_report, decode_step, empty_cache, fork, nbytes, prefill, presets
from minikv_jax.models.shapes import shape_of
from minikv_jax.report import planned_report

MIB = 2**20


def test_sizes_of_the_papers():
    llama = shape_of("llama2-7b")

    def tiers(config):
        return planned_report(llama, config, 4096, 512).total.bytes_tiers / MIB

    assert tiers(presets.full()) == 2304
    assert tiers(presets.kivi(group_size=16)) == 576
    assert tiers(presets.minikv()) == 320
    # A share of 0.2 in 16 bits, the rest in 2 bits with half a head a group; one more row for the next token.
    mikv = planned_report(llama, presets.mikv(persistent=True, balance=False), 6400, 1).total
    assert round(100 * mikv.bytes_tiers / (6400 * MIB / 2), 1) == 32.5


def test_window_and_counters_count():
    total = planned_report(shape_of("llama2-7b"), presets.minikv(), 4096, 512).total
    assert total.bytes_window >= 128 * MIB / 2
    assert total.bytes_held > total.bytes_tiers + total.bytes_window
    assert total.bits_per_element == 16 * total.bytes_held / (4608 * MIB / 2)


@pytest.mark.parametrize("method", every("full", "minikv", "kivi", "minikv_plus", "think"))
def test_a_plan_is_what_prefill_makes(method):
    config = METHODS[method].replace(dtype="bfloat16", generated_capacity=30)
    _, cache = prefill(MODEL, tokens(1, 70), jnp.array([70]), config)
    made, plan = cache_report(cache), planned_report(MODEL.config, config, 70, 30)
    assert made.total.bytes_tiers == plan.total.bytes_tiers
    assert made.total.bytes_held == nbytes(cache)
    # The plan has the layers alone.
    assert made.total.bytes_held == plan.total.bytes_held + nbytes((cache.lengths, cache.room, cache.prompts))


@pytest.mark.parametrize("method", ["full", "minikv", "mikv"])
def test_the_compiled_step_holds_what_is_reported(method):
    _, cache = prefill(MODEL, tokens(2, 40), jnp.array([40, 20]), METHODS[method])
    compiled = jax.jit(decode_step, donate_argnames="cache").lower(MODEL, cache, tokens(2)).compile()
    weights = nbytes(MODEL)
    arguments = compiled.memory_analysis().argument_size_in_bytes
    reported = cache_report(cache).total.bytes_held
    assert reported <= arguments - weights <= reported + 4096


def test_forks_count_their_prefix_once():
    _, cache = prefill(MODEL, tokens(1, 60), jnp.array([60]), METHODS["snapkv"])
    forked = fork(cache, 4)
    assert cache_report(forked).total.bytes_held == nbytes(forked)
    assert cache_report(forked).total.tokens_kept == 4 * cache_report(cache).total.tokens_kept


@pytest.mark.parametrize(
    "prompt, generated", [(0, 1), (-1, 1), (1, 0), (1, -5), (2**22 + 1, 1), (10**30, 1), (1, 10**9)]
)
def test_tokens_that_cannot_be_planned_for_are_named(prompt, generated):
    with pytest.raises(ConfigError, match=r"prompt=|generated="):
        planned_report(MODEL.config, presets.full(), prompt, generated)


def test_the_largest_plan_takes_a_moment():
    shape, most = shape_of("llama3-8b"), 2**22
    for method in (presets.full(), presets.minikv(), presets.streaming_llm()):
        total = planned_report(shape, method, most, most).total
        assert total.tokens_read == 2 * most and total.bytes_held > 0


@pytest.mark.parametrize("head_size", [72, 80, 96])
def test_methods_that_a_model_cannot_run_are_not_planned(head_size):
    shape = shape_of("llama2-7b").replace(head_dim=head_size)
    with pytest.raises(ConfigError, match="power of two") as error:
        planned_report(shape, presets.minikv_plus(), 100, 10)
    (named,) = re.findall(r"run here: (.*), and methods", str(error.value))
    for method in [*presets.parse(named).values(), presets.h2o()]:
        assert planned_report(shape, method, 100, 10).total.bytes_held > 0


def test_layers_that_differ_are_planned_one_by_one():
    shape = shape_of("smollm2-135m")
    own = planned_report(shape, presets.minikv_plus(precise=(3,), brief=(5,)), 512, 64).layers
    assert len({size.bytes_held for size in own}) == 3 and own[3] != own[0] != own[5] and own[0] == own[29]
    pyramid = planned_report(shape, presets.minikv_pyramid(), 512, 64).layers
    assert pyramid[0].tokens_kept > pyramid[15].tokens_kept > pyramid[29].tokens_kept


def test_a_cache_without_tokens_has_no_bits_an_element():
    total = cache_report(empty_cache(MODEL, METHODS["full"].replace(prompt_capacity=8), 2)).total
    assert total.tokens_read == total.times_smaller == 0 and total.bits_per_element == math.inf


def test_an_unknown_shape_is_named():
    with pytest.raises(ConfigError, match="llama2-7b"):
        shape_of("llama9")
