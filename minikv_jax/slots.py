"""What a server does with caches: an empty one, sequences put into its slots and taken out, one prefix for many."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from minikv_jax import inputs
from minikv_jax.cache import KVCache, by_sequence, is_counter
from minikv_jax.errors import ConfigError
from minikv_jax.inflow import repeated


def insert(cache: KVCache, slot: int | Int[Array, ""], prefix: KVCache) -> KVCache:
    """The cache with one sequence's state in its `slot`, whatever the slot held before. Pure; donate `cache`.

    Args:
        cache: of B sequences.
        slot: 0 <= slot < B; a traced one outside of that changes nothing.
        prefix: of one sequence, from `prefill` of the same model with the same method, in as many rows.

    Raises:
        ConfigError: a slot that the cache does not have; a prefix of several sequences, or of another model, method or
            number of rows.
    """
    slot = inputs.slot_of(slot, cache)
    if prefix.lengths.shape != (1,):
        raise ConfigError(f"insert takes a prefix of one sequence, not of {prefix.lengths.shape[0]}.")
    if any(layer.prefix for layer in (*cache.layers, *prefix.layers)):
        raise ConfigError("A forked cache shares its prefix between all slots: insert into a cache of its own.")
    return by_sequence(lambda x, y: _put(x, y, slot), cache, inputs.same_kind(cache, prefix))


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
    if cache.lengths.shape != (1,) or any(layer.prefix for layer in cache.layers):
        raise ConfigError(
            "fork takes a cache of one sequence that is no fork itself; given is "
            f"{'a fork' if any(layer.prefix for layer in cache.layers) else 'a cache'} of {cache.lengths.shape[0]}."
        )

    rows = cache.config.generated_capacity
    layers = tuple(layer.method.inflow.forked(layer, count, rows) for layer in cache.layers)
    # A sequence that was inserted may have brought more room than its forks have rows.
    lengths, left, prompts = repeated((cache.lengths, jnp.minimum(cache.room, rows), cache.prompts), count)
    return KVCache(layers, lengths, left, prompts, cache.config)
