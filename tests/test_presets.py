"""Knobs of presets do what they say, and a value that does not fit is refused in one line."""

import inspect
import json
import math

import draws
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layer import draw, run

from minikv_jax import CacheConfig, Codec, ConfigError, presets
from minikv_jax.basis import Hadamard
from minikv_jax.block import Block
from minikv_jax.config import Rank
from minikv_jax.models.shapes import shape_of
from minikv_jax.report import planned_report

PLAIN = presets.minikv(bits=8, group_size=8, residual=16)


@pytest.mark.parametrize("length", [64, 30])
def test_sinks_stay(length):
    prompt, stream = draw(draws.rng(), 1, 64, 1, 2, 1, 16)
    # Keys that nobody attends to: only the knob can keep them.
    prompt[1][:, :4] = -10 * np.sign(prompt[0].mean(axis=(0, 1, 2))) * np.ones(16)
    config = presets.h2o(0.2, 0.1, sinks=4)
    ledger = run(config, *prompt, np.array([length]), stream).prompt.flow
    for head in range(2):
        assert {0, 1, 2, 3} <= set(ledger.positions[0, head, : 4 + int(length * 0.2) + int(length * 0.1)].tolist())


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
@pytest.mark.parametrize("draws_of_values", [400, pytest.param(5000, marks=pytest.mark.slow)])
def test_whatever_a_knob_is_given_it_is_a_method_or_one_line(draws_of_values, figure):
    settings(max_examples=draws_of_values)(_every_value_is_taken_or_refused)()
    figure(f"{draws_of_values:,} draws of values for {len(KNOBS)} knobs of {len(presets.METHODS)} methods")


@pytest.mark.parametrize(
    "text", ["True", "true", "[]", "()", "None", "null", "0.5", "1", "", "=", "{", "a=b", "\udcff"]
)
@pytest.mark.parametrize("name, knob", [("minikv", "balance"), ("minikv", "clip"), ("minikv", "pyramid_depth")])
def test_settings_are_read_as_json_or_as_the_table_of_methods_shows_them(name, knob, text):
    config = made(presets.with_settings, name, [f"{knob}={text}"])
    expected = {"balance": ("True", "true"), "clip": ("[]", "()"), "pyramid_depth": ("None", "null", "1")}[knob]
    assert (config is not None) == (text in expected)


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("minikv", {"heavy": 1, "recent": 0}),
        ("mikv", {"ratio": 1, "recent": 0}),
        ("kvmerger", {"budget": 1, "heavy": 0, "recent": 0, "threshold": 1, "sigma": 2}),
        ("qhitter", {"attention_weight": 0}),
        ("kivi", {"clip": (1, 0.9)}),
        ("minikv_plus", {"heavy": 1, "brief": [0], "brief_share": 1}),
    ],
)
def test_a_whole_number_is_a_share_where_a_knob_takes_no_count(name, knobs):
    with_floats = {knob: float(x) if isinstance(x, int) else x for knob, x in knobs.items()}
    with_floats |= {"clip": (1.0, 0.9)} if "clip" in knobs else {}
    # As text, for 1 and 1.0 are equal.
    assert repr(presets.by_name(name, **knobs)) == repr(presets.by_name(name, **with_floats))


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
