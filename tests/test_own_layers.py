"""Layers of their own: more bits in some, fewer tokens in others, and the command that finds them."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from flax import nnx
from models import CONFIG, tokens

from minikv_jax import Codec, ConfigError, cli, decode_step, empty_cache, insert, prefill, prefill_in_chunks, presets
from minikv_jax.cache import nbytes
from minikv_jax.decode import decode_loop
from minikv_jax.evals import calibrate, engine
from minikv_jax.evals.task import Lab, Settings
from minikv_jax.models.llama import Llama
from minikv_jax.report import cache_report, planned_report
from minikv_jax.sampling import Sampling

DEEP = CONFIG.replace(num_layers=3)
MODEL = Llama(DEEP, rngs=nnx.Rngs(params=0))


def plus(residual=16, **knobs):
    return presets.minikv_plus(group_size=8, residual=residual, **knobs).replace(generated_capacity=40)


# Of one room in all tests, so that its step is compiled once.
MIXED = plus(precise=(1,), brief=(0,), brief_share=0.4).replace(prompt_capacity=90)
step = jax.jit(decode_step)


def read(config, text, lengths, later):
    """Logits after the prompt and after each later token, and the cache."""
    logits, cache = prefill(MODEL, text, lengths, config)
    found, compiled = [logits], step._cache_size()
    for i in range(later.shape[1]):
        logits, cache = step(MODEL, cache, later[:, i])
        found.append(logits)
    assert step._cache_size() <= compiled + 1
    return np.stack(found, axis=1), cache


@pytest.mark.slow
def test_each_layer_holds_what_it_would_hold_under_a_method_of_its_own():
    text, lengths = tokens(2, 90), jnp.array([90, 41])
    _, mixed = prefill(MODEL, text, lengths, MIXED)
    for i, alone in enumerate((plus(heavy=0.2, recent=0.2), plus(key_bits=4, value_bits=4), plus())):
        _, cache = prefill(MODEL, text, lengths, alone)
        chex.assert_trees_all_equal(mixed.layers[i], cache.layers[i])
    # The brief layer's memory is really gone: 0.4 of 90 tokens beside 4 sinks and room for 40, in blocks of 128.
    sizes = [layer.bytes_tiers for layer in cache_report(mixed).layers]
    assert sizes[0] <= sizes[2] < sizes[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "everywhere,alone",
    [
        (dict(precise=(0, 1, 2)), dict(key_bits=4, value_bits=4)),
        (dict(brief=(0, 1, 2), brief_share=0.5), dict(heavy=0.25, recent=0.25)),
    ],
)
def test_all_layers_alike_are_the_method_alike(everywhere, alone):
    text, lengths, later = tokens(2, 60), jnp.array([60, 33]), tokens(2, 30)  # windows are encoded on the way
    found, expected = (read(plus(**knobs), text, lengths, later)[0] for knobs in (everywhere, alone))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
def test_a_batch_answers_as_its_prompts_alone_and_in_a_slot():
    text, lengths, later = tokens(2, 60), jnp.array([60, 33]), tokens(2, 30)
    together, cache = read(MIXED, text, lengths, later)
    assert cache.room.tolist() == [10, 10]
    slots = empty_cache(MODEL, MIXED, 2)
    for row, length in enumerate((60, 33)):
        logits, cache = prefill(MODEL, text[row : row + 1], jnp.array([length]), MIXED)
        np.testing.assert_allclose(together[row, 0], logits[0], atol=1e-4)
        slots = insert(slots, 1 - row, cache)
    for i in range(30):
        logits, slots = step(MODEL, slots, later[::-1, i])
        np.testing.assert_allclose(together[:, i + 1], logits[::-1], atol=1e-3)


@pytest.mark.slow
def test_the_loop_decodes_what_steps_decode():
    text, lengths = tokens(2, 60), jnp.array([60, 33])
    logits, cache = prefill(MODEL, text, lengths, MIXED)
    first = logits.argmax(-1).astype(jnp.int32)
    written, _ = decode_loop(MODEL, cache, first, jax.random.key(0), Sampling(), 31, ())
    _, cache = prefill(MODEL, text, lengths, MIXED)
    token = first
    for i in range(1, 31):
        logits, cache = step(MODEL, cache, token)
        token = written[:, i]
        best = np.take_along_axis(np.asarray(logits), np.asarray(token)[:, None], axis=1)[:, 0]
        np.testing.assert_allclose(best, logits.max(axis=1), atol=1e-3)


@pytest.mark.slow
def test_a_prompt_in_chunks_leaves_the_same():
    text, lengths = tokens(2, 60), jnp.array([60, 33])
    logits, cache = prefill(MODEL, text, lengths, MIXED)
    chunked_logits, chunked = prefill_in_chunks(MODEL, text, lengths, MIXED, chunk=16)
    np.testing.assert_allclose(logits, chunked_logits, atol=1e-4)
    assert jax.tree.map(jnp.shape, cache) == jax.tree.map(jnp.shape, chunked)


@pytest.mark.slow
def test_each_layer_has_the_scores_that_its_own_method_ranks_by():
    """SnapKV's last queries in one layer, H2O's all queries in another: read at once, in chunks, and by evaluations."""
    snap, heavy = presets.snapkv(budget=16, window=4, pooling=1).method, presets.h2o(persistent=True).method
    mixed = presets.full().replace(generated_capacity=8).replace(layers=((0, snap), (1, heavy)))
    text, lengths = tokens(2, 60), jnp.array([60, 33])
    _, cache = prefill(MODEL, text, lengths, mixed)
    for i, method in enumerate((snap, heavy)):
        _, alone = prefill(MODEL, text, lengths, dataclasses.replace(mixed, layers=((i, method),)))
        np.testing.assert_array_equal(cache.layers[i].first.length, alone.layers[i].first.length)
    _, chunked = prefill_in_chunks(MODEL, text, lengths, mixed, chunk=16)
    read = engine.read_prompt(MODEL, text, lengths, {"mixed": mixed}).caches["mixed"]
    for other in (chunked, read):
        for i, count in ((0, 16), (1, 12)):
            rows = (x.layers[i].first.key[0, :, :count] for x in (cache, other))
            np.testing.assert_allclose(*rows, atol=1e-4)


@pytest.mark.slow
def test_short_prompts_are_kept_whole():
    text, lengths, later = tokens(2, 5), jnp.array([5, 1]), tokens(2, 4)
    found, expected = (read(config, text, lengths, later)[0] for config in (MIXED, presets.full()))
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.slow
def test_the_plan_weighs_what_the_cache_weighs():
    config = MIXED.replace(dtype="bfloat16", prompt_capacity=300)
    _, cache = prefill(MODEL, tokens(1, 300), jnp.array([300]), config)
    planned = planned_report(DEEP, config, 300, 40)
    assert planned.total.bytes_held == nbytes(cache.layers)
    assert [x.bytes_tiers for x in planned.layers] == [x.bytes_tiers for x in cache_report(cache).layers]


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: prefill(MODEL, tokens(1, 20), jnp.array([20]), plus(precise=(3,))), "3 layers, counted from 0"),
        (lambda: plus(brief=(-1,)), "counted from 0"),
        (lambda: plus().replace(layers=((1, plus().method),) * 2), "give each layer one method"),
        (lambda: MIXED.replace(codec=Codec(4, 4, 24, 16)), "must divide 128"),
        (lambda: plus(precise=(1,), important=0.1), "leave important at 0"),
        (lambda: calibrate.calibrate(LAB, plus(), 1, 1), "precise codec"),
        (lambda: calibrate.calibrate(LAB, MIXED, 2, 2), "of 3: give fewer"),
    ],
)
def test_mistakes_are_one_clear_line(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


# ---- calibration ---------------------------------------------------------------------------------------------------

LAB = Lab(MODEL, tiny.Characters(), Settings(lengths=(256,), limit=2, new_tokens=12))
EVERY = plus(64, precise=(0, 1, 2), brief=(0, 1, 2))  # no window fills up


@pytest.mark.slow
def test_an_exchanged_layer_costs_what_reading_with_such_a_method_costs():
    reading = calibrate._texts(LAB)
    walk = calibrate._Walk.of(LAB, EVERY, reading)
    prompt = engine.fitted(MODEL, reading.prompts, 12, LAB.prompt_step)
    changes = {"generated_capacity": 16, "dtype": "bfloat16"}
    methods = {"plain": plus(64), "one": plus(64, precise=(1,)), "two": plus(64, precise=(1,), brief=(2,))}
    methods["full"] = presets.full()
    methods = {name: config.replace(**changes) for name, config in methods.items()}
    (follow,) = [(reading.follows, reading.lengths)]
    hidden = engine.read_follows(MODEL, *prompt, methods, [follow])
    targets = np.pad(np.roll(reading.follows, -1, axis=1), ((0, 0), (0, 4)))
    kl = {
        name: engine.figures(MODEL, x, hidden["full"][0], targets).kl[:, :12][reading.counted].mean()
        for name, (x,) in hidden.items()
    }
    # Tokens of the answer see each other exactly here, and through a window in bfloat16 there.
    np.testing.assert_allclose(walk.base, kl["plain"], rtol=0.02)
    np.testing.assert_allclose(walk.loss(MODEL, {1: "precise"}) * walk.base, kl["one"], rtol=0.02)
    np.testing.assert_allclose(walk.loss(MODEL, {1: "precise", 2: "brief"}) * walk.base, kl["two"], rtol=0.02)
    assert walk.loss(MODEL, {}) == pytest.approx(1)


@pytest.mark.slow
def test_the_command_chooses_the_layers_that_pay_most(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "_load", lambda *_: (MODEL, tiny.Characters()))
    out = tmp_path / "layers.json"
    arguments = ["--precise", "1", "--brief", "1", "--length", "700", "--limit", "2", "--new-tokens", "12"]
    knobs = ["--set", "group_size=8", "--set", "residual=16"]
    done = CliRunner().invoke(cli.app, ["calibrate", *arguments, *knobs, "--out", str(out)], catch_exceptions=False)
    found = json.loads(out.read_text())
    gain, harm = ([row[name] for row in found["rows"]] for name in ("gain", "harm"))
    assert len(gain) == 3 and found["precise"] == [int(np.argmax(gain))]
    assert found["brief"] == [min((i for i in range(3) if i not in found["precise"]), key=lambda i: harm[i])]
    assert 0 < found["loss"] < 1 + max(harm)
    assert f"minikv_plus:group_size=8,residual=16,precise=[{found['precise'][0]}]" in done.output
    (config,) = presets.parse(done.output.split("\n")[0]).values()
    own = dict(config.layers)
    assert sorted(own) == sorted([*found["precise"], *found["brief"]])
    assert all((own[i].codec != config.method.codec) == (i in found["precise"]) for i in own)
