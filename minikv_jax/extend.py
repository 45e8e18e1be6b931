"""Reading onto a cache: more of a prompt, or a next turn, many tokens at once."""

import dataclasses
import functools
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minikv_jax import allocate, inputs
from minikv_jax.append import Append
from minikv_jax.cache import KVCache, Readers, Shape
from minikv_jax.channels import LAST
from minikv_jax.compress import compress_in_pieces
from minikv_jax.config import Allocation, CacheConfig, Method, Rank
from minikv_jax.errors import PromptError
from minikv_jax.evict import Evict
from minikv_jax.latent import Weights
from minikv_jax.layer import read_tokens
from minikv_jax.model import Params, as_model, latent_layer, owners, sharing_layer
from minikv_jax.prefill import checked, empty_cache, opened
from minikv_jax.reading import logits_at
from minikv_jax.segments import DenseSegment
from minikv_jax.sharing import Borrowing
from pallas_kernels.rows import below, row_numbers
from pallas_kernels.two_pass_attention.common import ScoreRows

# Tokens read at once by `extend`: bounds the attention of new tokens among themselves.
_CHUNK = 128


def extend(
    params: Params,
    cache: KVCache,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    *,
    all_logits: bool = False,
) -> tuple[Float[Array, "B V"] | Float[Array, "B T V"], KVCache]:
    """Reads more of a prompt, or a next turn, onto a cache: many tokens at once instead of one a `decode_step`.

    New tokens attend to everything the cache holds and, in chunks, exactly to each other. They take the way of
    generated tokens: through the window into the first tier, with evicting methods giving up one token for each.

    Args:
        params: the model.
        cache: of B sequences; donate it under `jit`.
        tokens: [B, T] token ids, padded on the right.
        lengths: [B] true numbers of new tokens, 0 <= length <= T.
        all_logits: those after every new token, so that one call verifies drafts (static).

    Returns:
        float32 logits [B, V] of the token after each sequence's last new one, and the cache. With `all_logits`
        [B, T, V] of the token after each, NaN behind a sequence's new tokens. A sequence without new
        tokens has NaN and stays as it is, as does one whose traced ids, or count, are out of range or above its room.

    Raises:
        PromptError: no tokens, ids or lengths out of range, more tokens than a sequence has room for; shapes or dtypes
            that do not fit.
        ConfigError: a cache of another model.
    """
    model = as_model(params)
    inputs.check_cache(model, cache)
    tokens, lengths = inputs.token_rows(tokens, lengths, model.config.vocab_size, least=0)
    if lengths.shape != cache.lengths.shape:
        raise PromptError(f"tokens hold {tokens.shape[0]} sequences, the cache {cache.lengths.shape[0]}: give as many.")
    lengths = inputs.with_room(lengths, cache)
    logits = None
    for start in range(0, tokens.shape[1], _CHUNK):
        chunk = tokens[:, start : start + _CHUNK]
        counts = jnp.clip(lengths - start, 0, chunk.shape[1])
        counted = [below(counts, chunk.shape[1])] * model.config.num_layers
        new, cache, _ = _extend_chunk(params, cache, chunk, counts, counted, lengths - start, all_logits)
        if all_logits:
            new = jnp.where(counted[0][..., None], new, jnp.nan)
            logits = new if logits is None else jnp.concatenate([logits, new], axis=1)
        else:
            logits = new if logits is None else jnp.where((counts > 0)[:, None], new, logits)
    if all_logits:
        return cast(Array, logits), cache  # there is at least one chunk
    return jnp.where((lengths > 0)[:, None], cast(Array, logits), jnp.nan), cache


@functools.partial(jax.jit, static_argnames="all_logits")
def _extend_chunk(params, cache: KVCache, tokens, counts, counted, left, all_logits: bool = False):
    """Logits after a chunk, the cache with it, and the queries that read each layer.

    `counted` [B, T] of each layer are the queries whose attention is added to its scores; `left` [B] tokens are still
    to be read, the chunk's among them.
    """
    model = as_model(params)
    x = model.embed(tokens)
    positions = cache.lengths[:, None] + row_numbers(tokens.shape[1], axes=2)
    before = dict(zip(owners(model), cache.layers, strict=True))
    held, new, readers = {}, {}, []
    for i, layer in enumerate(model.layers):
        sharing = sharing_layer(layer)
        source = i if sharing is None else sharing.source
        if sharing is not None:
            lent_key, lent_value = new[source]
            layer = Borrowing(layer, lent_key, lent_value, cache.lengths)
        query, key, value = layer.before_attention(x, positions)
        after, attention = read_tokens(
            before[source], query, key, value, cache.lengths, counts, counted[source], latent_layer(layer)
        )
        x = layer.after_attention(x, attention)
        if sharing is not None:
            continue
        held[i], new[i] = after, (key, value)
        read = below(counts, tokens.shape[1])
        last = read & ~below(left - LAST, tokens.shape[1])
        readers.append(Readers.of(query, layer.config.num_kv_heads, read, last))
    logits = model.logits(x) if all_logits else logits_at(model, x, counts - 1)
    return logits, cache.after([*held.values()], counts), readers


def prefill_in_chunks(
    params: Params, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], cache_config: CacheConfig, chunk: int = _CHUNK
) -> tuple[Float[Array, "B V"], KVCache]:
    """`prefill` that goes through the model chunk by chunk, for servers that interleave prompts with decoding.

    What a method keeps depends on the whole prompt, so until its end every token is held dense with its score so far;
    then the layers are compressed. Result and arguments are those of `prefill`; the peak is a full cache.

    Args:
        chunk: tokens read at once.
    """
    model = as_model(params)
    tokens, lengths = inputs.token_rows(tokens, lengths, model.config.vocab_size, least=1)
    cache_config, chunk = checked(model, tokens.shape[1], cache_config), inputs.count(chunk, "chunk")
    layers, longest = model.config.num_layers, tokens.shape[1]
    scored: list[ScoreRows] = [cache_config.of_layer(i).score_rows for i in range(layers)]
    cache = _staging(params, cache_config.weights, any(scored), lengths, longest)
    first_scored = [lengths - (longest if rows == "all" else rows) for rows in scored]
    logits, readers = None, []
    for start in range(0, longest, chunk):
        part = tokens[:, start : start + chunk]
        place = row_numbers(part.shape[1], axes=2, first=start)
        counts = jnp.clip(lengths - start, 0, part.shape[1])
        counted = [(place < lengths[:, None]) & (place >= first[:, None]) for first in first_scored]
        new, cache, more = _extend_chunk(params, cache, part, counts, counted, lengths - start)
        logits = new if logits is None else jnp.where((counts > 0)[:, None], new, logits)
        readers = [a.join(b) for a, b in zip(readers, more)] if readers else more
    compressed = []
    for i, layer, reads in zip(owners(model), cache.layers, readers, strict=True):
        first = cast(DenseSegment, layer.first)
        key, value = (x[:, :, :longest].swapaxes(1, 2) for x in (first.key, first.value))
        budget = allocate.budgets(cache_config, i, layers, lengths, longest)
        scores = layer.flow.scores[:, :, :longest] if any(scored) else jnp.zeros((*first.key.shape[:2], longest))
        shape = Shape.of(cache_config, i, layers)
        read = key, value, scores, reads.with_projection(model.layers[i].projection()), lengths, budget
        compressed.append(compress_in_pieces(*read, cache_config.of_layer(i), shape, cache_config.dtype))
    return opened(cast(Array, logits), compressed, lengths, cache_config)


def _staging(params: Params, weights: Weights | None, scored: bool, lengths: Int[Array, "B"], longest: int) -> KVCache:
    """An empty cache that keeps every token of prompts dense, with the attention it receives where that is `scored`."""
    method = Method(inflow=Append())
    if scored:
        # Never so full that it gives a token up.
        method = Method(rank=Rank(by="attention"), allocation=Allocation(heavy=longest), inflow=Evict())
    config = CacheConfig("staging", method, prompt_capacity=1, generated_capacity=longest, weights=weights)
    cache = empty_cache(params, config, lengths.shape[0])
    if not scored:
        return cache
    held = [dataclasses.replace(x, flow=dataclasses.replace(x.flow, size=lengths)) for x in cache.layers]
    return dataclasses.replace(cache, layers=tuple(held))
