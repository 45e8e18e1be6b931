"""One layer's cache in a model of one's own: `minikv_jax.layer` against plain attention, and against our own models."""

import functools
import subprocess
import sys
import types

import chex
import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import CONFIG, METHODS, MODEL, kinds, tokens

from minikv_jax import ConfigError, PromptError, decode_step, layer, prefill, presets
from minikv_jax.models.llama import Llama

B, T, N, K, H = 2, 24, 4, 2, 16
FULL = presets.full().replace(prompt_capacity=T, generated_capacity=40)


def drawn(*rows):
    """Queries, keys and values [B, rows, heads, H] for each number of rows."""
    rng = draws.rng()
    return [tuple(draws.array(rng.standard_normal((B, t, n, H))) for n in (N, K, K)) for t in rows]


def plain_attention(query, key, value, lengths, *, scale=H**-0.5, soft_cap=None, sinks=None, window=None):
    """Causal attention of the last query rows of each sequence of `lengths` tokens, [B, T, N, H] in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    output = np.zeros(query.shape)
    for b, n in np.ndindex(B, N):
        for row in range(query.shape[1]):
            last = lengths[b] - query.shape[1] + row
            first = 0 if window is None else max(last + 1 - window, 0)
            logits = key[b, first : last + 1, n // (N // K)] @ query[b, row, n] * scale
            logits = logits if soft_cap is None else soft_cap * np.tanh(logits / soft_cap)
            p = np.exp(logits)
            p /= p.sum() + (0 if sinks is None else np.exp(float(sinks[n])))
            output[b, row, n] = p @ value[b, first : last + 1, n // (N // K)]
    return output


SOFTMAX = {
    "plain": {},
    "scale": {"scale": 0.4},
    "soft cap": {"soft_cap": 1.5},
    "sinks": {"sinks": jnp.asarray([0.5, -1.0, 2.0, 0.0])},
    "no sinks in two heads": {"sinks": jnp.asarray([0.5, -np.inf, -np.inf, 0.0])},
    "all": {"scale": 0.4, "soft_cap": 2.0, "sinks": jnp.asarray([0.5, -1.0, 2.0, 0.0])},
}


@pytest.mark.parametrize("options", SOFTMAX)
@pytest.mark.parametrize("window", [None, 7])
def test_a_full_cache_is_plain_attention(options, window):
    options = SOFTMAX[options]
    prompt, more, new = drawn(T, 3, 1)
    everything = [np.concatenate(x, axis=1) for x in zip(prompt, more, new)]
    place = {} if window is None else {"window": window}
    lengths = jnp.array([T, T])
    output, state = jax.jit(functools.partial(layer.prefill, config=FULL, **options, **place))(*prompt, lengths)
    np.testing.assert_allclose(output, plain_attention(*prompt, [T] * B, **options, **place), atol=2e-6)
    output, state = layer.extend(*more, jnp.array([3, 3]), state, **options)
    expected = plain_attention(more[0], *(x[:, : T + 3] for x in everything[1:]), [T + 3] * B, **options, **place)
    np.testing.assert_allclose(output, expected, atol=2e-6)
    output, state = layer.step(*new, state, **options)
    expected = plain_attention(new[0], *everything[1:], [T + 4] * B, **options, **place)
    np.testing.assert_allclose(output, expected, atol=2e-6)
    assert state.lengths.tolist() == [T + 4] * B and state.room.tolist() == [36] * B


@pytest.mark.parametrize("options", SOFTMAX)
def test_scores_know_scale_cap_and_sinks(options):
    """What attention sinks take, no token receives."""
    options = SOFTMAX[options]
    (prompt,) = drawn(T)
    config = presets.h2o(0.3, 0.2).replace(prompt_capacity=T)
    _, state = layer.prefill(*prompt, jnp.array([T, T]), config, **options)
    one = np.zeros((B, T, K, H))
    received = np.zeros((B, K, T))
    for i in range(T):  # attention to token i: the output for values that are one there
        value = one.copy()
        value[:, i] = 1
        seen = plain_attention(prompt[0], prompt[1], value, [T] * B, **options)[..., 0].sum(axis=1)
        received[:, :, i] = seen.reshape(B, K, N // K).sum(axis=-1)
    places, scores = state.cache.flow.positions, state.cache.flow.scores
    held = int(state.cache.first.length[0])
    expected = np.take_along_axis(received, np.asarray(places)[:, :, :held], axis=2)
    np.testing.assert_allclose(np.asarray(scores)[:, :, :held], expected, atol=2e-5)


def assert_alike(found, expected):
    """The same arrays, but for a number in a hundred that lay between two codes."""
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        assert x.shape == y.shape and np.mean(np.abs(x - y) > 1e-4 * (1 + np.abs(y))) < 0.01


@pytest.mark.parametrize("method", kinds("full"))
def test_our_own_models_hold_the_same(method):
    config = METHODS[method].replace(prompt_capacity=40, generated_capacity=20)
    text, lengths = tokens(2, 40), jnp.array([40, 23])
    logits, cache = prefill(MODEL, text, lengths, config)
    model, own = MODEL.layers[0], cache.layers[0]
    x = MODEL.embed(text)
    positions = jnp.broadcast_to(jnp.arange(40), (2, 40))
    rows = model.before_attention(x, positions)
    attention, state = layer.prefill(*rows, lengths, config, projection=model.projection())
    assert_alike(state.cache, own)
    last = jnp.take_along_axis(model.after_attention(x, attention), (lengths - 1)[:, None, None], axis=1)
    np.testing.assert_allclose(MODEL.logits(last)[:, 0], logits, atol=1e-5)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(
        jnp.shape, layer.spec(2, CONFIG.num_kv_heads, CONFIG.head_dim, config, jnp.float32)
    )
    theirs, ours = jax.jit(decode_step), jax.jit(layer.step)
    for i in range(18):  # over a window that fills
        logits, cache = theirs(MODEL, cache, text[:, i])
        x = MODEL.embed(text[:, i, None])
        attention, state = ours(*model.before_attention(x, state.lengths[:, None]), state)
        np.testing.assert_allclose(MODEL.logits(model.after_attention(x, attention))[:, 0], logits, atol=1e-5)
    assert_alike(state.cache, cache.layers[0])


@pytest.mark.parametrize("method", kinds("minikv"))
def test_a_full_state_says_so_and_stays_as_it_is(method):
    config = METHODS[method].replace(prompt_capacity=T, generated_capacity=2)
    prompt, new = drawn(T, 1)
    _, state = layer.prefill(*prompt, jnp.array([T, 5]), config)
    step = jax.jit(lambda *given: layer.step(*given))  # with programs of its own, to count
    for _ in range(2):
        output, state = step(*new, state, jnp.array([True, False]))
        assert np.isnan(output[1]).all() and not np.isnan(output[0]).any()
    before, (output, after) = state, step(*new, state)
    assert np.isnan(output[0]).all() and not np.isnan(output[1]).any()
    chex.assert_trees_all_equal(*(jax.tree.map(lambda x: x[:1], s) for s in (before, after)))
    assert step._cache_size() == 2  # with `accept` and without


def test_a_step_is_traced_once_and_its_state_is_donated():
    config = METHODS["minikv_plus"].replace(prompt_capacity=T, generated_capacity=40)
    prompt, new = drawn(T, 1)
    _, state = layer.prefill(*prompt, jnp.array([T, 9]), config)
    step = jax.jit(lambda q, k, v, state: layer.step(q, k, v, state), donate_argnames="state")
    for _ in range(20):
        given = jax.tree.leaves(state.cache.first)
        _, state = step(*new, state)
        assert all(x.is_deleted() for x in given)
    assert step._cache_size() == 1


def test_an_empty_state_has_no_room():
    state = layer.empty(3, K, H, FULL, jnp.float32)
    assert state.room.tolist() == [0, 0, 0] and state.nbytes == sum(x.nbytes for x in jax.tree.leaves(state))
    new = tuple(jnp.ones((3, 1, n, H)) for n in (N, K, K))
    output, after = layer.step(*new, state)
    assert np.isnan(output).all()
    chex.assert_trees_all_equal(state, after)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda q, k, v, s: layer.prefill(q, k, v[:, :5], jnp.array([5, 5]), FULL), PromptError, "must be"),
        (lambda q, k, v, s: layer.prefill(q[:, :, :3], k, v, jnp.array([5, 5]), FULL), PromptError, "multiple"),
        (lambda q, k, v, s: layer.prefill(q, k, v, np.array([0, 5]), FULL), PromptError, "from 1 to the 24"),
        (lambda q, k, v, s: layer.prefill(q, k, v, np.array([5]), FULL), PromptError, r"\[B\]=\(2,\)"),
        (lambda q, k, v, s: layer.prefill(q, k, v, np.array([5, 5]), FULL, window=0), ConfigError, "window=0"),
        (
            lambda q, k, v, s: layer.prefill(q, k, v, np.array([5, 5]), FULL, projection=jnp.ones((N * 16, 8))),
            PromptError,
            r"projection has shape .* give \[N, H, D\]",
        ),
        (lambda q, k, v, s: layer.step(q, k, v, s), PromptError, "use extend"),
        (lambda q, k, v, s: layer.step(q[:1, :1], k[:1, :1], v[:1, :1], s), PromptError, "a state of 2 sequences"),
        (lambda q, k, v, s: layer.extend(q, k, v, np.array([24, 41]), s), PromptError, "from 0 to the 24"),
        (lambda q, k, v, s: layer.spec(2, K, H, presets.full(), jnp.float32), ConfigError, "prompt_capacity"),
    ],
)
def test_what_does_not_fit_is_named(call, error, words):
    (prompt,) = drawn(T)
    state = layer.empty(B, K, H, FULL, jnp.float32)
    with pytest.raises(error, match=words):
        call(*prompt, state)


def test_importing_it_loads_no_model_library():
    program = "import sys, minikv_jax.layer; print([m for m in ('flax', 'transformers', 'optax') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


class Doubled:
    """A model that is none of ours, as `minikv_jax.model` describes it."""

    def __init__(self, model: Llama):
        self.config, self.layers, self._model = model.config, model.layers, model

    def embed(self, tokens):
        return self._model.embed(tokens)

    def logits(self, x):
        return 2 * self._model.logits(x)


jax.tree_util.register_pytree_node(Doubled, lambda model: ((model._model,), None), lambda _, leaves: Doubled(*leaves))


def test_a_model_of_ones_own_runs_through_the_same_functions():
    text, lengths = tokens(2, 12), jnp.array([12, 7])
    config = presets.minikv(group_size=8, residual=16)
    for step in (decode_step, jax.jit(decode_step)):
        logits, cache = prefill(Doubled(MODEL), text, lengths, config)
        expected, expected_cache = prefill(MODEL, text, lengths, config)
        np.testing.assert_allclose(logits, 2 * expected, rtol=1e-6)
        logits, _ = step(Doubled(MODEL), cache, text[:, 0])
        expected, _ = decode_step(MODEL, expected_cache, text[:, 0])
        np.testing.assert_allclose(logits, 2 * expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="without config, layers"):
        decode_step(object(), cache, text[:, 0])
    lacking = types.SimpleNamespace(config=CONFIG, layers=[object()], embed=MODEL.embed, logits=MODEL.logits)
    with pytest.raises(ConfigError, match="layer is a object without config, projection"):
        decode_step(lacking, cache, text[:, 0])
