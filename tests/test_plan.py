"""Plans of memory: by hand for one shape, and the longest prompt is the longest."""

import math

import draws
import jax
import pytest
from models import CONFIG, METHODS, TWO_LAYERS, tokens

from minikv_jax import ConfigError, nbytes, prefill, presets
from minikv_jax.models.shapes import shape_of
from minikv_jax.plan import WORKSPACE, bytes_of, longest_prompt, plan


def test_a_plan_is_the_arithmetic_of_its_shape():
    full = plan(shape_of("llama3-8b"), presets.full(), 1000, 24, batch=3)
    assert full.weights == 2 * 8_030_261_248  # the published number of parameters
    assert full.cache == pytest.approx(3 * 1024 * 32 * 2 * 8 * 128 * 2, rel=1e-3)
    assert full.layer == 3 * 1000 * 2 * 8 * 128 * 2
    assert full.total == full.weights + full.cache + full.layer + WORKSPACE


def test_weights_and_caches_are_as_planned():
    config = METHODS["minikv"].replace(generated_capacity=20, dtype="bfloat16")
    model = TWO_LAYERS.config
    found = plan(model, METHODS["minikv"], 60, 20)
    assert 2 * sum(math.prod(x.shape) for x in jax.tree.leaves(TWO_LAYERS)) == found.weights
    _, cache = prefill(TWO_LAYERS, tokens(1, 60), [60], config)
    assert nbytes(cache.layers) == found.cache


@pytest.mark.parametrize("method", ["full", "minikv"])
def test_the_longest_prompt_fits_and_the_next_does_not(method):
    model, config = shape_of("llama2-7b").replace(max_position_embeddings=1 << 18), presets.by_name(method)
    memory = int(draws.rng().integers(16, 24)) << 30
    longest = longest_prompt(model, config, memory, 100)
    assert 0 < longest < (1 << 18) - 100
    assert plan(model, config, longest, 100).total <= memory < plan(model, config, longest + 1, 100).total


def test_nothing_fits_a_memory_smaller_than_the_weights():
    assert longest_prompt(shape_of("llama3-8b"), presets.minikv(), 1 << 33, 100) == 0
    assert longest_prompt(CONFIG, presets.minikv(), 1 << 40, 48) == CONFIG.max_position_embeddings - 48
    assert longest_prompt(CONFIG, presets.minikv(), 1 << 40, 1 << 20) == 0
    with pytest.raises(ConfigError, match="batch=0"):
        plan(CONFIG, presets.full(), 10, 10, batch=0)


@pytest.mark.parametrize(
    "text, size", [("24GB", 24 * 10**9), ("80GiB", 80 << 30), ("512 mib", 512 << 20), ("1.5g", 15 * 10**8), ("7", 7)]
)
def test_sizes_of_memory(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "24 XB", "nan", "1e9"])
def test_what_is_no_size_of_memory(text):
    with pytest.raises(ConfigError, match="24GB"):
        bytes_of(text)
