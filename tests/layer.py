"""One layer of a cache driven by given queries, keys and values: what the property tests compare with the reference."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from minikv_jax import allocate
from minikv_jax.cache import LayerCache, Readers, Shape
from minikv_jax.compress import compress
from minikv_jax.config import CacheConfig
from minikv_jax.layer import read_token
from pallas_kernels import two_pass_attention


class Run(NamedTuple):
    """Layer after the prompt, outputs [steps, B, N, H] of the stream, and layer after it."""

    prompt: LayerCache
    outputs: np.ndarray
    after: LayerCache


@functools.partial(jax.jit, static_argnames=("config", "layer", "layers"))
def run(
    config: CacheConfig, query, key, value, lengths, stream, layer: int = 0, layers: int = 1, projection=None
) -> Run:
    """Prompts [B, T, N | K, H] with true lengths, then a stream of tokens [steps, B, N | K, H], through one layer."""
    config = config.replace(
        prompt_capacity=config.prompt_capacity or key.shape[1], generated_capacity=stream[0].shape[0]
    )
    method = config.of_layer(layer)
    _, scores, _ = two_pass_attention(
        query, key, value, query_lengths=lengths, key_value_lengths=lengths, score_rows=method.score_rows
    )
    budget = allocate.budgets(config, layer, layers, lengths, key.shape[1])
    counted = jnp.arange(key.shape[1]) < lengths[:, None]
    last = counted & (jnp.arange(key.shape[1]) >= lengths[:, None] - 32)
    readers = Readers.of(query, key.shape[2], counted, last).with_projection(projection)
    shape = Shape.of(config, layer, layers)
    prompt = compress(key, value, scores, readers, lengths, budget, method, shape, config.dtype)
    accept = jnp.ones(lengths.shape, bool)

    def step(state, token):
        cache, position = state
        cache, output = read_token(cache, *(x[:, None] for x in token), position, accept)
        return (cache, position + 1), output[:, 0]

    (after, _), outputs = jax.lax.scan(step, (prompt, lengths), stream)
    return Run(prompt, outputs, after)


def draw(rng: np.random.Generator, batch: int, tokens: int, steps: int, heads: int, group: int, head_size: int):
    """Random float32 (query, key, value) of prompts, and the same of a stream, with a few outlier channels."""
    n = heads * group
    loud = np.where(rng.random(head_size) < 0.1, 8.0, 1.0)

    def one(*shape):
        return (rng.standard_normal((*shape, head_size)) * loud).astype(np.float32)

    prompt = tuple(one(batch, tokens, h) for h in (n, heads, heads))
    return prompt, tuple(one(steps, batch, h) for h in (n, heads, heads))
