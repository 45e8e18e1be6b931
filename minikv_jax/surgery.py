"""Sequences of caches taken out, put together and taken back: for beams, for batches that change, for drafts."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from minikv_jax import inputs
from minikv_jax.cache import KVCache, LayerCache, by_sequence, fitted, is_counter, is_layer, shared_by
from minikv_jax.errors import ConfigError, PromptError, shortened


def take(cache: KVCache, indices: Int[Array, "N"] | Sequence[int]) -> KVCache:
    """The sequences of these numbers, in this order: beams that survive, one sequence several times, some of a batch.

    Prefixes that sequences share stay held once. Pure; donate `cache` under `jit` where it is not needed any more.

    Args:
        cache: of B sequences.
        indices: [N], each from 0 to B - 1; a traced one outside of that gives an empty sequence without room.

    Raises:
        ConfigError: concrete numbers of sequences that are not there, or none.
    """
    numbers, batch = inputs.integers(indices, "indices", "N", ConfigError), cache.lengths.shape[0]
    inside = (numbers >= 0) & (numbers < batch)
    if isinstance(numbers, np.ndarray) and not (inside.all() and inside.size):
        raise ConfigError(
            f"indices={shortened(numbers.tolist())}: give numbers of the cache's {batch} sequences, 0 to {batch - 1}."
        )
    rows = inputs.on_device(numbers * inside)

    def taken(x: Array) -> Array:
        new = jnp.take(x, rows, axis=0, mode="clip")
        return jnp.where(inside, new, 0) if is_counter(x) else new

    return by_sequence(taken, cache)


def concatenate(caches: Sequence[KVCache]) -> KVCache:
    """The sequences of several caches of one model and method, one after the other.

    A prefix that several of these caches share, being taken from one, is still held once.

    Args:
        caches: at least one. Others may have less room than the first, whose rows all sequences get.

    Raises:
        ConfigError: none, or caches of another model or method, or with more rows than the first.
    """
    caches = list(caches)
    if not caches:
        raise ConfigError("concatenate was given no caches: give at least one.")
    caches = [caches[0], *(inputs.same_kind(caches[0], cache) for cache in caches[1:])]
    # Caches that share the same arrays share one entry.
    shared = [tuple(map(id, shared_by(cache))) for cache in caches]
    first = [shared.index(arrays) for arrays in shared]
    join = functools.partial(_joined, first=first)
    return jax.tree.map(join, *caches, is_leaf=is_layer)


def _joined(*parts, first: list[int]):
    """The parts one after the other; `first[i]` is the first of them with the prefixes that part i has."""
    if not is_layer(parts[0]):
        return jnp.concatenate(parts)
    layers: tuple[LayerCache, ...] = parts
    alone = jax.tree.map(lambda *x: jnp.concatenate(x), *(layer.alone for layer in layers))
    kept = [i for i in sorted(set(first)) if layers[i].prefixes]
    if not kept:
        return alone
    places = dict(zip(kept, itertools.accumulate((layers[i].prefixes for i in kept), initial=0)))
    which = [_moved(layer, places.get(of, 0)) for layer, of in zip(layers, first)]
    tiers = []
    for parts_of_tier in zip(*(layers[i].prefix for i in kept), strict=True):
        largest = jax.tree.map(lambda *x: max(x, key=lambda y: y.shape[2:3]), *parts_of_tier)
        grown = [jax.tree.map(fitted, tier, largest) for tier in parts_of_tier]
        tiers.append(jax.tree.map(lambda *x: jnp.concatenate(x), *grown))
    return alone.sharing(tuple(tiers), jnp.concatenate(which))


def _moved(layer: LayerCache, by: int) -> Int[Array, "B"]:
    """Which prefix each sequence has, where that layer's are counted from `by`."""
    if layer.prefix_of is None:
        return jnp.full_like(layer.first.length, -1)
    return jnp.where(layer.prefix_of < 0, -1, layer.prefix_of + by)


def rollback_limit(cache: KVCache) -> Int[Array, "B"]:
    """How many of each sequence's newest tokens can be taken back: none of its prompt, and only what is still dense."""
    return functools.reduce(jnp.minimum, _behind(cache), cache.lengths - cache.prompts)


def draft_limit(cache: KVCache) -> Int[Array, "B"]:
    """How many more tokens each sequence can read so that taking them back leaves it as if it had not read them.

    The next token after these makes some method encode or give up tokens, or there is no room for it.
    """
    ahead = [layer.method.inflow.ahead(layer, cache.lengths) for layer in _layers(cache)]
    return functools.reduce(jnp.minimum, ahead, cache.room)


def rollback(cache: KVCache, counts: Int[Array, "B"]) -> KVCache:
    """The cache without the newest `counts` tokens of each sequence, for drafts that were wrong.

    What is taken back leaves no trace: attention, and what comes later, are those of the tokens before. If a window was
    encoded since (`Block.keeps` newest tokens stay dense then), the tokens that were encoded stay so, up to `keeps`
    tokens earlier than they would have been; so do single values of KIVI's ring.

    Args:
        cache: of B sequences; donate it under `jit`.
        counts: [B], each from 0 to `rollback_limit`; a traced one outside of that takes nothing back and leaves its
            sequence no room, so that its next logits are NaN.

    Raises:
        PromptError: a concrete count out of range; it says which method's what stands in the way.
    """
    given, limit = inputs.integers(counts, "counts", "B"), rollback_limit(cache)
    if given.shape != limit.shape:
        raise PromptError(f"counts has shape {given.shape}, the cache holds {limit.shape[0]} sequences: give one each.")
    fits = (given >= 0) & (given <= limit)
    if inputs.is_concrete(fits) and not (held := np.asarray(jax.device_get(fits))).all():
        row = int(np.argmin(held))
        raise PromptError(
            f"Sequence {row} can take back at most {int(limit[row])} tokens, not {int(given[row])}: "
            f"{_reason(cache, row)}."
        )
    taken = jnp.where(fits, given, 0).astype(jnp.int32)
    layers = (layer.method.inflow.taken_back(layer, taken) if is_layer(layer) else layer for layer in cache.layers)
    cache = cache.after(tuple(layers), -taken)
    return dataclasses.replace(cache, room=jnp.where(fits, cache.room, 0))


def _layers(cache: KVCache) -> list[LayerCache]:
    return [layer for layer in cache.layers if is_layer(layer)]


def _behind(cache: KVCache) -> list[Int[Array, "B"]]:
    return [layer.method.inflow.behind(layer, cache.lengths) for layer in _layers(cache)]


def _reason(cache: KVCache, row: int) -> str:
    """Why no more tokens of the sequence can be taken back."""
    followed = int(cache.lengths[row] - cache.prompts[row])
    least, layer = min(((int(x[row]), i) for i, x in enumerate(_behind(cache))), default=(followed, 0))
    if followed <= least:
        return f"{followed} have followed its prompt, which was compressed as a whole"
    inflow = _layers(cache)[layer].method.inflow
    return f"of {cache.config.name}'s {type(inflow).__name__}, {inflow.stays}"
