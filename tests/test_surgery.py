"""Sequences taken out of caches, put together and taken back go on as they would have gone on."""

import dataclasses

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import CHANGING, MODEL, decode, every, nearly_equal, roomy, slow, tokens, with_codes

from minikv_jax import (
    ConfigError,
    PromptError,
    concatenate,
    draft_limit,
    extend,
    fork,
    nbytes,
    prefill,
    rollback,
    rollback_limit,
    take,
)

COUNTS = jnp.array([40, 64, 9])


@pytest.mark.parametrize("method", CHANGING)
def test_sequences_that_are_taken_go_on_as_they_would_have(method):
    _, cache = prefill(MODEL, tokens(3, 64), COUNTS, roomy(method))
    later, order = tokens(3, 9), [2, 0, 2]
    wanted, _ = decode(cache, later)
    taken = jax.jit(take)(cache, jnp.array(order))
    got, after = decode(taken, later[jnp.array(order)])
    assert nearly_equal(got, wanted[order]) and after.lengths.tolist() == [9 + 9, 40 + 9, 9 + 9]
    # Beams of one sequence; a traced number of a sequence that is not there takes none.
    one = jax.jit(take)(cache, jnp.array([1, 3, -1]))
    assert one.lengths.tolist() == [64, 0, 0] and one.room.tolist() == [40, 0, 0]
    assert np.isnan(decode(one, later[:, :1])[0][1:]).all()


@pytest.mark.parametrize("method", [*slow("minikv_plus", "two_tiers"), "snapkv", *slow("mikv", "minikv")])
def test_forks_are_taken_and_put_together_and_hold_their_prefix_once(method):
    config = roomy(method)
    caches = [prefill(MODEL, tokens(1, 64), jnp.array([n]), config)[1] for n in (60, 33)]
    many, few = (fork(cache, count) for cache, count in zip(caches, (3, 2)))
    later = tokens(3, 5)
    _, many = decode(many, later)
    # Of the first fork two sequences in another order, and one of the second.
    both = concatenate([take(many, [2]), take(few, [1]), take(many, [0])])
    assert [layer.prefixes for layer in both.layers] == [2 * bool(layer.prefix) for layer in many.layers]
    assert nbytes([x.prefix for x in both.layers]) == sum(nbytes([x.prefix for x in f.layers]) for f in (many, few))
    more = tokens(3, 9)
    together, _ = decode(both, more)
    for row, (cache, before) in enumerate([(caches[0], later[2:3]), (caches[1], None), (caches[0], later[0:1])]):
        alone = cache if before is None else decode(cache, before)[1]
        assert nearly_equal(together[row], decode(alone, more[row : row + 1])[0][0])
    if method == "snapkv":  # sequences with a prefix and without
        mixed = concatenate([both, dataclasses.replace(caches[1], layers=fork(caches[1], 1).layers), both])
        assert mixed.layers[0].prefix_of.tolist() == [0, 1, 0, 2, 0, 1, 0] and mixed.layers[0].prefixes == 3


@pytest.mark.parametrize("method", ["minikv", *slow("streaming_llm", "h2o", "kivi", "mikv", "minikv_plus", "think")])
def test_caches_put_together_answer_as_each_would(method):
    config, text, later = roomy(method), tokens(3, 64), tokens(3, 9)
    first, second = (prefill(MODEL, text[r], COUNTS[r], config)[1] for r in (slice(0, 2), slice(2, 3)))
    _, whole = prefill(MODEL, text, COUNTS, config)
    assert nearly_equal(decode(concatenate([first, second]), later)[0], decode(whole, later)[0])
    # One with less room gets the rows of the first and keeps its room.
    _, short = prefill(MODEL, text[2:, :32], COUNTS[2:], config.replace(prompt_capacity=32, generated_capacity=12))
    joined = concatenate([first, short])
    assert joined.room.tolist() == [40, 40, 12] and nbytes(joined) == nbytes(whole)
    got, _ = decode(joined, later)
    assert nearly_equal(got[2], decode(short, later[2:])[0][0])
    if nbytes(short) < nbytes(second):
        with pytest.raises(ConfigError, match="generated_capacity"):
            concatenate([short, first])


@pytest.mark.promise("Drafts that are taken back leave no trace: all later logits are bit for bit as without them")
@pytest.mark.parametrize("method", every("minikv", "snapkv"))
def test_tokens_taken_back_leave_no_trace(method):
    config = roomy(method)
    _, cache = prefill(MODEL, tokens(3, 64), COUNTS, config)
    limit = np.asarray(draft_limit(cache))
    if not config.method.inflow.grows:
        assert limit.tolist() == [0, 0, 0] and rollback_limit(cache).tolist() == [0, 0, 0]
        with pytest.raises(PromptError, match="each step gives a token up"):
            rollback(decode(cache, tokens(3, 2))[1], jnp.array([1, 0, 0]))
        return
    counts = np.minimum(limit, 7)
    _, drafted = extend(MODEL, cache, tokens(3, 7), counts)
    assert (np.asarray(rollback_limit(drafted)) >= counts).all()
    back = jax.jit(rollback)(drafted, counts)
    assert back.lengths.tolist() == COUNTS.tolist() and back.room.tolist() == [40] * 3
    later = tokens(3, 20)
    np.testing.assert_array_equal(decode(back, later)[0], decode(cache, later)[0])


def test_what_was_encoded_is_not_taken_back_unless_the_window_keeps_it():
    config = roomy("minikv")
    assert config.method.inflow.window == 16
    _, cache = prefill(MODEL, tokens(3, 64), COUNTS, config)
    text = tokens(3, 16)
    _, read = extend(MODEL, cache, text, np.array([16, 16, 16]))
    limit = np.asarray(rollback_limit(read))
    assert (limit < 16).any()
    row = int(limit.argmin())
    with pytest.raises(PromptError, match=rf"Sequence {row} can take back at most {limit[row]}.*Block.*`keeps`"):
        rollback(read, np.where(np.arange(3) == row, 16, 0))
    # Traced, the sequence has no room left and says NaN at the next step; others are taken back.
    back = jax.jit(rollback)(read, jnp.where(jnp.arange(3) == row, 16, 0))
    assert (back.room == 0).tolist() == (np.arange(3) == row).tolist()
    # Codes so fine that it makes little difference how early a token was encoded.
    keeping = with_codes(config, key_bits=8, value_bits=8).replace(
        inflow=dataclasses.replace(config.method.inflow, keeps=8)
    )
    _, cache = prefill(MODEL, tokens(3, 64), COUNTS, keeping)
    for count in range(9, 17):
        _, read = extend(MODEL, cache, text, np.full(3, count))
        assert (np.asarray(rollback_limit(read)) >= 8).all()
    back = rollback(read, np.full(3, 8))
    _, never = extend(MODEL, cache, text, np.full(3, 8))
    later = tokens(3, 4)
    assert nearly_equal(decode(back, later)[0], decode(never, later)[0])


def test_the_logits_after_every_new_token_are_those_of_steps():
    _, cache = prefill(MODEL, tokens(3, 64), COUNTS, roomy("full"))
    text, counts = tokens(3, 9), draws.rng().integers(0, 10, 3)
    every_one, after = extend(MODEL, cache, text, counts, all_logits=True)
    last, _ = extend(MODEL, cache, text, counts)
    steps, _ = decode(cache, text)
    for b, count in enumerate(counts):
        np.testing.assert_allclose(every_one[b, :count], steps[b, :count], atol=2e-5)
        assert np.isnan(every_one[b, count:]).all()
        if count:
            np.testing.assert_allclose(every_one[b, count - 1], last[b], atol=1e-5)
    assert after.lengths.tolist() == (np.asarray(COUNTS) + counts).tolist()


def test_what_cannot_be_taken_or_put_together_is_refused():
    _, cache = prefill(MODEL, tokens(3, 64), COUNTS, roomy("minikv"))
    _, full = prefill(MODEL, tokens(3, 64), COUNTS, roomy("full"))
    for call, match in [
        (lambda: take(cache, [0, 3]), "0 to 2"),
        (lambda: take(cache, [-1]), "0 to 2"),
        (lambda: take(cache, []), "indices"),
        (lambda: take(cache, [0.5]), "whole numbers"),
        (lambda: concatenate([]), "no caches"),
        (lambda: concatenate([cache, full]), "same method"),
        (lambda: concatenate([cache, cache.layers[0]]), "no cache"),
    ]:
        with pytest.raises(ConfigError, match=match):
            call()
    for counts, match in [([0, 0], "give one each"), ([1, 0, 0], "at most 0 tokens, not 1: 0 have followed its prompt"),
                          ([0, -1, 0], "not -1")]:  # fmt: skip
        with pytest.raises(PromptError, match=match):
            rollback(cache, counts)
