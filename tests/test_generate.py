"""Generation writes what step after step would, and ends with the end token or where the cache is full."""

import dataclasses

import chex
import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations
from models import CONFIG, METHODS, MODEL, TWO_LAYERS, kinds, roomy, tokens

from minikv_jax import (
    ConfigError,
    PromptError,
    empty_cache,
    extend,
    fork,
    forward,
    generate,
    insert,
    prefill,
    presets,
    stream,
)


@pytest.mark.parametrize("method", kinds("minikv", "mikv"))
def test_generate_is_decode_step_after_decode_step(method):
    text, lengths, config = tokens(2, 24), jnp.array([24, 9]), METHODS[method].replace(generated_capacity=40)
    written, cache = generate(TWO_LAYERS, text, lengths, config, 30)
    *streamed, (last, after) = stream(TWO_LAYERS, text, lengths, config, 30)
    np.testing.assert_array_equal(written, np.stack([token for token, _ in streamed] + [last], 1))
    assert cache.lengths.tolist() == [24 + 29, 9 + 29]

    def counters(cache):
        return [[x for x in jax.tree.leaves(layer) if x.ndim == 1] for layer in cache.layers]

    chex.assert_trees_all_equal(counters(cache), counters(after))
    if method not in ("pyramidkv", "minikv_pyramid"):  # the loop counts once for all layers
        chex.assert_trees_all_equal(*counters(after))


@pytest.mark.parametrize("count", [12, pytest.param(30, marks=pytest.mark.slow)])
def test_generation_ends_with_the_end_token(count):
    text, lengths, config = tokens(2, 24), jnp.array([24, 9]), METHODS["minikv"]
    free, _ = generate(MODEL, text, lengths, config, count)
    ends = [int(free[0, 4]), int(free[1, 6])]
    first = [next(i for i, token in enumerate(row.tolist()) if token in ends) for row in free]
    ended, cache = generate(MODEL, text, lengths, config, count, eos_token_ids=ends)
    for b in range(2):
        assert ended[b].tolist() == free[b, : first[b]].tolist() + [int(free[b, first[b]])] * (count - first[b])
    # Nothing is read of a sequence after the step in which it ends, wherever that lies in a run of steps.
    assert cache.lengths.tolist() == [24 + first[0], 9 + first[1]]
    assert cache.room.tolist() == [config.generated_capacity - i for i in first]


@pytest.mark.promise("A chat of five turns on a full cache is what one long prompt would be, to 1e-5")
def test_five_turns_on_a_full_cache_are_one_long_prompt(figure):
    cache, unread, chat = presets.full().replace(prompt_capacity=9, generated_capacity=100), np.zeros((2, 0)), [[], []]
    for _ in range(5):
        # The last token of an answer has not been read: the next turn begins with it.
        turn = np.concatenate([unread, tokens(2, 9 - unread.shape[1])], 1).astype(np.int32)
        counts = draws.rng().integers(2, 10, 2)
        written, cache = generate(MODEL, turn, counts, cache, 4)
        unread = written[:, -1:]
        for b, count in enumerate(counts):
            chat[b] += turn[b, :count].tolist() + written[b, :-1].tolist()
    assert cache.lengths.tolist() == [len(row) for row in chat]
    after, _ = extend(MODEL, cache, np.pad(unread, ((0, 0), (0, 8))), np.array([1, 1]))
    whole = np.zeros((2, 64), np.int32)
    for b, row in enumerate(chat):
        whole[b, : len(row) + 1] = [*row, int(unread[b, 0])]
    rows = np.asarray(forward(MODEL, whole))
    ends = np.asarray(cache.lengths)
    np.testing.assert_allclose(after, rows[np.arange(2), ends], atol=1e-5)
    assert rows[np.arange(2), ends - 1].argmax(-1).tolist() == unread[:, 0].tolist()
    figure(f"largest difference of logits {np.abs(after - rows[np.arange(2), ends]).max():.1e}")


@pytest.mark.parametrize("method", kinds())
def test_an_answer_in_two_pieces_is_the_answer_in_one(method):
    text, lengths, config = tokens(3, 24), jnp.array([24, 9, 17]), METHODS[method].replace(generated_capacity=40)
    whole, _ = generate(TWO_LAYERS, text, lengths, config, 30)
    first, cache = generate(TWO_LAYERS, text, lengths, config, 12)
    held = [x.copy() for x in jax.tree.leaves(cache)]
    # The second sequence waits.
    counts = jnp.array([1, 0, 1])
    second, after = generate(TWO_LAYERS, first[:, -1:], counts, cache, 19)
    *_, (last, _) = streamed = list(stream(TWO_LAYERS, first[:, -1:], counts, cache, 19))
    if config.method.inflow.grows:  # reading a token by `extend` scores in another order
        # `extend` attends before a full window is encoded, a step after it: a token may differ, and what follows.
        assert (second[::2, :-1] == whole[::2, 12:]).mean() > (0.99 if method == "full" else 0.7)
    np.testing.assert_array_equal(np.stack([token for token, _ in streamed], 1), second)
    assert second[1].tolist() == [-1] * 19 and last[1] == -1
    assert after.lengths.tolist() == [24 + 30, 9 + 11, 17 + 30] and after.room.tolist() == [10, 29, 10]
    # The cache that was given is there still, as it was.
    chex.assert_trees_all_equal(jax.tree.leaves(cache), held)


@pytest.mark.slow
def test_forks_and_slots_go_on():
    config = roomy("minikv")
    _, one = prefill(MODEL, tokens(1, 64), jnp.array([60]), config)
    forked, question = fork(one, 2), tokens(2, 5)
    # Their prefix is not given away: it serves the next question too.
    answers = [generate(MODEL, question, jnp.array([5, 3]), forked, 6)[0] for _ in range(2)]
    np.testing.assert_array_equal(*answers)
    alone, _ = generate(MODEL, question[:1], jnp.array([5]), one, 6)
    assert (alone[0] == answers[0][0]).mean() > 0.8
    slots = insert(empty_cache(MODEL, config, 2), 1, one)
    written, slots = generate(MODEL, question[::-1], jnp.array([0, 5]), slots, 6, eos_token_ids=[CONFIG.vocab_size - 1])
    assert written[0].tolist() == [-1] * 6 and slots.lengths.tolist()[0] == 0


@pytest.mark.slow
def test_going_on_is_jitted_and_compiles_once():
    config = METHODS["minikv"].replace(prompt_capacity=24, generated_capacity=40)
    text, lengths = tokens(2, 24), jnp.array([24, 9])
    written, cache = generate(MODEL, text, lengths, config, 3)
    turn, count = jnp.concatenate([written[:, -1:], tokens(2, 3)], 1), jnp.array([4, 2])
    go_on = jax.jit(generate, static_argnames="max_new_tokens", donate_argnames="config_or_cache")
    eager, after = generate(MODEL, turn, count, cache, 3)
    jitted, _ = go_on(MODEL, turn, count, jax.tree.map(jnp.copy, cache), max_new_tokens=3)
    np.testing.assert_array_equal(eager, jitted)
    turn, before = jnp.concatenate([eager[:, -1:], tokens(2, 3)], 1), compilations()
    generate(MODEL, turn, count, after, 3)
    assert compilations() == before
    # Traced, a sequence without room for its tokens says so by -1.
    little = jax.tree.map(jnp.copy, dataclasses.replace(after, room=jnp.array([5, 9])))
    short, last = go_on(MODEL, turn, count, little, max_new_tokens=3)
    assert short[0, 2] == -1 and (short[1] >= 0).all() and last.room.tolist() == [0, 5]


def test_more_tokens_than_room_are_refused():
    with pytest.raises(ConfigError, match="generated_capacity"):
        generate(TWO_LAYERS, tokens(1, 4), jnp.array([4]), presets.full().replace(generated_capacity=8), 10)
    _, cache = prefill(TWO_LAYERS, tokens(1, 4), jnp.array([4]), presets.full().replace(generated_capacity=8))
    for call in (generate, stream):
        with pytest.raises(PromptError, match="Sequence 0 has room for 8 more tokens: 4 to read and 6 new ones"):
            call(TWO_LAYERS, tokens(1, 4), jnp.array([4]), cache, 6)
