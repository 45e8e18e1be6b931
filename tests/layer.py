"""One layer of a cache driven by given queries, keys and values: what the property tests compare with the reference."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from minikv_jax import allocate
from minikv_jax.attention import attend
from minikv_jax.cache import LayerCache, append, compress
from minikv_jax.config import CacheConfig
from pallas_kernels import two_pass_attention


class Run(NamedTuple):
    """Layer after the prompt, outputs [steps, B, N, H] of the stream, and layer after it."""

    prompt: LayerCache
    outputs: np.ndarray
    after: LayerCache


@functools.partial(jax.jit, static_argnames=("config", "layer", "layers"))
def run(config: CacheConfig, query, key, value, lengths, stream, layer: int = 0, layers: int = 1) -> Run:
    """Prompts [B, T, N | K, H] with true lengths, then a stream of tokens [steps, B, N | K, H], through one layer."""
    _, scores, _ = two_pass_attention(query, key, value, query_lengths=lengths, key_value_lengths=lengths)
    capacity = config.prompt_capacity or key.shape[1]
    heavy, recent = allocate.budgets(config.allocation, layer, layers, lengths, key.shape[1])
    kept = allocate.capacity(config.allocation, layer, layers, capacity)
    prompt = compress(key, value, scores, lengths, heavy, recent, config, kept)

    def step(cache, token):
        q, k, v = (x[:, None] for x in token)
        cache = append(cache, k, v, jnp.ones(lengths.shape, bool), config.codec)
        return cache, attend(q, cache)[:, 0]

    after, outputs = jax.lax.scan(step, prompt, stream)
    return Run(prompt, outputs, after)


def draw(rng: np.random.Generator, batch: int, tokens: int, steps: int, heads: int, group: int, head_size: int):
    """Random float32 (query, key, value) of prompts, and the same of a stream, with a few outlier channels."""
    n = heads * group
    loud = np.where(rng.random(head_size) < 0.1, 8.0, 1.0)

    def one(*shape):
        return (rng.standard_normal((*shape, head_size)) * loud).astype(np.float32)

    prompt = tuple(one(batch, tokens, h) for h in (n, heads, heads))
    return prompt, tuple(one(steps, batch, h) for h in (n, heads, heads))
