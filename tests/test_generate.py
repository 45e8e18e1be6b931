"""The whole model: prefill, decode_step and generate under jit, over ragged batches, across flushes."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import chex
import draws
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CONFIG, METHODS, every, nearly_equal, roomy, tokens

from minikv_jax import (
    ConfigError,
    PromptError,
    Sampling,
    allocate,
    bucket,
    decode_step,
    forward,
    generate,
    nbytes,
    prefill,
    presets,
    stream,
)
from minikv_jax.cache import Readers, Shape
from minikv_jax.compress import compress_in_pieces
from minikv_jax.models.llama import Llama
from minikv_jax.reading import chunk_rows, sequences_at_once
from minikv_jax.sampling import sample

MODEL = Llama(CONFIG.replace(num_layers=2), rngs=nnx.Rngs(params=0))
step = jax.jit(decode_step, donate_argnames="cache")


EVERY = every("minikv", "mikv")


def follow(config, prompt, lengths, later, params=MODEL, step=step):
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


@pytest.mark.parametrize("method", ["snapkv", pytest.param("minikv_pyramid", marks=pytest.mark.slow)])
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


@pytest.mark.parametrize("method", every("minikv"))
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
    _, cache = prefill(MODEL, text, jnp.array([64, 40]), config)
    size, before = nbytes(cache), int(cache.layers[0].first.length[0])
    for _ in range(300):
        donated = cache
        logits, cache = traced(MODEL, cache, tokens(2))
        assert all(x.is_deleted() for x in jax.tree.leaves(donated))
    assert int(cache.layers[0].first.length[0]) >= before + 2 * 128
    assert nbytes(cache) == size and bool(jnp.isfinite(logits).all())


def test_minikv_lengths_of_the_paper():
    # 600 tokens, half of them kept: 300, of which 288 fill groups of 16. The window of 128 starts with 12.
    config = presets.minikv().replace(generated_capacity=300)
    _, cache = prefill(MODEL, tokens(1, 600), jnp.array([600]), config)

    def lengths(cache):
        return int(cache.layers[0].first.length[0]), int(cache.layers[0].flow.length[0])

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
    _, cache = prefill(models.MODEL, tokens(3, 64), jnp.array([20, 8, 64]), roomy(method))
    for i in range(42):
        kept = cache
        logits, cache = models.step(models.MODEL, kept, tokens(3))
        assert bool(jnp.isnan(logits).all()) == (i >= 40)
        if i >= 40:
            chex.assert_trees_all_equal(kept, cache)


@pytest.mark.parametrize("method", EVERY)
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


@pytest.mark.parametrize("method", EVERY)
def test_generate_is_decode_step_after_decode_step(method):
    text, lengths, config = tokens(2, 24), jnp.array([24, 9]), METHODS[method].replace(generated_capacity=40)
    written, cache = generate(MODEL, text, lengths, config, 30)
    *streamed, (last, after) = stream(MODEL, text, lengths, config, 30)
    np.testing.assert_array_equal(written, np.stack([token for token, _ in streamed] + [last], 1))
    assert cache.lengths.tolist() == [24 + 29, 9 + 29]

    def counters(cache):
        return [[x for x in jax.tree.leaves(layer) if x.ndim == 1] for layer in cache.layers]

    chex.assert_trees_all_equal(counters(cache), counters(after))
    if method not in ("pyramidkv", "minikv_pyramid"):  # the loop counts once for all layers
        chex.assert_trees_all_equal(*counters(after))


@pytest.mark.parametrize("count", [12, 30])
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


def test_sampling_stays_within_top_p_and_follows_the_temperature():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    keys = jax.random.split(jax.random.key(int(draws.rng().integers(1 << 30))), 4000)

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
        bias = model.layers[0].query_key_value_bias
        bias.set_value(bias[...] + 3)
    config = {"full": presets.full(), "minikv": presets.minikv(1, 0, 8, 8, 16), "mikv": presets.mikv(0.5, bits=8,
              retained_bits=8)}[method].replace(generated_capacity=30)  # fmt: skip
    text = tokens(2, 60)
    logits, _ = follow(config, text[:, :40], jnp.array([40, 40]), text[:, 40:], params=model)
    expected = np.asarray(forward(model, text))[:, 39:]
    tolerance = 2e-5 if (method, dtype) == ("full", jnp.float32) else 0.15
    assert np.abs(logits - expected).max() < tolerance


def in_chunks_of(monkeypatch, rows: int, attended: int):
    """Reads prompts in pieces of so many rows, and so many in a call of attention."""
    for name, value in (("_ROWS", rows), ("_ATTENDED_ROWS", attended)):
        monkeypatch.setattr(sys.modules["minikv_jax.reading"], name, value)


@pytest.mark.parametrize(
    ("method", "rows", "attended"),
    [
        ("minikv", 3 * 128, 3 * 384),  # all sequences at once
        ("minikv", 128, 128),  # one after the other
        ("snapkv", 128, 256),
        *(pytest.param("mikv", *x, marks=pytest.mark.slow) for x in ((3 * 128, 3 * 384), (128, 128))),
    ],
)
def test_a_prompt_read_in_chunks_of_rows_is_the_prompt(method, rows, attended, monkeypatch):
    text, lengths, later, config = tokens(3, 300), jnp.array([300, 40, 131]), tokens(3, 4), METHODS[method]
    whole, _ = follow(config, text, lengths, later)
    in_chunks_of(monkeypatch, rows, attended)
    in_chunks, _ = follow(config, text, lengths, later)
    assert nearly_equal(whole, in_chunks)
    np.testing.assert_allclose(whole[:, 0], in_chunks[:, 0], atol=2e-5)


@pytest.mark.parametrize(
    "method",
    ["minikv_pyramid", "mikv", *(pytest.param(x, marks=pytest.mark.slow) for x in ("full", "kivi", "minikv_plus"))],
)
def test_sequences_read_one_group_after_the_other_are_the_batch(method, monkeypatch):
    text, lengths, later, config = tokens(4, 60), jnp.array([60, 21, 33, 4]), tokens(4, 4), METHODS[method]
    whole, expected = follow(config, text, lengths, later)
    monkeypatch.setattr(sys.modules["minikv_jax.reading"], "_ATTENDED_ROWS", 3 * 60)  # of 4 sequences 2 at once
    in_groups, cache = follow(config, text, lengths, later)
    assert nearly_equal(whole, in_groups)
    chex.assert_trees_all_equal_shapes_and_dtypes(cache, expected)
    done = []
    eager = prefill(MODEL, text, lengths, config, progress=lambda *counts: done.append(counts))
    assert done == [(i + 1, 4) for i in range(4)]  # two groups, two layers
    inside = jax.jit(lambda model, text, lengths: prefill(model, text, lengths, config))(MODEL, text, lengths)
    chex.assert_trees_all_equal_shapes_and_dtypes(inside, eager)
    np.testing.assert_allclose(inside[0], eager[0], atol=2e-5)


@given(batch=st.integers(1, 300), length=st.integers(0, 200_000))
def test_groups_of_sequences_are_even_and_fill_a_call_of_attention(batch, length):
    together = sequences_at_once(batch, length)
    assert batch % together == 0 and (together == 1 or together * length <= 32768)
    if batch * length <= 32768:
        assert together == batch


def test_logits_everywhere_are_the_same_in_chunks_of_rows(monkeypatch):
    model, text = Llama(CONFIG.replace(sliding_window=50), rngs=nnx.Rngs(params=0)), tokens(1, 300)
    whole = forward(model, text, jnp.array([290]))[:, :290]
    in_chunks_of(monkeypatch, 128, 256)
    np.testing.assert_allclose(whole, forward(model, text, jnp.array([290]))[:, :290], atol=2e-5)


@pytest.mark.parametrize(
    "method", ["minikv", *(pytest.param(x, marks=pytest.mark.slow) for x in ("h2o", "mikv", "kivi", "minikv_plus"))]
)
def test_a_layer_compressed_in_pieces_is_the_layer(method):
    config = METHODS[method].replace(prompt_capacity=40)
    rng, shape = draws.rng(), Shape.of(config, 0, 1)
    key, value = (jnp.asarray(rng.standard_normal((2, 40, 4, 16)), jnp.float32) for _ in range(2))
    scores, lengths = jnp.asarray(rng.random((2, 4, 40)), jnp.float32), jnp.array([40, 23])
    readers = Readers.of(key, 4, jnp.ones((2, 40), bool), None)
    arguments = key, value, scores, readers, lengths, allocate.budgets(config, 0, 1, lengths, 40)
    whole, parts = (compress_in_pieces(*arguments, config.method, shape, at_once=n) for n in (1 << 26, 40 * 16 * 2))
    chex.assert_trees_all_close(whole, parts)


@given(length=st.integers(1, 100_000))
def test_buckets_are_few_and_close(length):
    size = jax.eval_shape(bucket, jax.ShapeDtypeStruct((2, length), jnp.int32)).shape[1]
    assert length <= size <= max(length * 9 / 8, length + 15)
    assert jax.eval_shape(bucket, jax.ShapeDtypeStruct((2, size), jnp.int32)).shape[1] == size
    limited = jax.eval_shape(functools.partial(bucket, limit=length + 1), jax.ShapeDtypeStruct((2, length), jnp.int32))
    assert length <= limited.shape[1] <= length + 1


def test_prompts_of_one_bucket_share_a_program():
    config = METHODS["minikv"].replace(prompt_capacity=None)
    traced = jax.jit(chex.assert_max_traces(prefill, n=1))
    for length in (49, 55, 64):
        text = tokens(1, length)
        logits, _ = traced(MODEL, bucket(text), jnp.array([length]), config)
        np.testing.assert_allclose(logits, prefill(MODEL, text, jnp.array([length]), config)[0], atol=2e-5)


@pytest.mark.slow
def test_a_second_process_finds_the_programs_of_the_first(tmp_path):
    program = """
import jax, jax.numpy as jnp
from models import METHODS, MODEL, tokens
from minikv_jax import generate
generate(MODEL, tokens(1, 40), jnp.array([40]), METHODS["minikv"], 4)[0].block_until_ready()
"""
    settings = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parent, *sys.path)))}  # fmt: skip
    programs = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", program], env=os.environ | settings, check=True)
        programs.append({path.name for path in tmp_path.iterdir() if path.name.endswith("-cache")})
    assert programs[0] == programs[1] and len(programs[0]) > 5


@given(batch=st.integers(1, 64), tokens=st.integers(1, 400_000))
def test_chunks_cover_a_prompt_with_little_padding(batch, tokens):
    chunks = chunk_rows(batch, tokens)
    assert chunks.attention % chunks.products == 0
    # Less than 128 rows in each piece, of which the last may hold nothing else: at 153,601 tokens it does.
    pieces = -(-tokens // chunks.attention) * (chunks.attention // chunks.products)
    assert -tokens % chunks.attention < 128 * pieces
    assert chunks.products <= max(4096 // batch, 128)
    assert chunks.attention <= max((1 << 15) // batch, 128) + 128 * (chunks.attention // chunks.products)
