"""What servers need: slots that sequences take and leave, and prefixes that forks share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import CHANGING, CONFIG, METHODS, MODEL, decode, nearly_equal, roomy, slow, step, tokens

from minikv_jax import (
    ConfigError,
    PromptError,
    empty_cache,
    extend,
    fork,
    insert,
    prefill,
    prefill_in_chunks,
    reset,
    share,
    take,
    to_device,
    to_host,
)


@pytest.mark.parametrize("method", CHANGING)
def test_sequences_in_slots_go_on_as_they_would_alone(method):
    config = roomy(method)
    cache = empty_cache(MODEL, config, 3)
    later = tokens(3, 12)
    prefixes = [prefill(MODEL, tokens(1, 64), jnp.array([n]), config)[1] for n in (40, 64, 9)]
    alone = [decode(prefix, later[b : b + 1])[0][0] for b, prefix in enumerate(prefixes)]
    cache = jax.jit(insert)(cache, 2, prefixes[2])
    cache = insert(cache, 0, prefixes[1])
    cache = insert(cache, 0, prefixes[0])
    together, cache = decode(cache, later)
    assert nearly_equal(together[0], alone[0]) and nearly_equal(together[2], alone[2])
    assert np.isnan(together[1]).all()
    # A slot that is emptied stores nothing more, and takes the next sequence; its neighbours go on.
    cache = jax.jit(reset)(cache, 0)
    cache = insert(cache, 1, prefixes[1])
    together, cache = decode(cache, later)
    assert np.isnan(together[0]).all() and not np.isnan(together[2]).any()
    assert nearly_equal(together[1], decode(prefixes[1], later[1:2])[0][0])
    assert cache.lengths.tolist() == [0, 64 + 12, 9 + 24]


@pytest.mark.parametrize("method", [*slow("minikv_plus", "snapkv", "two_tiers"), "kivi", "mikv"])
def test_forks_answer_as_the_original_would(method):
    config = roomy(method)
    _, cache = prefill(MODEL, tokens(1, 64), jnp.array([60]), config)
    forked, later = fork(cache, 3), tokens(3, 30)
    together, _ = decode(forked, later)
    for b in range(3):
        assert nearly_equal(together[b], decode(cache, later[b : b + 1])[0][0])


def test_forks_hold_their_prefix_once():
    _, cache = prefill(MODEL, tokens(1, 64), jnp.array([60]), roomy("minikv"))
    forked = fork(cache, 8)
    for layer, original in zip(forked.layers, cache.layers):
        assert layer.prefix[0].keys.codes is original.first.keys.codes
    assert int(reset(forked, 0).layers[0].prefix[0].length[0]) > 0


@pytest.mark.promise("Slots with a shared prefix, another one and none, in one step, are as each would be alone")
@pytest.mark.parametrize("method", ["minikv", *slow("full", "snapkv", "minikv_plus", "kivi", "mikv")])
def test_hits_and_misses_in_one_step_are_as_each_alone(method):
    config = roomy(method)
    book, law, other = (prefill(MODEL, tokens(1, 64), jnp.array([n]), config)[1] for n in (60, 33, 47))
    cache, starts = share(empty_cache(MODEL, config, 4), [book, law])
    put = jax.jit(insert, static_argnames="shared", donate_argnames="cache")
    cache = put(cache, 2, starts[0], shared=True)
    cache = put(cache, 0, starts[1], shared=True)
    cache = put(put(cache, 1, book), 1, other)
    cache = put(cache, 3, starts[0], shared=True)
    later = tokens(4, 12)
    together, cache = decode(cache, later)
    for slot, alone in enumerate((law, other, book, book)):
        assert nearly_equal(together[slot], decode(alone, later[slot : slot + 1])[0][0])
    assert [x.prefixes for x in cache.layers] == [2 * config.method.inflow.grows * (method != "kivi")]
    # A slot that had a prefix takes a sequence without one.
    cache = put(reset(cache, 2), 2, law)
    together, _ = decode(cache, later)
    assert nearly_equal(together[2], decode(law, later[2:3])[0][0])
    for call in (lambda: insert(cache, 0, fork(book, 1)), lambda: insert(cache, 0, book, shared=True)):
        if cache.layers[0].prefixes:
            with pytest.raises(ConfigError, match="shared=True"):
                call()
    with pytest.raises(ConfigError, match="no prefixes"):
        share(empty_cache(MODEL, config, 2), [])


@pytest.mark.slow
def test_a_cache_waits_in_host_memory():
    _, cache = prefill(MODEL, tokens(3, 64), jnp.array([40, 64, 9]), roomy("minikv"))
    forked, later = fork(take(cache, [0]), 3), tokens(3, 3)
    for held in (cache, forked):
        waiting = to_host(held)
        assert {x.sharding.memory_kind for x in jax.tree.leaves(waiting)} == {"pinned_host"}
        back = to_device(waiting)
        assert {x.sharding.memory_kind for x in jax.tree.leaves(back)} == {"device"}
        np.testing.assert_array_equal(decode(back, later)[0], decode(held, later)[0])


def test_room_that_is_less_than_a_slots_stays_so():
    config = roomy("minikv")
    _, short = prefill(MODEL, tokens(1, 32), jnp.array([30]), config.replace(prompt_capacity=32, generated_capacity=5))
    cache = insert(empty_cache(MODEL, config, 3), 1, short)
    assert cache.room.tolist() == [0, 5, 0]
    later = tokens(3, 6)
    logits, _ = decode(cache, later)
    assert nearly_equal(logits[1, :5], decode(short, later[1:2, :5])[0][0]) and np.isnan(logits[1, 5]).all()


def test_what_does_not_fit_together_is_refused():
    config = roomy("minikv")
    _, cache = prefill(MODEL, tokens(2, 8), jnp.array([8, 8]), config)
    _, one = prefill(MODEL, tokens(1, 8), jnp.array([8]), config)
    _, other = prefill(MODEL, tokens(1, 8), jnp.array([8]), config.replace(generated_capacity=400))
    for call, match in [
        (lambda: insert(cache, 0, cache), "one sequence"),
        (lambda: insert(cache, 0, other), "generated_capacity"),
        (lambda: insert(cache, 0, fork(one, 1)), "forked"),
        (lambda: fork(cache, 2), "one sequence"),
        (lambda: fork(fork(one, 1), 2), "given is a fork of 1"),
        (lambda: empty_cache(MODEL, METHODS["full"], 2), "prompt_capacity"),
        (lambda: prefill_in_chunks(MODEL, tokens(1, 8), jnp.array([8]), config, chunk=0), "chunk=0"),
    ]:
        with pytest.raises(ConfigError, match=match):
            call()
    with pytest.raises(PromptError, match="sequences"):
        extend(MODEL, one, tokens(2, 4), jnp.array([4, 4]))
    assert CONFIG.vocab_size == cache_logits(one).shape[1]


def test_room_comes_with_the_sequence_that_is_inserted():
    config = METHODS["full"].replace(prompt_capacity=48, generated_capacity=20)
    _, one = prefill(MODEL, tokens(1, 40), jnp.array([40]), config.replace(prompt_capacity=40, generated_capacity=28))
    cache = insert(empty_cache(MODEL, config, 2), 1, one)
    assert cache.room.tolist() == [0, 28]
    later = tokens(2, 29)
    logits, _ = decode(cache, later)
    alone, _ = decode(one, later[1:])
    assert nearly_equal(logits[1, :28], alone[0, :28]) and np.isnan(logits[1, 28]).all()
    # Forks have rows for what their cache's config says, and no more room than that.
    assert fork(insert(empty_cache(MODEL, config, 1), 0, one), 3).room.tolist() == [20, 20, 20]


def cache_logits(cache):
    return step(MODEL, cache, tokens(1))[0]
