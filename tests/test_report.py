"""Honest sizes: the papers' figures, the sum of all arrays, and the compiled program's own count."""

import jax
import jax.numpy as jnp
import pytest
from models import METHODS, MODEL, tokens

from minikv_jax import ConfigError, cache_report, decode_step, fork, nbytes, prefill, presets
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


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_is_what_prefill_makes(method):
    config = METHODS[method].replace(dtype="bfloat16", generated_capacity=30)
    _, cache = prefill(MODEL, tokens(1, 70), jnp.array([70]), config)
    made, plan = cache_report(cache), planned_report(MODEL.config, config, 70, 30)
    assert made.total.bytes_tiers == plan.total.bytes_tiers
    assert made.total.bytes_held == nbytes(cache)
    # The plan has the layers alone.
    assert made.total.bytes_held == plan.total.bytes_held + nbytes((cache.lengths, cache.room))


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


def test_an_unknown_shape_is_named():
    with pytest.raises(ConfigError, match="llama2-7b"):
        shape_of("llama9")
