"""`decode_step` goes on from a prompt: in ragged batches, across flushes, in place, and until the cache is full."""

import chex
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CONFIG, METHODS, TWO_LAYERS, follow, kinds, nearly_equal, roomy, step_in_place, tokens

from minikv_jax import decode_step, forward, nbytes, prefill, presets

OF_EACH_KIND = kinds("minikv", "mikv")


@pytest.mark.parametrize(
    "dense", [presets.full(), presets.minikv(0.5, 0.5, bits=16), presets.minikv(1.0, 0.0, bits=16)]
)
def test_a_cache_that_holds_everything_is_the_model_itself(dense):
    text = tokens(1, 75)
    logits, _ = follow(dense, text[:, :50], jnp.array([50]), text[:, 50:])
    np.testing.assert_allclose(logits[0], forward(TWO_LAYERS, text)[0, 49:], atol=2e-5)


def test_budget_one_at_16_bits_equals_the_full_cache_exactly():
    text = tokens(2, 70)
    lengths = jnp.array([50, 37])
    full, _ = follow(presets.full(), text[:, :50], lengths, text[:, 50:])
    for kept in (presets.minikv(0.5, 0.5, bits=16), presets.minikv(0.9, 0.1, bits=16)):
        np.testing.assert_array_equal(full, follow(kept, text[:, :50], lengths, text[:, 50:])[0])


@pytest.mark.parametrize("method", ["snapkv", pytest.param("minikv_pyramid", marks=pytest.mark.slow)])
def test_jit_gives_what_eager_gives(method):
    text, config = tokens(2, 40), METHODS[method]
    lengths = jnp.array([40, 23])
    eager = prefill(TWO_LAYERS, text, lengths, config)
    jitted = jax.jit(prefill)(TWO_LAYERS, text, lengths, config)
    chex.assert_trees_all_close(eager, jitted, atol=1e-5)
    token = tokens(2)
    with jax.disable_jit():
        plain = decode_step(TWO_LAYERS, eager[1], token)
    chex.assert_trees_all_close(plain, jax.jit(decode_step)(TWO_LAYERS, jitted[1], token), atol=1e-5)


@pytest.mark.parametrize("method", OF_EACH_KIND)
@settings(max_examples=3)
@given(lengths=st.tuples(*[st.integers(1, 64)] * 3))
def test_a_ragged_batch_is_its_sequences_one_by_one(method, lengths):
    text, config, model = tokens(3, 64), roomy(method), models.MODEL

    def stored(cache, b):
        """Codes with their scales, and who was kept: what the order of a sum can tip. Not what it only touches."""
        return [np.array(x[b]) for x in jax.tree.leaves(cache.layers) if x.dtype != jnp.float32]

    states = [prefill(model, text, jnp.array(lengths), config)]
    states += [prefill(model, text[b : b + 1], jnp.array([length]), config) for b, length in enumerate(lengths)]
    tipped = [False] * 3
    for _ in range(20):
        (together, cache), *alone = states
        for b, (logits, one) in enumerate(alone):
            tipped[b] |= any((x != y).any() for x, y in zip(stored(cache, b), stored(one, 0), strict=True))
            # A tipped code of 2 bits is a third of its range; a mixed-up sequence differs by about 1 everywhere.
            assert nearly_equal(together[b], logits[0])
            assert tipped[b] or np.abs(together[b] - logits[0]).max() < 1e-4
        token = tokens(3)
        states = [models.step(model, cache, token)]
        states += [models.step(model, c, token[b : b + 1]) for b, (_, c) in enumerate(alone)]


@pytest.mark.parametrize("method", kinds("minikv"))
def test_padding_never_matters(method):
    text, later, lengths = tokens(2, 30), tokens(2, 10), jnp.array([30, 11])
    config = METHODS[method].replace(prompt_capacity=64)
    expected, _ = follow(config, text, lengths, later)
    padded = jnp.pad(text, ((0, 0), (0, 17)), constant_values=CONFIG.vocab_size + 5)
    # Padding changes the order of sums, which may tip a float16 scale, and with it numbers by 2^-10 of a group's range
    # (of whole heads in int8: 1.1e-3 once); padding that is read differs by about 1.
    np.testing.assert_allclose(follow(config, padded, lengths, later)[0], expected, atol=4e-3)


def test_300_steps_cross_two_flushes_without_a_retrace_and_in_place():
    config = presets.minikv().replace(generated_capacity=300)
    traced = jax.jit(chex.assert_max_traces(decode_step, n=1), donate_argnames="cache")
    text = tokens(2, 64)
    _, cache = prefill(TWO_LAYERS, text, jnp.array([64, 40]), config)
    size, before = nbytes(cache), int(cache.layers[0].first.length[0])
    for _ in range(300):
        donated = cache
        logits, cache = traced(TWO_LAYERS, cache, tokens(2))
        assert all(x.is_deleted() for x in jax.tree.leaves(donated))
    assert int(cache.layers[0].first.length[0]) >= before + 2 * 128
    assert nbytes(cache) == size and bool(jnp.isfinite(logits).all())


def test_minikv_lengths_of_the_paper():
    # 600 tokens, half of them kept: 300, of which 288 fill groups of 16. The window of 128 starts with 12.
    config = presets.minikv().replace(generated_capacity=300)
    _, cache = prefill(models.MODEL, tokens(1, 600), jnp.array([600]), config)

    def lengths(cache):
        return int(cache.layers[0].first.length[0]), int(cache.layers[0].flow.length[0])

    assert lengths(cache) == (288, 12)
    flushes = []
    for i in range(1, 260):
        _, cache = step_in_place(models.MODEL, cache, tokens(1))
        if lengths(cache)[1] == 0:
            flushes.append((i, lengths(cache)[0]))
    assert flushes == [(116, 288 + 128), (244, 288 + 256)]


def test_a_split_model_is_as_good_as_the_module():
    text, lengths = tokens(1, 20), jnp.array([20])
    logits, cache = prefill(nnx.split(models.MODEL), text, lengths, METHODS["minikv"])
    np.testing.assert_allclose(logits, prefill(models.MODEL, text, lengths, METHODS["minikv"])[0], atol=1e-6)
    assert step_in_place(nnx.split(models.MODEL), cache, tokens(1))[0].shape == (1, CONFIG.vocab_size)


@pytest.mark.parametrize("method", OF_EACH_KIND)
def test_a_full_cache_refuses_more_tokens_loudly(method):
    _, cache = prefill(models.MODEL, tokens(3, 64), jnp.array([20, 8, 64]), roomy(method))
    for i in range(42):
        kept = cache
        logits, cache = models.step(models.MODEL, kept, tokens(3))
        assert bool(jnp.isnan(logits).all()) == (i >= 40)
        if i >= 40:
            chex.assert_trees_all_equal(kept, cache)


@pytest.mark.parametrize("method", OF_EACH_KIND)
def test_a_broken_sequence_stays_alone(method):
    config = roomy(method)
    broken = jax.tree.map(lambda x: x, models.MODEL)
    broken.head.set_value(broken.head[...].at[:, 3].set(jnp.nan))
    text = jnp.where(tokens(3, 64) == 3, 4, 1).at[0, 5].set(3)
    later = jnp.ones((3, 20), jnp.int32)
    together, _ = follow(config, text, jnp.array([30, 30, 30]), later, broken, models.step)
    alone, _ = follow(config, text[1:2], jnp.array([30]), later[1:2], broken, models.step)
    columns = np.arange(CONFIG.vocab_size) != 3
    assert np.isnan(together[0, 0]).all()
    # A method that gives tokens up may come to drop the broken ones; the others stay broken for good.
    assert not config.method.inflow.grows or np.isnan(together[0]).all()
    np.testing.assert_allclose(together[1][:, columns], alone[0][:, columns], atol=1e-5)
