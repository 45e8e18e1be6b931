"""The whole model: prefill, decode_step and generate under jit, over ragged batches, across flushes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CONFIG, METHODS, tokens

from minikv_jax import ConfigError, PromptError, Sampling, decode_step, forward, generate, nbytes, prefill, presets
from minikv_jax.generate import sample, stream
from minikv_jax.models.llama import Llama

MODEL = Llama(CONFIG.replace(num_layers=2), rngs=nnx.Rngs(params=0))
step = jax.jit(decode_step, donate_argnames="cache")
# Every method, those beyond the first two among the slow tests.
EVERY = [name if name in ("full", "minikv") else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]


def follow(config, prompt, lengths, later, params=MODEL):
    """Logits after the prompt and after each later token: [B, steps + 1, V]."""
    logits, cache = prefill(params, prompt, lengths, config)
    rows = [logits]
    for i in range(later.shape[1]):
        logits, cache = step(params, cache, later[:, i])
        rows.append(logits)
    return np.stack(rows, 1), cache


@pytest.mark.parametrize(
    "dense", [presets.full(), presets.minikv(0.5, 0.5, bits=16), presets.minikv(1.0, 0.0, bits=16)]
)
def test_a_cache_that_holds_everything_is_the_model_itself(dense):
    text = tokens(1, 75)
    logits, _ = follow(dense, text[:, :50], jnp.array([50]), text[:, 50:])
    np.testing.assert_allclose(logits[0], forward(MODEL, text)[0, 49:], atol=2e-5)


def test_budget_one_at_16_bits_equals_the_full_cache_exactly():
    text = tokens(2, 70)
    lengths = jnp.array([50, 37])
    full, _ = follow(presets.full(), text[:, :50], lengths, text[:, 50:])
    for kept in (presets.minikv(0.5, 0.5, bits=16), presets.minikv(0.9, 0.1, bits=16)):
        np.testing.assert_array_equal(full, follow(kept, text[:, :50], lengths, text[:, 50:])[0])


@pytest.mark.parametrize("method", ["minikv_pyramid"])
def test_jit_gives_what_eager_gives(method):
    text, config = tokens(2, 40), METHODS[method]
    lengths = jnp.array([40, 23])
    eager = prefill(MODEL, text, lengths, config)
    jitted = jax.jit(prefill)(MODEL, text, lengths, config)
    chex.assert_trees_all_close(eager, jitted, atol=1e-5)
    token = tokens(2)
    with jax.disable_jit():
        plain = decode_step(MODEL, eager[1], token)
    chex.assert_trees_all_close(plain, jax.jit(decode_step)(MODEL, jitted[1], token), atol=1e-5)


@pytest.mark.parametrize("method", EVERY)
@settings(max_examples=3)
@given(lengths=st.tuples(*[st.integers(1, 48)] * 3))
def test_a_ragged_batch_is_its_sequences_one_by_one(method, lengths):
    text, later, config = tokens(3, 48), tokens(3, 20), METHODS[method]
    together, _ = follow(config, text, jnp.array(lengths), later)
    for b, length in enumerate(lengths):
        alone, _ = follow(config, text[b : b + 1], jnp.array([length]), later[b : b + 1])
        # Sums of another order may round one code the other way; a mixed-up sequence differs by about 1 everywhere.
        difference = np.abs(together[b] - alone[0])
        assert difference.max() < 0.05 and difference.mean() < 1e-3


@pytest.mark.parametrize("method", EVERY)
def test_padding_never_matters(method):
    text, later, lengths = tokens(2, 30), tokens(2, 10), jnp.array([30, 11])
    config = METHODS[method].replace(prompt_capacity=64)
    expected, _ = follow(config, text, lengths, later)
    padded = jnp.pad(text, ((0, 0), (0, 17)), constant_values=CONFIG.vocab_size + 5)
    # Padding changes the order of sums, which may tip a float16 scale; padding that is read differs by about 1.
    np.testing.assert_allclose(follow(config, padded, lengths, later)[0], expected, atol=1e-3)


def test_300_steps_cross_two_flushes_without_a_retrace_and_in_place():
    config = presets.minikv().replace(generated_capacity=300)
    traced = jax.jit(chex.assert_max_traces(decode_step, n=1), donate_argnames="cache")
    text = tokens(2, 64)
    _, cache = prefill(MODEL, text, jnp.array([64, 40]), config)
    size, before = nbytes(cache), int(cache.layers[0].segment.length[0])
    for _ in range(300):
        donated = cache
        logits, cache = traced(MODEL, cache, tokens(2))
        assert all(x.is_deleted() for x in jax.tree.leaves(donated))
    assert int(cache.layers[0].segment.length[0]) >= before + 2 * 128
    assert nbytes(cache) == size and bool(jnp.isfinite(logits).all())


def test_minikv_lengths_of_the_paper():
    # 600 tokens, half of them kept: 300, of which 288 fill groups of 16. The window of 128 starts with 12.
    config = presets.minikv().replace(generated_capacity=300)
    _, cache = prefill(MODEL, tokens(1, 600), jnp.array([600]), config)

    def lengths(cache):
        return int(cache.layers[0].segment.length[0]), int(cache.layers[0].window.length[0])

    assert lengths(cache) == (288, 12)
    flushes = []
    for i in range(1, 260):
        _, cache = step(MODEL, cache, tokens(1))
        if lengths(cache)[1] == 0:
            flushes.append((i, lengths(cache)[0]))
    assert flushes == [(116, 288 + 128), (244, 288 + 256)]


def test_a_split_model_is_as_good_as_the_module():
    text, lengths = tokens(1, 20), jnp.array([20])
    logits, cache = prefill(nnx.split(MODEL), text, lengths, METHODS["minikv"])
    np.testing.assert_allclose(logits, prefill(MODEL, text, lengths, METHODS["minikv"])[0], atol=1e-6)
    assert step(nnx.split(MODEL), cache, tokens(1))[0].shape == (1, CONFIG.vocab_size)


@pytest.mark.parametrize("method", EVERY)
def test_a_full_cache_refuses_more_tokens_loudly(method):
    config = METHODS[method].replace(generated_capacity=3)
    _, cache = prefill(MODEL, tokens(2, 20), jnp.array([20, 8]), config)
    for i in range(5):
        kept = jax.tree.map(jnp.array, cache)
        logits, cache = step(MODEL, cache, tokens(2))
        assert bool(jnp.isnan(logits).all()) == (i >= 3)
        if i >= 3:
            chex.assert_trees_all_equal(kept, cache)


@pytest.mark.parametrize("method", EVERY)
def test_a_broken_sequence_stays_alone(method):
    config = METHODS[method]
    broken = jax.tree.map(lambda x: x, MODEL)
    broken.head.set_value(MODEL.head[...].at[:, 3].set(jnp.nan))
    text = jnp.where(tokens(2, 30) == 3, 4, 1).at[0, 5].set(3)
    later = jnp.ones((2, 20), jnp.int32)
    together, _ = follow(config, text, jnp.array([30, 30]), later, params=broken)
    alone, _ = follow(config, text[1:], jnp.array([30]), later[1:], params=broken)
    columns = np.arange(CONFIG.vocab_size) != 3
    assert np.isnan(together[0, 0]).all()
    # A method that gives tokens up may come to drop the broken ones; the others stay broken for good.
    assert config.evict != "never" or np.isnan(together[0]).all()
    np.testing.assert_allclose(together[1][:, columns], alone[0][:, columns], atol=1e-5)


def test_generate_is_decode_step_after_decode_step():
    text, lengths, config = tokens(2, 24), jnp.array([24, 9]), METHODS["minikv"].replace(generated_capacity=40)
    written, cache = generate(MODEL, text, lengths, config, 30)
    streamed = np.stack([np.asarray(token) for token, _ in stream(MODEL, text, lengths, config, 30)], 1)
    np.testing.assert_array_equal(written, streamed)
    assert cache.lengths.tolist() == [24 + 29, 9 + 29]


def test_generation_ends_with_the_end_token():
    text, lengths, config = tokens(1, 24), jnp.array([24]), METHODS["full"]
    free, _ = generate(MODEL, text, lengths, config, 12)
    end = int(free[0, 4])
    first = free[0].tolist().index(end)
    ended, _ = generate(MODEL, text, lengths, config, 12, eos_token_ids=[end])
    assert ended[0].tolist() == free[0, :first].tolist() + [end] * (12 - first)


def test_sampling_stays_within_top_p_and_follows_the_temperature():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    keys = jax.random.split(jax.random.key(int(np.random.default_rng().integers(1 << 30))), 4000)

    def shares(sampling):
        drawn = jax.vmap(lambda key: sample(logits, key, sampling)[0])(keys)
        return np.bincount(np.asarray(drawn), minlength=4) / len(keys)

    np.testing.assert_allclose(shares(Sampling(1.0)), [0.5, 0.3, 0.15, 0.05], atol=0.04)
    np.testing.assert_allclose(shares(Sampling(1.0, top_p=0.7)), [0.625, 0.375, 0, 0], atol=0.04)
    assert shares(Sampling(0.0)).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(
    "text, lengths, change, error, match",
    [
        (jnp.zeros((1, 0), jnp.int32), [0], {}, PromptError, "empty"),
        (jnp.zeros((1, 8), jnp.int32), [0], {}, PromptError, "lengths"),
        (jnp.zeros((1, 8), jnp.int32), [9], {}, PromptError, "lengths"),
        (jnp.zeros((2, 8), jnp.int32), [8], {}, PromptError, "lengths"),
        (jnp.zeros((1, 8), jnp.int32), [8], {"prompt_capacity": 7}, PromptError, "prompt_capacity"),
        (jnp.zeros((1, 2000), jnp.int32), [8], {}, PromptError, "2048 positions"),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused(text, lengths, change, error, match):
    with pytest.raises(error, match=match):
        prefill(MODEL, text, jnp.array(lengths), presets.minikv(group_size=8).replace(**change))


def test_more_tokens_than_room_are_refused():
    with pytest.raises(ConfigError, match="generated_capacity"):
        generate(MODEL, tokens(1, 4), jnp.array([4]), presets.full().replace(generated_capacity=8), 10)


def test_groups_that_do_not_divide_the_head_are_refused():
    with pytest.raises(ConfigError, match="head size of 16"):
        prefill(MODEL, tokens(1, 40), jnp.array([40]), presets.minikv(group_size=32))


def test_a_sliding_window_model_takes_only_what_its_window_holds():
    model = Llama(CONFIG.replace(sliding_window=64), rngs=nnx.Rngs(params=0))
    with pytest.raises(ConfigError, match="last 64 tokens"):
        prefill(model, tokens(1, 60), jnp.array([60]), presets.full().replace(generated_capacity=8))
    text = tokens(1, 64)
    config = presets.full().replace(generated_capacity=14)
    logits, _ = follow(config, text[:, :50], jnp.array([50]), text[:, 50:], params=model)
    np.testing.assert_allclose(logits[0], forward(model, text)[0, 49:], atol=2e-5)


@pytest.mark.parametrize(
    "architecture, method",
    [("mistral", "full"), ("mistral", "mikv"), ("qwen2", "minikv"), ("mqa", "mikv"), ("mha", "minikv")]
    + [("bfloat16", method) for method in ("full", "minikv", "mikv")],
)
def test_every_kind_of_model_runs_every_kind_of_cache(architecture, method):
    changes = {
        "mistral": {"sliding_window": 256},
        "qwen2": {"query_key_value_bias": True, "tie_word_embeddings": False},
        "mqa": {"num_kv_heads": 1},
        "mha": {"num_kv_heads": 4},
        "bfloat16": {},
    }[architecture]
    dtype = jnp.bfloat16 if architecture == "bfloat16" else jnp.float32
    model = Llama(CONFIG.replace(num_layers=1, **changes), param_dtype=dtype, rngs=nnx.Rngs(params=1))
    if architecture == "qwen2":
        for name in ("query_bias", "key_bias", "value_bias"):
            bias = getattr(model.layers[0], name)
            bias.set_value(bias[...] + 3)
    config = {"full": presets.full(), "minikv": presets.minikv(1, 0, 8, 8, 16), "mikv": presets.mikv(0.5, bits=8,
              retained_bits=8)}[method].replace(generated_capacity=30)  # fmt: skip
    text = tokens(2, 60)
    logits, _ = follow(config, text[:, :40], jnp.array([40, 40]), text[:, 40:], params=model)
    expected = np.asarray(forward(model, text))[:, 39:]
    tolerance = 2e-5 if (method, dtype) == ("full", jnp.float32) else 0.15
    assert np.abs(logits - expected).max() < tolerance
