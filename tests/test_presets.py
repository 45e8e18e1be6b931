"""The knobs that go beyond the papers: each does what it says, and none changes what it should not."""

import inspect
import json
import math

import draws
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from layer import draw, run

from minikv_jax import CacheConfig, Codec, ConfigError, presets, rank
from minikv_jax.basis import Hadamard, Quantized
from minikv_jax.block import Block
from minikv_jax.config import Rank
from minikv_jax.models.shapes import shape_of
from minikv_jax.report import planned_report
from pallas_kernels import quantize
from pallas_kernels.hadamard import hadamard, rotate

PLAIN = presets.minikv(bits=8, group_size=8, residual=16)


def outputs(config, prompt, stream, lengths):
    return np.asarray(run(config, *prompt, np.array(lengths), stream).outputs)


@pytest.mark.parametrize(
    "knob", [{"rotate": True}, {"balance": True}, {"clip": (0.95, 0.9)}, {"metadata_dtype": "bfloat16"}]
)
@pytest.mark.parametrize("method", ["minikv", pytest.param("kivi", marks=pytest.mark.slow)])
def test_a_codec_knob_changes_rounding_only(method, knob):
    # At 8 bits the codes hardly round, so what is stored and what is asked must fit together whatever the knob.
    base = {"group_size": 8, "residual": 16}
    base |= {"bits": 8} if method == "minikv" else {"key_bits": 8, "value_bits": 8}
    prompt, stream = draw(draws.rng(), 2, 64, 40, 2, 2, 16)
    plain, turned = (outputs(presets.by_name(method, **base, **more), prompt, stream, (64, 33)) for more in ({}, knob))
    assert np.abs(plain - turned).mean() < 0.05 < np.abs(plain).mean()
    # A range is clipped only where that helps, which it hardly does at 8 bits.
    assert "clip" in knob or not np.array_equal(plain, turned)


def test_quantised_first_keeps_the_ranges_of_neighbours_that_left():
    # Heads with few enough tokens that groups of 8 break, and an end that fills no group.
    prompt, stream = draw(draws.rng(), 2, 64, 3, 2, 2, 16)
    dense, lengths = presets.minikv(0.3, 0.2, bits=16), np.array([64, 43])
    codec = presets.minikv(group_size=8).method.codec
    plain, coded = (run(c, *prompt, lengths, stream).prompt for c in (dense, dense.replace(basis=(Quantized(codec),))))
    rounded = [np.asarray(x).copy() for x in prompt[1:]]
    for b, length in enumerate(lengths):
        whole = length // 8 * 8
        keys, values = (x[b, :whole] for x in prompt[1:])  # groups of 8 tokens, and of 8 channels
        rounded[0][b, :whole] = np.moveaxis(reference.roundtrip_per_token(np.moveaxis(keys, 0, -1), 2, 8), -1, 0)
        rounded[1][b, :whole] = reference.roundtrip_per_token(values, 2, 8)
    for b, head in np.ndindex(2, 2):
        held = int(plain.first.length[b])
        keys = prompt[1][b, :, head]
        rows = [int(np.abs(keys - row).sum(-1).argmin()) for row in plain.first.key[b, head, :held]]
        assert len(set(rows)) == held == int(coded.first.length[b]) < lengths[b]
        np.testing.assert_allclose(coded.first.key[b, head, :held], rounded[0][b, rows, head], atol=1e-4)
        np.testing.assert_allclose(coded.first.value[b, head, :held], rounded[1][b, rows, head], atol=1e-4)


def test_rotation_helps_where_one_channel_is_loud():
    # Groups over channels share the loud channel's range; rotated, every channel has a quarter of it.
    x = draws.rng().standard_normal((1, 2, 128, 16)) * np.where(np.arange(16) == 5, 30, 1)
    x = jnp.asarray(x, jnp.float32)
    errors = []
    for y in (x, rotate(x)):
        errors.append(
            float(jnp.square(quantize.decode(quantize.encode(y, 2, 16, "channels"), 16, "channels") - y).mean())
        )
    assert errors[1] < 0.7 * errors[0]
    np.testing.assert_allclose(hadamard(16) @ hadamard(16), np.eye(16), atol=1e-6)


def test_clipping_never_loses_precision():
    x = jnp.asarray(draws.rng().standard_t(2, (1, 2, 64, 32)), jnp.float32)
    errors = []
    for clip in ((), (0.9,), (0.9, 0.8, 0.7)):
        codes = quantize.encode(x, 2, 16, "tokens", "float16", clip)
        errors.append(float(jnp.square(quantize.decode(codes, 16, "tokens") - x).sum()))
    assert errors[0] > errors[1] > errors[2]


def test_the_balancer_is_the_papers():
    prompt, stream = draw(draws.rng(), 1, 48, 1, 2, 3, 16)
    cache = run(presets.mikv(), *prompt, np.array([48]), stream).prompt
    np.testing.assert_allclose(cache.rest.balance[0], reference.channel_balancer(prompt[0][0], prompt[1][0]), rtol=1e-5)


def test_whole_numbered_minima_are_q_hitters():
    x = draws.rng().standard_normal((1, 1, 128, 32)).astype(np.float32)
    codes = quantize.encode(jnp.asarray(x), 4, 32, "channels", "float16", (), True)
    expected = reference.integer_zero_roundtrip(x[0, 0], 4)
    # The minimum is stored in float16: its rounding, and now and then a number half-way between two codes.
    difference = np.abs(quantize.decode(codes, 32, "channels")[0, 0] - expected)
    assert np.mean(difference > 4e-3) < 1e-3


@pytest.mark.parametrize("length", [64, 30])
def test_sinks_stay(length):
    prompt, stream = draw(draws.rng(), 1, 64, 1, 2, 1, 16)
    # Keys that nobody attends to: only the knob can keep them.
    prompt[1][:, :4] = -10 * np.sign(prompt[0].mean(axis=(0, 1, 2))) * np.ones(16)
    config = presets.h2o(0.2, 0.1, sinks=4)
    ledger = run(config, *prompt, np.array([length]), stream).prompt.flow
    for head in range(2):
        assert {0, 1, 2, 3} <= set(ledger.positions[0, head, : 4 + int(length * 0.2) + int(length * 0.1)].tolist())


def test_scores_are_normalised_pooled_and_weighted():
    rng = draws.rng()
    scores, value = rng.random((1, 1, 20)).astype(np.float32), rng.standard_normal((1, 1, 20, 8)).astype(np.float32)
    lengths, recent = jnp.array([20]), jnp.array([5])

    def refined(**knobs):
        return np.asarray(rank.refine(jnp.asarray(scores), jnp.asarray(value), lengths, recent, Rank(**knobs)))[0, 0]

    rows = np.arange(20, 0, -1)
    np.testing.assert_allclose(refined(by="attention", normalize=True), scores[0, 0] / rows, rtol=1e-5)
    expected = scores[0, 0] / np.minimum(rows, 4)
    np.testing.assert_allclose(refined(by="last_queries", queries=4, normalize=True), expected, rtol=1e-5)
    norms = np.linalg.norm(value[0, 0], axis=-1)
    np.testing.assert_allclose(refined(by="attention", value_norm=True), scores[0, 0] * norms, rtol=1e-5)
    for pool in ("avg", "max"):
        expected = reference.pool(scores[0, 0, :15], 5, pool)
        np.testing.assert_allclose(refined(by="attention", pooling=5, pool=pool)[:15], expected, rtol=1e-5)


def test_budgets_per_head_are_refused():
    with pytest.raises(ConfigError, match="no memory freed"):
        presets.by_name("minikv", per_head=True)


@pytest.mark.parametrize(
    "make, named",
    [
        (lambda: Rank(by="age"), "by='age'"),
        (lambda: Rank(by="attention", pooling=4), "pooling=4"),
        (lambda: presets.snapkv(window=0), "window=0"),
        (lambda: presets.mikv(retained_bits=16, balance=False), "second tier"),
        (lambda: presets.mikv(ratio=0.0), "budget=0.0"),
        (lambda: presets.kivi(key_bits=16), "key_bits=16"),
        (lambda: presets.kivi(group_size=32, residual=100), "window=100"),
        (lambda: presets.minikv(metadata_dtype="int8"), "int8"),
        (lambda: presets.minikv(clip=(1.5,)), "clip"),
        (
            lambda: presets.kivi(rotate=True).replace(codec=Codec(2, 2, 32, 32, balance=True)),
            "put a Balance before the Hadamard",
        ),
        (lambda: presets.h2o().replace(inflow=Block(exact_sinks=True)), "encoded together"),
        (lambda: presets.full().replace(basis=(Hadamard(),)), "Rotation needs a tier"),
        (lambda: Codec(2, 2, 16, 16, "channels", key_feedback="all"), "key_feedback"),
        (lambda: Codec(2, 2, 16, 16, key_feedback="yes"), "'none' or 'prompt' or 'all'"),
        (lambda: presets.h2o(heavy=-3), "heavy=-3"),
        (lambda: PLAIN.replace(dtype="int8"), "int8"),
        (lambda: PLAIN.replace(generated_capacity=0), "generated_capacity=0"),
    ],
)
def test_a_value_out_of_range_is_named(make, named):
    with pytest.raises(ConfigError, match=named):
        make()


# ---- whatever a knob is given --------------------------------------------------------------------------------------

KNOBS = [(name, knob) for name, preset in presets.METHODS.items() for knob in inspect.signature(preset).parameters]
_NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([0, 1, 16, 128, 1024, 2**30 - 1, 2**30, 2**31, 2**63, 10**30, -(10**30), 10**400]),
    st.floats(),
    st.sampled_from([0.0, 0.5, 1.0, -0.5, 1e30, math.nan, math.inf, -math.inf]),
)
_WORDS = st.one_of(
    st.text(),
    st.sampled_from(["head", "half_head", "float8_e4m3fn", "bfloat16", "all", "prompt", "none", "avg", "max", "a\nb"]),
    st.just("x" * 100_000),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), _NUMBERS, _WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(), inner, max_size=2)),
    max_leaves=8,
)


def made(make, *arguments, **knobs) -> CacheConfig | None:
    """The method, or None where one readable line refuses it."""
    try:
        config = make(*arguments, **knobs)
    except ConfigError as error:
        assert len(str(error)) < 600 and str(error).isprintable() and "\n" not in str(error)
        return None
    assert isinstance(config, CacheConfig) and hash(config) == hash(config.replace())
    return config


@settings(max_examples=1500)
@given(st.lists(st.tuples(st.sampled_from(KNOBS), VALUES), min_size=1, max_size=3))
def _every_value_is_taken_or_refused(chosen):
    ((name, _), _), *_ = chosen
    knobs = {knob: value for (method, knob), value in chosen if method == name}
    config = made(presets.by_name, name, **knobs)
    # What JSON says is what Python says.
    assert made(presets.with_settings, name, [f"{k}={json.dumps(v)}" for k, v in knobs.items()]) == config
    if config is not None:
        made(lambda: planned_report(shape_of("smollm2-135m"), config, 100, 10) and config)


@pytest.mark.promise("Whatever a knob is given, the answer is a method that runs, or one line")
def test_whatever_a_knob_is_given_it_is_a_method_or_one_line(figure):
    _every_value_is_taken_or_refused()
    figure(f"1,500 draws of values for {len(KNOBS)} knobs of {len(presets.METHODS)} methods")


@pytest.mark.parametrize(
    "text", ["True", "true", "[]", "()", "None", "null", "0.5", "1", "", "=", "{", "a=b", "\udcff"]
)
@pytest.mark.parametrize("name, knob", [("minikv", "balance"), ("minikv", "clip"), ("minikv", "pyramid_depth")])
def test_settings_are_read_as_json_or_as_the_table_of_methods_shows_them(name, knob, text):
    config = made(presets.with_settings, name, [f"{knob}={text}"])
    expected = {"balance": ("True", "true"), "clip": ("[]", "()"), "pyramid_depth": ("None", "null", "1")}[knob]
    assert (config is not None) == (text in expected)


def test_a_knob_is_not_replaced_by_its_default():
    for knobs in ({"key_bits": 0}, {"bits": 16, "key_bits": 0}):
        with pytest.raises(ConfigError, match="key_bits=0"):
            presets.minikv(**knobs)
    for knobs, named in (({"value_group": 0}, "value_group=0"), ({"brief_share": 7.0}, "brief_share=7.0")):
        with pytest.raises(ConfigError, match=named):
            presets.minikv_plus(**knobs)
    with pytest.raises(ConfigError, match="no knob 'age'"):
        presets.by_name("minikv", age=3)
    with pytest.raises(ConfigError, match="important"):
        presets.minikv_plus(heavy=0.2, important=0.1)
    assert (
        presets.minikv_plus(precise=[1, 2])
        == presets.minikv_plus(precise=(1, 2))
        == presets.minikv_plus(precise=range(1, 3))
    )
