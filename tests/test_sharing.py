"""Layers that read an earlier layer's cache: the same answers as attention over that layer's keys and values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from models import CONFIG, METHODS, slow, step, tokens

from minikv_jax import (
    ConfigError,
    cache_report,
    extend,
    fork,
    forward,
    generate,
    insert,
    prefill,
    prefill_in_chunks,
    presets,
)
from minikv_jax.evals.engine import attention_errors, read_follows, read_on, read_prompt
from minikv_jax.evals.sharing import _resolved, find
from minikv_jax.evals.task import Lab, Settings
from minikv_jax.models.latent import lorc
from minikv_jax.models.llama import Llama
from minikv_jax.models.shared import kvsharer
from minikv_jax.prefill import empty_cache
from minikv_jax.report import planned_report
from pallas_kernels import two_pass_attention

FOUR = dataclasses.replace(CONFIG, num_layers=4)
MODEL = Llama(FOUR, rngs=nnx.Rngs(params=3))
PAIRS = (1, 3), (0, 2)
SHARED = kvsharer(MODEL, *PAIRS)
LENGTHS = np.array([40, 13])


@jax.jit
def plain(model, text, lengths):
    """Logits [B, T, V] of the whole model, whose layers 1 and 3 attend to the keys and values of 0 and 2."""
    x, lent = model.embed(text), {}
    positions = jnp.broadcast_to(jnp.arange(text.shape[1]), text.shape)
    for i, layer in enumerate(model.layers):
        query, key, value = layer.before_attention(x, positions)
        key, value = lent.setdefault({1: 0, 3: 2}.get(i, i), (key, value))
        attention, *_ = two_pass_attention(query, key, value, query_lengths=lengths, key_value_lengths=lengths)
        x = layer.after_attention(x, attention)
    return model.logits(x)


def of(base, generated=20):
    config = dataclasses.replace(METHODS[base], weights=presets.kvsharer(*PAIRS).weights)
    return config.replace(prompt_capacity=40, generated_capacity=generated)


def test_forward_is_attention_over_the_lent_keys():
    text = tokens(2, 40)
    got, want = forward(SHARED, text, LENGTHS), plain(MODEL, text, jnp.asarray(LENGTHS))
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(got[row, :length], want[row, :length], atol=1e-4)


def test_prompts_steps_and_turns_are_those_of_one_long_text():
    text = tokens(1, 58)
    want = plain(MODEL, text, jnp.array([58]))[0]
    logits, cache = prefill(SHARED, text[:, :40], np.array([40]), of("full"))
    np.testing.assert_allclose(logits[0], want[39], atol=1e-4)
    chunked, other = prefill_in_chunks(SHARED, text[:, :40], np.array([40]), of("full"), chunk=16)
    np.testing.assert_allclose(chunked[0], want[39], atol=1e-4)
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(other)):
        np.testing.assert_allclose(a, b, atol=1e-4)
    for i in range(40, 46):
        logits, cache = step(SHARED, cache, text[:, i])
        np.testing.assert_allclose(logits[0], want[i], atol=1e-4)
    logits, cache = extend(SHARED, cache, text[:, 46:58], np.array([12]))
    np.testing.assert_allclose(logits[0], want[57], atol=1e-4)


def test_shared_layers_hold_nothing_and_reports_count_them():
    _, cache = prefill(SHARED, tokens(2, 40), LENGTHS, of("full"))
    _, whole = prefill(MODEL, tokens(2, 40), LENGTHS, presets.full().replace(generated_capacity=20))
    mine, full = cache_report(cache).total, cache_report(whole).total
    assert len(cache.layers) == 2 and mine.bytes_tiers * 2 == full.bytes_tiers
    assert mine.bytes_bfloat16 == full.bytes_bfloat16
    plans = [planned_report(FOUR, x, 40, 20).total.bytes_tiers for x in (of("full"), presets.full())]
    assert 2 * plans[0] == plans[1]
    weights = [sum(x.nbytes for x in jax.tree.leaves(nnx.state(model.layers[1]))) for model in (SHARED, MODEL)]
    gone = 2 * FOUR.num_kv_heads * FOUR.head_dim * FOUR.hidden_size * 4
    assert weights[0] + gone == weights[1]


@pytest.mark.parametrize("base", slow("minikv_plus", "kivi", "h2o", "think"))
def test_every_method_serves_the_layers_that_are_left(base):
    """Slots, forks and rows alone, over a flush; a step is traced once."""
    config, text = of(base, 140), tokens(2, 40)
    logits, cache = prefill(SHARED, text, LENGTHS, config)
    slots = empty_cache(SHARED, config, 2)
    for row, length in enumerate(LENGTHS):
        alone, one = prefill(SHARED, text[row : row + 1, :40], np.array([length]), config)
        np.testing.assert_allclose(alone[0], logits[row], atol=1e-4)
        slots = insert(slots, row, one)
    for _ in range(3):
        token = tokens(2)
        (got, slots), (want, cache) = (step(SHARED, x, token) for x in (slots, cache))
        np.testing.assert_allclose(got, want, atol=1e-3)
    answers, _ = generate(SHARED, text[:1], LENGTHS[:1], config, 135)
    assert answers.shape == (1, 135)
    _, one = prefill(SHARED, text[:1], LENGTHS[:1], config)
    logits, _ = step(SHARED, fork(one, 2), tokens(2))
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: presets.kvsharer((1,), ()), "one source for each"),
        (lambda: presets.kvsharer((1,), (1,)), "before its layer"),
        (lambda: presets.kvsharer((1, 2), (0, 1)), "before its layer"),
        (lambda: kvsharer(MODEL, (7,), (0,)), r"layers=\[7\]"),
        (lambda: kvsharer(SHARED, (1,), (0,)), "changed before"),
        (lambda: lorc(SHARED, 0.5, 0.5), "as `load` gives it"),
        (lambda: prefill(MODEL, tokens(1, 4), np.array([4]), of("full")), "as they were loaded"),
        (lambda: prefill(SHARED, tokens(1, 4), np.array([4]), presets.full()), "as it was loaded"),
    ],
)
def test_what_cannot_be_shared_is_named(make, named):
    with pytest.raises(ConfigError, match=named):
        make()


def test_evaluations_read_on_as_steps_do():
    text, config = tokens(1, 46), of("full")
    prompt = read_prompt(MODEL, text[:, :40], np.array([40]), {"shared": config})
    x, cache = read_on(MODEL, prompt.caches["shared"], text[:, 40:], np.array([6]))
    _, steps = prefill(SHARED, text[:, :40], np.array([40]), config)
    for i in range(6):
        logits, steps = step(SHARED, steps, text[:, 40 + i])
    np.testing.assert_allclose(MODEL.logits(x)[:, -1], logits, atol=1e-4)
    (follow,) = read_follows(MODEL, text[:, :40], np.array([40]), {"x": config}, [(text[:, 40:], np.array([6]))])["x"]
    np.testing.assert_allclose(follow[:, :6], x, atol=1e-4)
    with pytest.raises(ConfigError, match="not their own"):
        attention_errors(MODEL, cache, {"shared": cache}, text[:, :2])


def test_the_search_finds_what_the_threshold_lets():
    lab = Lab(MODEL, tiny.Characters(), Settings(limit=3))
    found = find(lab, 2, threshold=-1.0)
    assert len(found.layers) == len(found.sources) == len(found.cosine) == 2
    assert not set(found.layers) & set(found.sources)
    text = jnp.asarray(tokens(2, 12))
    shared = kvsharer(MODEL, found.layers, found.sources)
    assert np.isfinite(forward(shared, text)).all()
    # The most unlike pair comes first, and alone is what the first cosine is of.
    (first,) = set(find(lab, 1, threshold=-1.0).layers)
    assert first in found.layers
    for count, change, named in ((4, {}, "--share 4"), (1, {"threshold": 1.0}, "give fewer")):
        with pytest.raises(ConfigError, match=named):
            find(lab, count, **change)
    with pytest.raises(ConfigError, match="as it was loaded"):
        find(dataclasses.replace(lab, model=SHARED), 1)


def test_no_layer_shares_by_default():
    _, cache = prefill(MODEL, tokens(1, 9), np.array([9]), presets.kvsharer().replace(generated_capacity=4))
    assert len(cache.layers) == 4


def test_a_source_that_reads_another_stands_for_that_one():
    assert _resolved({3: 2, 2: 1, 5: 4}) == {3: 1, 2: 1, 5: 4}
