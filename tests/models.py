"""Small random models and texts for the tests, and a small version of every method."""

import dataclasses

import draws
import jax
import numpy as np
import pytest
from flax import nnx

from minikv_jax import decode_step, prefill, presets
from minikv_jax.block import Block
from minikv_jax.config import CacheConfig
from minikv_jax.models import ModelConfig
from minikv_jax.models.llama import Llama
from minikv_jax.ring import Ring

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)
MODEL = Llama(CONFIG, rngs=nnx.Rngs(params=0))
TWO_LAYERS = Llama(CONFIG.replace(num_layers=2), rngs=nnx.Rngs(params=0))


def with_codes(config: CacheConfig, **changes) -> CacheConfig:
    """The method with changes to the codec of every tier that holds codes."""
    tiers = {"codec": config.method.codec, "rest": config.method.rest}
    coded = {name: codec for name, codec in tiers.items() if codec is not None and not codec.dense}
    return config.replace(**{name: dataclasses.replace(codec, **changes) for name, codec in coded.items()})


def small(config: CacheConfig) -> CacheConfig:
    """The method with groups of 8 and a window of 16, so that small prompts are encoded."""
    inflow = config.method.inflow
    if isinstance(inflow, Block):
        smaller = dataclasses.replace(inflow, window=16, keeps=inflow.keeps // 8)
    elif isinstance(inflow, Ring):
        smaller = Ring(16)
    else:
        return config
    return with_codes(config, key_group=8, value_group=8).replace(inflow=smaller)


# Methods that change weights have tests of their own: `test_latent.py` and `test_sharing.py`.
METHODS = {name: small(preset()) for name, preset in presets.METHODS.items() if preset().weights is None}
del METHODS["kvsharer"]  # as it is by default it is `full`
METHODS["two_tiers"] = small(presets.minikv_plus(important=0.3))
METHODS["streaming_llm"] = presets.streaming_llm(recent=20)
METHODS["tova"] = presets.tova(24)
METHODS["kvmerger"] = presets.kvmerger(threshold=0.1)  # random keys are little alike
METHODS["think"] = presets.think(0.6, budget=24, window=8, recent=8)
METHODS["snapkv"] = presets.snapkv(budget=24, window=8)
METHODS["pyramidkv"] = presets.pyramidkv(budget=24, window=8)


# What tests share so that each of its programs is compiled once: caches of this room, for prompts [1 | 3, 64].
step = jax.jit(decode_step)
step_in_place = jax.jit(decode_step, donate_argnames="cache")


def roomy(method: str) -> CacheConfig:
    return METHODS[method].replace(prompt_capacity=64, generated_capacity=40)


def every(*quick: str) -> list:
    """The names of all methods, of which those that are not `quick` here belong to the slow tests."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]


# One of each way in which a cache is held and changes.
KINDS = ("full", "streaming_llm", "h2o", "tova", "think", "kivi", "minikv", "minikv_plus", "two_tiers", "mikv")


def kinds(*quick: str) -> list:
    """As `every`, for what depends on a cache's parts alone: one method of each kind, and those that are `quick`."""
    names = dict.fromkeys((*quick, *KINDS))
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def slow(*names: str) -> list:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


# One of each way a cache can change: appended to, slid, given up, encoded, demoted.
CHANGING = [*slow("streaming_llm", "h2o", "minikv", "minikv_plus", "two_tiers"), "kivi", "mikv"]


def tokens(*shape):
    return draws.array(draws.rng().integers(0, CONFIG.vocab_size, shape), "int32")


def nearly_equal(a, b) -> bool:
    """Equal up to summation order, which may round one code the other way or swap two tokens of nearly equal rank."""
    difference = np.abs(np.asarray(a) - np.asarray(b))
    return difference.max() < 0.3 and difference.mean() < 2e-2


def decode(cache, later):
    """Logits after each later token, [B, steps, V], and the cache."""
    rows = []
    for i in range(later.shape[1]):
        logits, cache = step(MODEL, cache, later[:, i])
        rows.append(logits)
    return np.stack(rows, 1), cache


def follow(config, prompt, lengths, later, params=TWO_LAYERS, step=step_in_place):
    """Logits after the prompt and after each later token, [B, steps + 1, V], and the cache."""
    logits, cache = prefill(params, prompt, lengths, config)
    rows = [logits]
    for i in range(later.shape[1]):
        logits, cache = step(params, cache, later[:, i])
        rows.append(logits)
    return np.stack(rows, 1), cache
