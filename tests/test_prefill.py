"""Prefill reads every kind of model into every kind of cache, refuses what does not fit, and shares its programs."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from models import CONFIG, METHODS, MODEL, TWO_LAYERS, follow, tokens

from minikv_jax import ConfigError, PromptError, bucket, forward, prefill, presets
from minikv_jax.models.llama import Llama


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
        prefill(TWO_LAYERS, text, jnp.array(lengths), presets.minikv(group_size=8).replace(**change))


def test_groups_that_do_not_divide_the_head_are_refused():
    with pytest.raises(ConfigError, match="head size of 16"):
        prefill(TWO_LAYERS, tokens(1, 40), jnp.array([40]), presets.minikv(group_size=32))


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
    [("mistral", "full"), ("qwen2", "minikv"), ("mqa", "mikv")]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in (("mistral", "mikv"), ("mha", "minikv"))]
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
