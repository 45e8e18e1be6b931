"""What a server does with caches: an empty one, sequences put into its slots and taken out, one prefix for many."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from minikv_jax import inputs
from minikv_jax.cache import KVCache, by_sequence, is_counter, is_layer, own, with_none_of
from minikv_jax.errors import ConfigError
from minikv_jax.inflow import repeated
from minikv_jax.surgery import concatenate, take


def insert(cache: KVCache, slot: int | Int[Array, ""], prefix: KVCache, *, shared: bool = False) -> KVCache:
    """The cache with one sequence's state in its `slot`, whatever the slot held before. Pure; donate `cache`.

    Args:
        cache: of B sequences.
        slot: 0 <= slot < B; a traced one outside of that changes nothing.
        prefix: of one sequence, from `prefill` of the same model with the same method, in as many rows or fewer.
        shared: the prefix is one of those that the cache holds for all of its slots, as `share` returned it.

    Raises:
        ConfigError: a slot that the cache does not have; a prefix of several sequences, or of another model or method,
            or with more rows; one that the cache does not share.
    """
    slot = inputs.slot_of(slot, cache)
    if prefix.lengths.shape != (1,):
        raise ConfigError(f"insert takes a prefix of one sequence, not of {prefix.lengths.shape[0]}.")
    prefix = inputs.same_kind(cache, prefix)
    held, brought = ([layer.prefixes for layer in x.layers if is_layer(layer)] for x in (cache, prefix))
    if brought != (held if shared else [0] * len(held)):
        raise ConfigError(
            f"The cache holds {max(held)} shared prefixes, the sequence knows {max(brought)}: with shared=True give "
            "what `share` returned for this cache, without it a sequence that is not forked."
        )
    return by_sequence(lambda x, y: _put(x, y, slot), cache, prefix if shared else with_none_of(cache, prefix))


def share(cache: KVCache, prefixes: Sequence[KVCache]) -> tuple[KVCache, list[KVCache]]:
    """A cache whose slots may refer to prefixes that it holds once, and these as `insert(shared=True)` takes them.

    One compiled step then serves sequences with any of the prefixes and without. Each prefix is read once a step,
    however many sequences have it, and gives the queries of all slots; prefixes have as many rows as the longest. What
    is returned of a prefix is its window and counters alone. Layers that give tokens up hold it once a slot.

    Args:
        cache: of slots that share nothing yet, as from `empty_cache`.
        prefixes: each of one sequence, of the same model and method.

    Raises:
        ConfigError: no prefixes, a cache that shares some already, a prefix of several sequences, or a method with two
            tiers that grow, whose forks have but one.
    """
    if any(layer.prefixes for layer in cache.layers if is_layer(layer)):
        raise ConfigError("The cache shares prefixes already: share all of them at once.")
    if not prefixes:
        raise ConfigError("share was given no prefixes: give at least one.")
    for prefix in prefixes:
        _check_forkable(prefix)
    # Nothing of their own yet: a slot's rows are enough.
    whole, slots = concatenate([cache, *(_forked(prefix, 1, 0) for prefix in prefixes)]), cache.lengths.shape[0]
    return take(whole, range(slots)), [own(take(whole, [slots + i])) for i in range(len(prefixes))]


def _put(x: Array, new: Array, slot: int | Int[Array, ""]) -> Array:
    """Writes new [1, ...] over x[slot]; nothing where there is no such slot."""
    if not isinstance(slot, int):  # an update that starts outside an array is moved inside by XLA
        inside = (slot >= 0) & (slot < x.shape[0])
        slot = jnp.where(inside, slot, 0)
        new = jnp.where(inside, new, jax.lax.dynamic_slice_in_dim(x, slot, 1, 0))
    return jax.lax.dynamic_update_slice_in_dim(x, new, slot, 0)


def reset(cache: KVCache, slot: int | Int[Array, ""]) -> KVCache:
    """The cache with its `slot` empty: no tokens and no room, so `decode_step` leaves it alone (its logits are NaN).

    Args:
        cache: of B sequences; donate it.
        slot: 0 <= slot < B; a traced one outside of that changes nothing.

    Raises:
        ConfigError: a slot that the cache does not have.
    """
    slot = inputs.slot_of(slot, cache)

    # Counters alone decide what is read; rows of an empty sequence need no clearing.
    return by_sequence(lambda x: _put(x, jnp.zeros_like(x[:1]), slot) if is_counter(x) else x, cache)


def fork(cache: KVCache, count: int) -> KVCache:
    """`count` continuations of one compressed sequence, for as many questions about one text.

    What the prompt left is held once: every continuation attends to it, and gets room of its own for
    `generated_capacity` tokens. Methods that give tokens up change what the prompt left; those caches are repeated.
    The prefix shares its arrays with `cache`: copy one of them if both go on.

    Raises:
        ConfigError: a cache of several sequences, one that has been forked, or a count below 1.
    """
    count = inputs.count(count, "count")
    _check_forkable(cache)
    return _forked(cache, count, cache.config.generated_capacity)


def _check_forkable(cache: KVCache) -> None:
    if cache.lengths.shape != (1,) or any(layer.prefix for layer in cache.layers):
        raise ConfigError(
            "fork takes a cache of one sequence that is no fork itself; given is "
            f"{'a fork' if any(layer.prefix for layer in cache.layers) else 'a cache'} of {cache.lengths.shape[0]}."
        )


def _forked(cache: KVCache, count: int, rows: int) -> KVCache:
    """`fork` with so many rows for each continuation's own tokens."""
    layers = tuple(layer.method.inflow.forked(layer, count, rows) for layer in cache.layers)
    # A sequence that was inserted may have brought more room than its forks have rows.
    lengths, room, prompts = repeated(
        (cache.lengths, jnp.minimum(cache.room, cache.config.generated_capacity), cache.prompts), count
    )
    return KVCache(layers, lengths, room, prompts, cache.config)


def to_host(cache: KVCache) -> KVCache:
    """The cache in its devices' page-locked host memory: of sequences that wait, to make room for others.

    Bit for bit; shardings stay. Delete `cache` to free the devices' memory, and bring the copy back by `to_device`
    before it is read: programs do not reach into host memory.
    """
    return _in_memory(cache, "pinned_host")


def to_device(cache: KVCache) -> KVCache:
    """The cache that `to_host` moved, back in its devices' own memory."""
    return _in_memory(cache, "device")


def _in_memory(cache: KVCache, kind: str) -> KVCache:
    return jax.device_put(cache, jax.tree.map(lambda x: x.sharding.with_memory_kind(kind), cache))
