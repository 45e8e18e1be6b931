"""What callers give, checked once at the edge.

Concrete values are read and refused with one error. Traced values cannot be read: the sequence that a wrong one
concerns is given a length of 0 (or a slot nothing is written to), which reads nothing, stores nothing and answers NaN.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Int

from minikv_jax.errors import ConfigError, MiniKVError, PromptError, shortened

if TYPE_CHECKING:
    from minikv_jax.cache import KVCache, LayerCache
    from minikv_jax.layer import State
    from minikv_jax.model import Model


_INT32 = np.iinfo(np.int32)


def is_concrete(x: Any) -> bool:
    """Whether values can be read now: not while a function is traced, nor where another host holds some of them."""
    return not isinstance(x, Tracer) and getattr(x, "is_fully_addressable", True)


def integers(x: Any, name: str, letters: str, error: type[MiniKVError] = PromptError) -> np.ndarray | Array:
    """`x` as an array of integers: NumPy's int32 where the values can be read, else as it is.

    Args:
        x: an array of any integer dtype, or lists of ints.
        name: of the argument, for the message.
        letters: its axes, as "B T"; their number is checked.
        error: the class to raise.

    Raises:
        MiniKVError: floats, booleans, ragged lists, another number of axes, numbers beyond int32.
    """
    if is_concrete(x):
        try:
            x = np.asarray(jax.device_get(x))
        except (TypeError, ValueError):
            raise error(f"{name} {shortened(x)} is no array: give whole numbers of shape [{letters}].") from None
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise error(f"{name} holds {x.dtype}: give whole numbers (int32) of shape [{letters}].")
    if x.ndim != len(letters.split()):
        raise error(f"{name} has shape {x.shape}: give [{letters}].")
    if not isinstance(x, np.ndarray):
        return x
    # A conversion alone would turn 2**32 + 3 into 3.
    beyond = x[(x < _INT32.min) | (x > _INT32.max)]
    if beyond.size:
        raise error(f"{name} holds {beyond[0]}: give whole numbers that fit int32.")
    return x.astype(np.int32)


def on_device(x: np.ndarray | Array) -> Int[Array, "..."]:
    """`integers` as an int32 array of JAX. `jnp.asarray` of a NumPy array would compile a copy for each shape."""
    return jax.device_put(x.astype(np.int32)) if isinstance(x, np.ndarray) else x.astype(jnp.int32)


def token_rows(tokens: Any, lengths: Any, vocabulary: int, least: int) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
    """Right-padded token ids and their true lengths, int32. A traced row that is refused has length 0.

    Args:
        tokens: [B, T] ids; what lies behind a row's length may be anything.
        lengths: [B], each from `least` to T.
        vocabulary: ids lie below.
        least: 1 for prompts, 0 for what follows them.

    Raises:
        PromptError: dtypes or shapes that do not fit, no sequence, no token, lengths or ids out of range.
    """
    tokens, lengths = integers(tokens, "tokens", "B T"), integers(lengths, "lengths", "B")
    if lengths.shape != tokens.shape[:1]:
        raise PromptError(f"tokens {tokens.shape} and lengths {lengths.shape} must be [B, T] and [B].")
    batch, longest = tokens.shape
    if batch == 0:
        raise PromptError("The batch is empty: give at least one sequence.")
    if longest == 0:
        raise PromptError("There is nothing to read, the prompt is empty: give at least one token.")
    xp = np if isinstance(tokens, np.ndarray) and isinstance(lengths, np.ndarray) else jnp
    # Traced numbers are compared before they are converted: a conversion would wrap those beyond int32.
    fits = (lengths >= least) & (lengths <= longest)
    known = (tokens >= 0) & (tokens < vocabulary) | (xp.arange(longest)[None] >= lengths[:, None])
    if isinstance(lengths, np.ndarray) and not fits.all():
        raise PromptError(f"lengths {shortened(lengths.tolist())} must be from {least} to the {longest} tokens given.")
    if xp is np and not known.all():
        row, column = np.argwhere(~known)[0]
        _refuse_token(int(tokens[row, column]), row, vocabulary, f" at {column}")
    accepted = fits & known.all(axis=1)
    return on_device(tokens), on_device(xp.where(accepted, lengths, 0))


def row_counts(counts: Any, batch: int, longest: int, least: int) -> Int[Array, "B"]:
    """Numbers of each sequence's rows, int32. A traced one that is out of range is 0.

    Raises:
        PromptError: a dtype or shape that does not fit, concrete numbers that are not from `least` to `longest`.
    """
    counts = integers(counts, "lengths", "B")
    if counts.shape != (batch,):
        raise PromptError(f"lengths {counts.shape} must be [B]={(batch,)}: give one number a sequence.")
    fits = (counts >= least) & (counts <= longest)
    if isinstance(counts, np.ndarray):
        if not fits.all():
            raise PromptError(f"lengths {shortened(counts.tolist())} must be from {least} to the {longest} rows given.")
        return on_device(counts)
    return on_device(jnp.where(fits, counts, 0))


def check_heads(query: Array, key: Array, value: Array, cache: "LayerCache | None" = None) -> None:
    """Refuses queries, keys and values that do not fit one another, or the layer that is to hold them.

    Raises:
        PromptError: naming the shapes.
    """
    shapes = f"query {query.shape}, key {key.shape} and value {value.shape}"
    if query.ndim != 4 or key.ndim != 4 or key.shape != value.shape or query.shape[:2] != key.shape[:2]:
        raise PromptError(f"{shapes} must be [B, T, N, H], [B, T, K, H] and [B, T, K, H].")
    if query.shape[3] != key.shape[3] or query.shape[2] % key.shape[2]:
        raise PromptError(f"{shapes} must have one head size, and query heads a multiple of key/value heads.")
    if cache is None:
        return
    batch = jax.tree.leaves(cache.own)[0].shape[0]
    if (batch, *cache.heads) != (key.shape[0], *key.shape[2:]):
        raise PromptError(f"{shapes} do not fit a state of {batch} sequences, and {cache.heads} heads and head size.")


def check_projection(projection: Array | None, query: Array) -> None:
    """Refuses an output projection of other heads than the queries have.

    Raises:
        PromptError: naming the shapes.
    """
    if projection is not None and (projection.ndim != 3 or projection.shape[:2] != query.shape[2:]):
        raise PromptError(f"projection has shape {projection.shape}: give [N, H, D], for query {query.shape}.")


def next_tokens(tokens: Any, cache: "KVCache", vocabulary: int) -> tuple[Int[Array, "B"], Bool[Array, "B"]]:
    """One token id for each sequence of the cache, int32, and which of them are read: those with room and a known id.

    Raises:
        PromptError: a dtype or shape that does not fit, an unknown id where there is room.
    """
    tokens, batch = integers(tokens, "tokens", "B"), cache.lengths.shape[0]
    if tokens.shape != (batch,):
        raise PromptError(f"tokens has shape {tokens.shape}, the cache holds {batch} sequences: give one token each.")
    known, has_room = (tokens >= 0) & (tokens < vocabulary), cache.room > 0
    if isinstance(known, np.ndarray) and is_concrete(has_room):
        wrong = np.flatnonzero(~known & np.asarray(jax.device_get(has_room)))
        if wrong.size:
            _refuse_token(tokens[wrong[0]], wrong[0], vocabulary)
    return on_device(tokens), has_room & known


def with_room(counts: Int[Array, "B"], cache: "KVCache | State") -> Int[Array, "B"]:
    """Numbers of new tokens; 0 for a traced one above its sequence's room.

    Raises:
        PromptError: a concrete one above its sequence's room.
    """
    fits = counts <= cache.room
    if is_concrete(fits):
        given, room, short = jax.device_get((counts, cache.room, ~fits))
        if short.any():
            row = int(np.argmax(short))
            raise PromptError(
                f"Sequence {row} has room for {room[row]} more tokens and is given {given[row]}: give fewer, or "
                "prefill with a larger generated_capacity."
            )
    return jnp.where(fits, counts, 0)


def check_room(lengths: Any, new_tokens: int, cache: "KVCache") -> None:
    """Refuses more to read and write, onto a cache, than a sequence has room for. The last new token takes none.

    Raises:
        PromptError: concrete lengths and room that do not fit.
    """
    counts = integers(lengths, "lengths", "B")
    if not isinstance(counts, np.ndarray) or not is_concrete(cache.room) or counts.shape != cache.room.shape:
        return
    room = np.asarray(jax.device_get(cache.room))
    short = (counts > 0) & (counts + new_tokens - 1 > room)
    if short.any():
        row = int(np.argmax(short))
        raise PromptError(
            f"Sequence {row} has room for {room[row]} more tokens: {counts[row]} to read and {new_tokens} new ones, of "
            "which the last takes none, are too many. Give fewer, or prefill with a larger generated_capacity."
        )


def _refuse_token(token: int, row: int, vocabulary: int, place: str = "") -> None:
    raise PromptError(
        f"Token {token}{place} of sequence {row} is none of the model's {vocabulary}, 0 to {vocabulary - 1}: do "
        "tokenizer and model belong together?"
    )


def slot_of(slot: Any, cache: "KVCache") -> int | Int[Array, ""]:
    """The number of a cache's slot.

    Raises:
        ConfigError: no whole number, or a concrete one outside the cache.
    """
    slot = integers(slot, "slot", "", ConfigError)
    slots = cache.lengths.shape[0]
    if isinstance(slot, np.ndarray) and not 0 <= slot < slots:
        raise ConfigError(f"slot={slot} is none of the cache's {slots}: give 0 to {slots - 1}.")
    return int(slot) if isinstance(slot, np.ndarray) else slot


def count(x: Any, name: str, least: int = 1) -> int:
    """A static number of things.

    Raises:
        ConfigError: no whole number, or one below `least`.
    """
    whole = None if isinstance(x, bool | np.bool_ | Tracer) else getattr(x, "__index__", None)
    if whole is None or getattr(x, "ndim", 0) or whole() < least:
        raise ConfigError(f"{name}={shortened(x)}: give a whole number of at least {least}.")
    return whole()


def key_of(seed: Any) -> Array:
    """The key of a seed's random draws.

    Raises:
        ConfigError: a concrete seed that is no whole number from 0 to 2**32 - 1; JAX would drop its other digits.
    """
    if is_concrete(seed):
        seed = count(seed, "seed", 0)
        if seed >= 1 << 32:
            raise ConfigError(f"seed={shortened(seed)}: give a whole number from 0 to {(1 << 32) - 1}.")
        seed = np.uint32(seed)
    return jax.random.key(seed)


def check_cache(model: "Model", cache: "KVCache") -> None:
    """Refuses a cache that another model filled, or whose arrays no longer belong together. Looks at shapes alone.

    Raises:
        ConfigError: another number of layers, other heads, a fork that was taken apart.
    """
    from minikv_jax.cache import KVCache
    from minikv_jax.model import latent_layer, owners

    if not isinstance(cache, KVCache):
        raise ConfigError(f"The cache is a {type(cache).__name__}: give what `prefill` or `empty_cache` returned.")
    config, batch = model.config, cache.lengths.shape[0]
    own = owners(model)
    if len(cache.layers) != len(own):
        raise ConfigError(
            f"The cache has {len(cache.layers)} layers, the model {len(own)}: it was made by another model."
        )
    for i, layer in zip(own, cache.layers):
        gives = latent_layer(model.layers[i])
        if layer.method.latent != (None if gives is None else gives.latent):
            raise ConfigError(
                f"Layer {i} of the cache holds {layer.method.latent or 'keys and values'}, the model gives "
                f"{'keys and values' if gives is None else gives.latent}: give the params that filled the cache."
            )
        if layer.of_model != (config.num_kv_heads, config.head_dim):
            raise ConfigError(
                f"Layer {i} of the cache holds {layer.of_model} key/value heads and head size, the model has "
                f"{(config.num_kv_heads, config.head_dim)}: it was made by another model."
            )
        own, shared = ({x.shape[0] for x in jax.tree.leaves(part)} for part in (layer.own, layer.prefix))
        if own != {batch} or shared - {layer.prefixes}:
            raise ConfigError(
                f"Layer {i} holds arrays of {sorted(own | shared)} sequences beside lengths of {batch} and "
                f"{layer.prefixes} shared prefixes: sequences are taken from a cache, and put in another order, by "
                "`take`, for arrays of prefixes have no axis of sequences."
            )


def same_kind(cache: "KVCache", other: "KVCache") -> "KVCache":
    """The other cache with as many rows as the first; refuses one of another method or model, or with more rows.

    Capacities as such need not be the same: rows are what a sequence is held in, and its room comes with it. What
    sequences share is not looked at.

    Raises:
        ConfigError: naming the first difference.
    """
    from minikv_jax.cache import KVCache, fitted, is_layer

    for given in (cache, other):
        if not isinstance(given, KVCache):
            raise ConfigError(f"A {type(given).__name__} is no cache: give what `prefill` or `empty_cache` returned.")
    capacities = {"prompt_capacity": None, "generated_capacity": 1}
    if other.config.replace(**capacities) != cache.config.replace(**capacities):
        raise ConfigError(
            f"One cache was made with {other.config}, the other with {cache.config}: give both the same method."
        )
    other = dataclasses.replace(other, config=cache.config)

    def alone(x):
        return jax.tree.map(lambda x: x.alone if is_layer(x) else x, x, is_leaf=is_layer)

    ours, theirs = (jax.tree_util.tree_flatten_with_path(alone(x)) for x in (cache, other))
    if ours[1] != theirs[1]:
        raise ConfigError("One cache has other parts than the other: it was made by another model or is a fork.")
    for (path, x), (_, y) in zip(ours[0], theirs[0]):
        rows = x.shape[:1] + y.shape[1:2] + x.shape[2:3] + y.shape[3:]
        if (x.shape, x.dtype) != (rows, y.dtype) or y.shape[2:3] > x.shape[2:3]:
            raise ConfigError(
                f"One cache holds {y.dtype} {y.shape[1:]} at {jax.tree_util.keystr(path)}, the other {x.dtype} "
                f"{x.shape[1:]}: give both the same model, and a prompt_capacity and generated_capacity that fit."
            )
    whole = jax.tree.unflatten(theirs[1], [fitted(y, x) for (_, x), (_, y) in zip(ours[0], theirs[0])])

    def with_shared(x, y):
        shared = {"prefix": y.prefix, "prefix_of": y.prefix_of, "prefixes": y.prefixes} if is_layer(y) else {}
        return dataclasses.replace(x, **shared) if shared else x

    return jax.tree.map(with_shared, whole, other, is_leaf=is_layer)
