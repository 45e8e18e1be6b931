"""Reading one token of every sequence, and the loop that does so many times in one dispatch."""

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from minikv_jax import inputs
from minikv_jax.cache import KVCache, LayerCache, is_counter, with_lent, without_lent
from minikv_jax.config import Method
from minikv_jax.layer import read_only, read_token
from minikv_jax.model import Layer, Model, Params, as_model, latent_layer, owners, sharing_layer
from minikv_jax.sampling import Sampling, Seen, Written, is_stop, sample, with_log_probs
from pallas_kernels.rows import row_numbers


@jax.jit
def _decode_layer(layer: Layer, cache: LayerCache, x, lengths, accept):
    """One layer over one new token. Jitted on its own, it is traced and lowered once for all layers of one shape."""
    query, key, value = layer.before_attention(x, lengths[:, None])
    cache, attention = read_token(cache, query, key, value, lengths, accept, latent_layer(layer))
    if cache.method.inflow.scored:
        # Nothing but the step's end waits for the scores, so XLA would keep every layer's logits until then.
        flow, attention = jax.lax.optimization_barrier((cache.flow, attention))
        cache = dataclasses.replace(cache, flow=flow)
    return cache, layer.after_attention(x, attention)


@jax.jit
def _decode_sharing_layer(layer: Layer, cache: LayerCache, x, lengths):
    """One layer that reads another's cache, which holds the token already."""
    query, _, _ = layer.before_attention(x, lengths[:, None])
    return layer.after_attention(x, read_only(cache, query, lengths))


def decode_step(params: Params, cache: KVCache, tokens: Int[Array, "B"]) -> tuple[Float[Array, "B V"], KVCache]:
    """Reads one more token of every sequence.

    Use it as `jax.jit(decode_step, donate_argnames="cache")`: the cache is then updated in place.

    Args:
        params: the model.
        cache: of B sequences.
        tokens: [B] token ids.

    Returns:
        float32 logits [B, V] of the next token, and the cache. A sequence without room left, or whose traced token is
        none of the model's (-1, for one that has ended), stores nothing and its logits are NaN.

    Raises:
        PromptError: tokens of another shape or dtype, or a concrete one outside the vocabulary.
        ConfigError: a cache of another model.
    """
    model = as_model(params)
    inputs.check_cache(model, cache)
    tokens, accept = inputs.next_tokens(tokens, cache, model.config.vocab_size)
    x, cache = through_layers(model, cache, model.embed(tokens[:, None]), accept)
    return jnp.where(accept[:, None], model.logits(x)[:, 0], jnp.nan), cache


def through_layers(
    model: Model, cache: KVCache, x: Float[Array, "B 1 D"], accept: Bool[Array, "B"]
) -> tuple[Float[Array, "B 1 D"], KVCache]:
    """What the last layer gives for one more token of every accepting sequence, and the cache with these."""
    held = dict(zip(owners(model), cache.layers, strict=True))
    for i, layer in enumerate(model.layers):
        sharing = sharing_layer(layer)
        if sharing is None:
            held[i], x = _decode_layer(layer, held[i], x, cache.lengths, accept)
        else:
            x = _decode_sharing_layer(layer, held[sharing.source], x, cache.lengths)
    return x, cache.after([*held.values()], accept.astype(jnp.int32))


def is_end(token: Int[Array, "B"], eos_token_ids: tuple[int, ...], sampling: Sampling) -> Bool[Array, "B"]:
    """Whether each token is one of those that end a sequence."""
    ended = (token[:, None] == np.asarray(eos_token_ids, np.int32)[None]).any(axis=1)
    return ended if sampling.stop_tokens is None else ended | is_stop(token, sampling)


def next_token(
    logits: Float[Array, "B V"],
    cache: KVCache,
    before: tuple[Int[Array, "B"], Bool[Array, "B"], Seen | None],
    key: Array,
    sampling: Sampling,
    top: int | None,
) -> tuple[Int[Array, "B"], Seen | None, Array | Written]:
    """The token after a step, what has been seen with it, and what is written of it.

    `before` is the token that was read, whether its sequence has ended, which repeats it, and what has been seen.
    """
    token, ended, seen = before
    drawn = sample(logits, key, sampling, cache.lengths, seen)
    token = jnp.where(ended, token, drawn)
    return token, None if seen is None else seen.with_token(token), with_log_probs(logits, token, top)


# Steps between two looks at whether every sequence has ended. A loop whose condition depends on data makes the host
# wait for the device each time round; a scan of known length does not.
_STEPS = 16


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "eos_token_ids"), donate_argnames="cache")
def decode_loop(
    params: Params,
    cache: KVCache,
    token: Int[Array, "B"] | Written,
    key: Array,
    sampling: Sampling,
    max_new_tokens: int,
    eos_token_ids: tuple[int, ...],
    lent: KVCache | None = None,
    seen: Seen | None = None,
) -> tuple[Int[Array, "B max_new_tokens"] | Written, KVCache]:
    """Decodes until every sequence has ended or `max_new_tokens` are there: one dispatch for all of it.

    Args:
        params: the model.
        cache: of B sequences with room for `max_new_tokens` - 1; donated.
        token: [B] the first of the new tokens, sampled from the prompt's logits; with log-probabilities of so many top
            tokens, all that are written have them.
        key: of the random draws.
        sampling: how tokens are drawn.
        max_new_tokens: `token` among them.
        eos_token_ids: a sequence ends with one of these; the rest of its row repeats it, and its cache stays as it was
            when that came. Empty: none ends.
        lent: arrays of the cache that are not given away, where `cache` has None (`cache.with_lent`).
        seen: tokens seen so far, for penalties.

    Returns:
        The new tokens [B, max_new_tokens], and the cache after them.
    """

    first = token
    token, top = (first.tokens, first.top_tokens.shape[1]) if isinstance(first, Written) else (first, None)

    def step(state, i):
        cache, ended, token, seen = state
        cache = with_lent(_counted_in_every_layer(cache), lent)
        # A sequence that has ended, and past the last token all of them, has no room: the step leaves it as it is.
        room = jnp.where(ended | (i >= max_new_tokens), 0, cache.room)
        logits, stepped = decode_step(params, dataclasses.replace(cache, room=room), token)
        cache = dataclasses.replace(stepped, room=cache.room - (stepped.lengths - cache.lengths))
        before = token, ended, seen
        token, seen, written = next_token(logits, cache, before, jax.random.fold_in(key, i), sampling, top)
        ended |= is_end(token, eos_token_ids, sampling)
        return (_counted_once(without_lent(cache, lent)), ended, token, seen), written

    state = _counted_once(cache), is_end(token, eos_token_ids, sampling), token, seen
    if not eos_token_ids and sampling.stop_tokens is None:
        (cache, *_), new = jax.lax.scan(step, state, row_numbers(max_new_tokens - 1, first=1))
        written = jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), first, new)
        return _by_sequence(written), _counted_in_every_layer(cache)

    written, cache = _until_all_ended(step, state, first, max_new_tokens, top)
    return _by_sequence(written), _counted_in_every_layer(cache)


def _until_all_ended(
    step: Callable, state: tuple, first: Array | Written, max_new_tokens: int, top: int | None
) -> tuple[Any, KVCache]:
    """What `first` and some steps of a scan write, [max_new_tokens, B, ...], and the state's cache after them.

    Whole runs of steps, until all sequences have ended; what they have not written repeats their last token.
    """
    chunks = max(-(-(max_new_tokens - 1) // _STEPS), 1)  # the loop is traced even where it never runs
    written = jax.tree.map(lambda x: jnp.zeros_like(x, shape=(1 + chunks * _STEPS, *x.shape)).at[0].set(x), first)

    def more(carry):
        done, _, (_, ended, *_) = carry
        return (done < max_new_tokens) & ~ended.all()

    def chunk(carry):
        done, written, state = carry
        state, new = jax.lax.scan(step, state, done + row_numbers(_STEPS))
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=done, axis=0)
        return done + _STEPS, jax.tree.map(put, written, new), state

    done, written, (cache, _, token, _) = jax.lax.while_loop(more, chunk, (jnp.int32(1), written, state))
    is_written = row_numbers(max_new_tokens) < done
    # No token was drawn: what `with_log_probs` says of logits that are NaN.
    after = with_log_probs(jnp.full((token.shape[0], top or 1), jnp.nan), token, top)

    def whole(x, after):
        x = x[:max_new_tokens]
        return jnp.where(jnp.expand_dims(is_written, range(1, x.ndim)), x, after)

    return jax.tree.map(whole, written, after), cache


def _by_sequence(written: Array | Written) -> Array | Written:
    """[steps, B, ...] as [B, steps, ...]."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), written)


def _counted_once(cache: KVCache) -> KVCache:
    """Without the numbers that a layer shares with an earlier one that keeps as many tokens.

    A loop copies each number that it carries once a step: for 32 layers that took as long as attending to a window.
    """
    layers = [
        layer if i == first else jax.tree.map(lambda x: None if is_counter(x) else x, layer)
        for i, (layer, first) in enumerate(zip(cache.layers, _first_alike(cache)))
    ]
    return dataclasses.replace(cache, layers=tuple(layers))


def _counted_in_every_layer(cache: KVCache) -> KVCache:
    """What `_counted_once` left out, filled in again."""
    flatten = functools.partial(jax.tree.flatten, is_leaf=lambda x: x is None)
    layers = []
    for layer, first in zip(cache.layers, _first_alike(cache)):
        # Of the same arrays, whose codes may be of another width.
        (leaves, structure), (counted, _) = flatten(layer), flatten(cache.layers[first])
        layers.append(jax.tree.unflatten(structure, [y if x is None else x for x, y in zip(leaves, counted)]))
    return dataclasses.replace(cache, layers=tuple(layers))


def _first_alike(cache: KVCache) -> list[int]:
    """For each layer the first one that keeps as many tokens, in the same arrays."""
    kinds = [_counts_of(layer.method, i) for i, layer in enumerate(cache.layers)]
    return [kinds.index(kind) for kind in kinds]


def _counts_of(method: Method, layer: int) -> Hashable:
    """What the numbers [B] of a layer depend on: all but the bits of codes, and the layer's place in a pyramid."""
    alike = method.codec if method.codec.dense else dataclasses.replace(method.codec, key_bits=8, value_bits=8)
    return method.replace(codec=alike), layer if method.allocation.is_pyramid else 0
