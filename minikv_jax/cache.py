"""The cache of a batch of sequences: how prompts and new tokens get into a layer, and what leaves it.

KVCache
  layers[l]: LayerCache
    prefix     Segment | None                what forked sequences share
    segment    DenseSegment | PackedSegment  the first tier
    retained   PackedSegment | None          the second tier (MiKV); with a window, where new tokens end up
    window     DenseSegment | KiviWindow     the newest tokens, until they are encoded
    ledger     Ledger | None                 positions and scores of a first tier that gives tokens up
    units      Units | None                  powers of two in which all of these are held

All parts of a layer hold keys and values alike: after the method's rotations, in the layer's units (`_inwards`).
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from minikv_jax import allocate, kivi, rank, segments
from minikv_jax.allocate import Budget
from minikv_jax.config import CacheConfig, Codec
from minikv_jax.kivi import KiviWindow
from minikv_jax.segments import DenseSegment, PackedSegment, Segment
from pallas_kernels import (
    Partial,
    Rotation,
    decode_attention,
    dense_decode_attention,
    merge_partials,
    two_pass_attention,
)
from pallas_kernels.hadamard import rotate, rotate_back, times_unit
from pallas_kernels.packed_decode.layout import BLOCK
from pallas_kernels.rows import below, row_numbers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ledger:
    """What eviction needs to know of each row of the first tier. `size` is what the tier may hold after a step."""

    positions: Int[Array, "B K S"]
    scores: Float[Array, "B K S"]
    friendliness: Float[Array, "B K S"] | None
    size: Int[Array, "B"]
    recent: Int[Array, "B"]
    protected: Int[Array, "B"]


class Units(NamedTuple):
    """What one in a layer's keys and values stands for: a power of two for each head, float32.

    Metadata of 8 bits has little range. In these units the prompt's largest number lies from 16 to 32, so scales of the
    loudest groups and of some hundred times quieter ones are held to their last digit, and later tokens may be fourteen
    times as loud: after a prompt of a few tokens they often are several times as loud.
    """

    key: Float[Array, "B K"]
    value: Float[Array, "B K"]

    @classmethod
    def of(cls, key: Float[Array, "B K T H"], value: Float[Array, "B K T H"]) -> "Units":
        def power(x):
            largest = jnp.abs(x).max(axis=(2, 3), initial=0).astype(jnp.float32)
            exponent = jnp.clip(jnp.frexp(largest)[1] - 5, -60, 60)
            return jnp.where(largest > 0, jnp.ldexp(jnp.float32(1), exponent), 1)

        return cls(power(key), power(value))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's share of a cache, and the method as this layer has it (static)."""

    segment: Segment
    config: CacheConfig = dataclasses.field(metadata={"static": True})
    window: DenseSegment | KiviWindow | None = None
    retained: PackedSegment | None = None
    ledger: Ledger | None = None
    units: Units | None = None
    prefix: tuple[Segment, ...] = ()

    @property
    def growing(self) -> Literal["segment", "retained"]:
        """The tier that new tokens end up in. Nothing says of those which a window encodes that they matter."""
        return "segment" if self.window is None or self.retained is None else "retained"

    @property
    def heads(self) -> tuple[int, int]:
        """Key/value heads, and their size."""
        return self.segment.heads

    @property
    def own(self) -> "LayerCache":
        """The layer without the prefix that it shares with other sequences."""
        return dataclasses.replace(self, prefix=())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The whole state of B sequences between two calls of `decode_step`.

    Attributes:
        layers: one LayerCache a layer; their capacities may differ.
        lengths: int32 [B], tokens read so far: the rotary position of the next one.
        room: int32 [B], tokens that may still follow. Where it is 0, `decode_step` stores nothing and returns NaN.
        config: the method (static).
    """

    layers: tuple[LayerCache, ...]
    lengths: Int[Array, "B"]
    room: Int[Array, "B"]
    config: CacheConfig = dataclasses.field(metadata={"static": True})


class QueryStatistics(NamedTuple):
    """What a codec may know of the prompt's queries, per key/value head, float32.

    `loudest` is the largest magnitude of each channel, `moment` the sum of query^T query.
    """

    loudest: Float[Array, "B K H"]
    moment: Float[Array, "B K H H"]

    @classmethod
    def of(cls, query: Float[Array, "B T N H"], heads: int, counted: Bool[Array, "B T"]) -> "QueryStatistics":
        b, t, n, h = query.shape
        grouped = jnp.where(counted[:, :, None, None], query, 0).reshape(b, t, heads, n // heads, h)
        moment = jnp.einsum("btkgh,btkgi->bkhi", grouped, grouped, preferred_element_type=jnp.float32)
        return cls(jnp.abs(grouped).max(axis=(1, 3)).astype(jnp.float32), moment)

    def join(self, other: "QueryStatistics") -> "QueryStatistics":
        """Those of both sets of queries."""
        return QueryStatistics(jnp.maximum(self.loudest, other.loudest), self.moment + other.moment)


class Shape(NamedTuple):
    """Rows that one layer's tiers have room for; static."""

    segment: int
    retained: int

    @classmethod
    def of(cls, config: CacheConfig, layer: int, layers: int) -> "Shape":
        prompt, generated = config.prompt_capacity, config.generated_capacity
        kept = allocate.capacity(config, layer, layers, prompt)
        left = allocate.retained_capacity(config, layer, layers, prompt) if config.retained else 0
        if config.evict == "never":
            # What a window encodes touches whole blocks, even at the end of the segment.
            touched = BLOCK * segments.touched_blocks(config.window - config.window_keeps) if config.window else 0
            if config.window and config.retained:
                # The first tier takes whole groups; what that leaves over goes to the other one.
                spare = config.codec.token_group - 1 - config.window_keeps
                return cls(kept - config.first_encoded, max(left + spare + generated, touched))
            return cls(max(kept - config.first_encoded - config.window_keeps + generated, touched), left)
        # A tier counted in tokens grows up to its size; one more row holds the token a step gives up.
        size = int(allocate.budget(config, layer, layers, prompt).total)
        return cls(min(max(kept, size), prompt + generated) + 1, left + generated if config.retained else 0)

    @classmethod
    def largest(cls, config: CacheConfig, layers: int) -> "Shape":
        """Room for any of the layers: one program compresses them all."""
        return cls(*map(max, zip(*(cls.of(config, i, layers) for i in range(layers)))))


def nbytes(cache: Any) -> int:
    """Bytes of every array a cache, or any part of one, holds: codes, scales, minima, windows and counters."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))


# ---- prompt --------------------------------------------------------------------------------------------------------


def compress(
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    scores: Float[Array, "B K T"],
    queries: QueryStatistics,
    lengths: Int[Array, "B"],
    budget: Budget,
    config: CacheConfig,
    shape: Shape,
) -> LayerCache:
    """One layer's keys and values of the prompt, as the method keeps them.

    Args:
        key, value: of the prompt, after rotary embedding.
        scores: attention received (`CacheConfig.score_rows`); ignored by ranks by position.
        queries: statistics of the prompt's; ignored by codecs without balance and feedback.
        lengths: true prompt lengths.
        budget: of the first tier (`allocate.budgets`).
        config: the method.
        shape: static capacities (`Shape.of`).
    """
    tokens = key.shape[1]
    present = below(lengths, tokens)
    dtype = config.dtype or key.dtype
    # Padding may hold anything; zeros keep NaN out of everything stored.
    key, value = (jnp.where(present[..., None, None], x, 0) for x in (key, value))
    if config.keeps_all_as_it_is:
        # Filled up before it is turned: one pass makes the segment, and nothing as large lies beside it.
        rows = (jnp.swapaxes(segments.fit(x.astype(dtype), shape.segment, axis=1), 1, 2) for x in (key, value))
        return LayerCache(DenseSegment(*rows, jnp.array(lengths)), config)
    key, value = (jnp.swapaxes(x, 1, 2) for x in (key, value))
    present = present[:, None]
    scores = rank.refine(scores, value, lengths, budget.recent, config.rank)
    key, value = _rotated(key, config.rotate_keys), _rotated(value, config.rotate_values)
    units = None
    if config.small_metadata:
        # Exact sinks may be louder than all others; nothing of theirs is encoded.
        units = Units.of(*(x[:, :, config.first_encoded :] for x in (key, value)))
        key, value = (x / unit[..., None, None].astype(x.dtype) for x, unit in zip((key, value), units))
    moment = _rotated(queries.moment, config.rotate_keys)
    moment = jnp.swapaxes(_rotated(jnp.swapaxes(moment, -1, -2), config.rotate_keys), -1, -2)
    balance = channel_balance(queries.loudest, key) if _balances(config) else None
    if config.window_style == "kivi":
        tiers = kivi.compress(key, value, lengths, config, shape.segment, dtype, balance, moment)
        return LayerCache(tiers[0], config, tiers[1], units=units)

    if config.quantized_first is not None:
        key, value = _quantized(config.quantized_first, key, value, lengths)
    build = functools.partial(segments.build, dtype=dtype, balance=balance, moment=moment)
    if config.window is not None and config.retained is not None:
        first, window, rest = _in_two_tiers(key, value, scores, lengths, budget, config, shape, dtype, build)
        return LayerCache(first, config, window, rest, units=units)
    friendliness = _friendliness(key, value, present, config) if config.rank.attention_weight < 1 else None
    kept = jnp.minimum(budget.total, lengths)
    if config.selects or config.evict != "never" or config.retained is not None:
        chosen = _best(scores, friendliness, present, lengths, budget, kept, config)
        rows = rank.in_text_order(chosen, min(shape.segment, tokens))
        first_key, first_value = _gather(key, rows), _gather(value, rows)
    else:
        rows, first_key, first_value = None, key, value

    # Exact sinks, the newest tokens and those that do not fill a group are not encoded: they start the window.
    sinks, group = config.first_encoded, config.codec.token_group
    whole = jnp.maximum(kept - sinks - config.window_keeps, 0) // group * group if config.window else kept
    first = first_key[:, :, sinks:], first_value[:, :, sinks:]
    segment = build(config.codec, *first, whole, shape.segment)
    window = retained = ledger = None
    if config.window is not None:
        window = _window(first_key, first_value, kept, whole, config, dtype)
    if config.retained is not None:
        rest = rank.in_text_order(present & ~chosen, min(max(shape.retained, 1), tokens))
        retained = build(config.retained, _gather(key, rest), _gather(value, rest), lengths - kept, shape.retained)
    if config.evict != "never":
        ledger = _ledger(rows, scores, friendliness, budget, lengths, config, segment.capacity)
    return LayerCache(segment, config, window, retained, ledger, units)


def _in_two_tiers(
    key: Float[Array, "B K T H"],
    value: Float[Array, "B K T H"],
    scores: Float[Array, "B K T"],
    lengths: Int[Array, "B"],
    budget: Budget,
    config: CacheConfig,
    shape: Shape,
    dtype: DTypeLike,
    build: Callable[..., Segment],
) -> tuple[Segment, DenseSegment, Segment]:
    """A prompt's most attended tokens, its window, and all other tokens, of which none is dropped.

    Sinks (where exact) and the newest tokens start the window; of those between, both tiers take whole groups.
    """
    sinks, group = config.first_encoded, config.codec.token_group
    encoded = jnp.maximum(lengths - sinks - config.window_keeps, 0) // group * group
    important = jnp.clip(budget.total - sinks, 0, encoded) // group * group
    key_between, value_between, scores = key[:, :, sinks:], value[:, :, sinks:], scores[:, :, sinks:]
    between = below(encoded[:, None], key_between.shape[2])
    chosen = rank.best(scores, encoded, jnp.zeros_like(lengths), 0, important)

    def tier(codec: Codec, mine: Bool[Array, "B K T"], count: Int[Array, "B"], capacity: int) -> Segment:
        rows = rank.in_text_order(mine, min(max(capacity, 1), mine.shape[-1]))
        return build(codec, _gather(key_between, rows), _gather(value_between, rows), count, capacity)

    # No more tokens come to the first tier.
    first = tier(config.codec, chosen, important, shape.segment)
    return (
        dataclasses.replace(first, coupling=None) if isinstance(first, PackedSegment) else first,
        _window(key, value, lengths, encoded, config, dtype),
        tier(config.retained, between & ~chosen, encoded - important, shape.retained),
    )


def _window(key, value, held: Int[Array, "B"], encoded: Int[Array, "B"], config: CacheConfig, dtype) -> DenseSegment:
    """Of `held` tokens [B, K, T, H] in text order: exact sinks, and those behind the `encoded` ones."""
    sinks = config.first_encoded
    row = row_numbers(sinks + config.window, axes=3)
    row = jnp.where(row < sinks, row, row + encoded[:, None, None])
    return DenseSegment(*(_gather(x, row).astype(dtype) for x in (key, value)), held - encoded)


def _rotated(x: Float[Array, "... H"], wanted: bool) -> Float[Array, "... H"]:
    return rotate(x).astype(x.dtype) if wanted else x


def _inwards(layer: LayerCache, query, key, value):
    """Queries, keys and values of new tokens [B, T, heads, H] as the layer holds them."""
    config = layer.config
    if config.rotate_keys and config.rotate_values:  # one product for all three: a launch costs more than its work
        heads = query.shape[2], query.shape[2] + key.shape[2]
        query, key, value = jnp.split(_rotated(jnp.concatenate((query, key, value), axis=2), True), heads, axis=2)
    else:
        query, key = _rotated(query, config.rotate_keys), _rotated(key, config.rotate_keys)
        value = _rotated(value, config.rotate_values)
    if layer.units is not None:
        query = times_unit(query, layer.units.key)
        key, value = times_unit(key, 1 / layer.units.key), times_unit(value, 1 / layer.units.value)
    return query, key, value


def _outwards(layer: LayerCache, output: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    """The output for the values as they came."""
    if layer.config.rotate_values:
        return rotate_back(output, _units(layer).value)
    return output if layer.units is None else times_unit(output, layer.units.value)


def _units(layer: LayerCache) -> Units:
    """The layer's, or ones."""
    if layer.units is not None:
        return layer.units
    ones = jnp.ones((layer.segment.length.shape[0], layer.heads[0]), jnp.float32)
    return Units(ones, ones)


def _balances(config: CacheConfig) -> bool:
    return config.codec.balance or (config.retained is not None and config.retained.balance)


def channel_balance(loudest: Float[Array, "B K H"], key: Float[Array, "B K T H"]) -> Float[Array, "B K H"]:
    """b = sqrt(max |query| / max |key|) of each channel over the prompt (MiKV equation 2)."""
    loudest_key = jnp.abs(key).max(axis=2).astype(jnp.float32)
    return jnp.sqrt(jnp.maximum(loudest, 1e-5) / jnp.maximum(loudest_key, 1e-5))


def _gather(x: Float[Array, "B K T H"], rows: Int[Array, "B #K R"]) -> Float[Array, "B K R H"]:
    """Rows of x; zeros for rows that are none."""
    return jnp.take_along_axis(x, rows[..., None], axis=2, mode="fill", fill_value=0)


def _best(scores, friendliness, present, lengths, budget: Budget, kept, config: CacheConfig) -> Bool[Array, "B K T"]:
    if friendliness is not None:
        candidates = present & below(lengths - budget.recent, scores.shape[-1])[:, None]
        protected = _protected(lengths, budget, config)
        weight = config.rank.attention_weight
        scores = rank.mix(scores, friendliness, candidates, jnp.broadcast_to(present, scores.shape), protected, weight)
    return rank.best(scores, lengths, budget.recent, config.allocation.sinks, kept)


def _protected(lengths, budget: Budget, config: CacheConfig) -> Int[Array, "B"]:
    table = allocate.count(np.arange(config.prompt_capacity + 1), config.rank.protected)
    return jnp.minimum(jnp.asarray(table)[lengths], budget.total - budget.recent)


def _friendliness(key, value, valid, config: CacheConfig) -> Float[Array, "B K T"]:
    """How well tokens survive the codec: (2 - e_K - e_V) / 2 with errors scaled to 0..1 (Q-Hitter)."""
    coded = _through(config.codec, key, value)
    valid = jnp.broadcast_to(valid, key.shape[:3])
    errors = (jnp.linalg.norm(a - b.astype(jnp.float32), axis=-1) for a, b in zip(coded, (key, value)))
    return (2 - sum(rank.to_unit(error, valid) for error in errors)) / 2


def _quantized(codec: Codec, key, value, lengths: Int[Array, "B"]):
    """A prompt [B, K, T, H] as the codec gives it back; tokens at its end that fill no group stay as they are."""
    tokens, group = key.shape[2], codec.token_group
    padded = -(-tokens // group) * group
    back = _through(codec, segments.fit(key, padded), segments.fit(value, padded))
    whole = below(lengths // group * group, tokens)[:, None, :, None]
    return tuple(jnp.where(whole, new[:, :, :tokens].astype(x.dtype), x) for x, new in zip((key, value), back))


def _through(codec: Codec, key, value):
    """Keys and values as the codec gives them back, float32."""
    return segments.decode(codec, segments.encode_keys(codec, key, None), segments.encode_values(codec, value), None)


def _ledger(rows, scores, friendliness, budget: Budget, lengths, config: CacheConfig, capacity: int) -> Ledger:
    def of_rows(x):
        taken = jnp.take_along_axis(x, rows, axis=2, mode="fill", fill_value=0)
        return jnp.pad(taken, ((0, 0), (0, 0), (0, capacity - taken.shape[2])))

    positions = jnp.pad(rows, ((0, 0), (0, 0), (0, capacity - rows.shape[2])))
    return Ledger(
        positions.astype(jnp.int32),
        of_rows(scores),
        None if friendliness is None else of_rows(friendliness),
        jnp.array(budget.total),
        jnp.array(budget.recent),
        _protected(lengths, budget, config),
    )


# ---- one new token -------------------------------------------------------------------------------------------------


def read_token(
    layer: LayerCache,
    query: Float[Array, "B 1 N H"],
    key: Float[Array, "B 1 K H"],
    value: Float[Array, "B 1 K H"],
    position: Int[Array, "B"],
    accept: Bool[Array, "B"] | None = None,
) -> tuple[LayerCache, Float[Array, "B 1 N H"]]:
    """Stores one more token of every accepting sequence, and attends to all that is held, the token included.

    In the order of the methods' code: make room, append, encode a full window, attend, update scores, give up.

    Args:
        layer: the layer.
        query, key, value: of the token, query and key after rotary embedding.
        position: tokens read before this one.
        accept: sequences that store the token, all of which have a row left, as `KVCache.room` says. None: those that
            have one, and NaN is the output of the others.
    """
    if accept is None:
        fits = has_row(layer, position)
        layer, output = read_token(layer, query, key, value, position, fits)
        return layer, jnp.where(fits[:, None, None, None], output, jnp.nan)
    layer, query = _take_in(layer, query, key, value, position, accept)
    output, lse, logits = attend(layer, query, position)
    if logits is not None:
        layer = add_scores(layer, logits, lse, accept[:, None])
    return settle(layer, position, accept), output


def has_row(layer: LayerCache, position: Int[Array, "B"]) -> Bool[Array, "B"]:
    """Whether each sequence, which has read `position` tokens, can store one more in the rows there are."""
    config, segment, window = layer.config, layer.segment, layer.window
    if isinstance(window, KiviWindow):
        return kivi.has_row(segment, window, position)
    if window is not None:
        tier, encoded = getattr(layer, layer.growing), window.capacity - config.first_encoded - config.window_keeps
        return (window.length + 1 < window.capacity) | (tier.length + encoded <= tier.capacity)
    left = segment.length < segment.capacity
    if layer.ledger is None or layer.retained is None:
        return left
    return left & ((segment.length < layer.ledger.size) | (layer.retained.length < layer.retained.capacity))


def _take_in(layer: LayerCache, query, key, value, position, accept):
    """The layer with one more token [B, 1, heads, H], and the token's query as the layer's keys are held."""
    if isinstance(layer.window, DenseSegment) and layer.config.rotate_keys and layer.config.rotate_values:
        with contextlib.suppress(NotImplementedError):  # no kernel, as below
            heads_first = (jnp.swapaxes(x, 1, 2) for x in (key, value))
            return _append_by_kernel(layer, *heads_first, accept, Rotation(query, *_units(layer)))
    query, key, value = _inwards(layer, query, key, value)
    key, value = (jnp.swapaxes(x, 1, 2) for x in (key, value))
    return arrive(layer, key, value, position, accept), query


def read_tokens(
    layer: LayerCache,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    position: Int[Array, "B"],
    counts: Int[Array, "B"],
    counted: Bool[Array, "B T"],
) -> tuple[LayerCache, Float[Array, "B T N H"]]:
    """Reads the first `counts` of T more tokens of each sequence at once; `position` is that of the first.

    They attend to all that was held and, exactly, to each other; then they are stored one after the other. The
    queries in `counted` add their attention to the scores.
    """
    query, key, value = _inwards(layer, query, key, value)
    tokens = row_numbers(query.shape[1])
    own, _, lse = two_pass_attention(query, key, value, query_lengths=counts, key_value_lengths=counts, score_rows=0)
    own = Partial(own.astype(jnp.float32), lse, jnp.where(jnp.isneginf(lse), 0.0, 1.0))
    output, lse, logits = attend(layer, query, position - 1, also=(own,))
    key, value = (jnp.swapaxes(x, 1, 2) for x in (key, value))
    scores = jnp.zeros(key.shape[:3])
    if logits is not None:
        layer = add_scores(layer, logits, lse, counted)
        seen = (tokens[None] <= tokens[:, None])[None] & counted[:, :, None] & below(counts, len(tokens))[:, None]
        _, fresh = dense_decode_attention(query, key, value, counts, return_logits=True)
        scores = segments.received(fresh, lse, seen, key.shape[1])

    def store(layer, token):
        k, v, score, i = token
        accept = i < counts
        layer = arrive(layer, k[:, :, None], v[:, :, None], position + i, accept, score)
        return settle(layer, position + i, accept), None

    stream = (*(jnp.moveaxis(x, 2, 0) for x in (key, value, scores)), tokens)
    return jax.lax.scan(store, layer, stream)[0], output


def arrive(layer: LayerCache, key, value, position, accept, score=0.0) -> LayerCache:
    """The layer with one more token [B, K, 1, H], whose score so far is `score` [B, K]."""
    if isinstance(layer.window, KiviWindow):
        window = kivi.arrive(layer.window, key, value, position, accept)
        return dataclasses.replace(layer, window=window)
    if layer.window is not None:
        return _arrive_in_window(layer, key, value, accept)
    if layer.config.evict == "before":
        layer = _give_up(layer, position, accept & (layer.segment.length >= layer.ledger.size))
    ledger = layer.ledger
    if ledger is not None:
        ledger = _enter(ledger, layer.segment, key, value, position, accept, layer.config, score)
    return dataclasses.replace(layer, segment=segments.append(layer.segment, key, value, accept), ledger=ledger)


def _arrive_in_window(layer: LayerCache, key, value, accept) -> LayerCache:
    """A window that is full with the new token is encoded at once (MiniKV Algorithm 1), from the first row that is on
    and but for the newest that stay."""
    # Not on every device, and not for every codec. A CPU takes the condition for next to nothing.
    with contextlib.suppress(NotImplementedError):
        return _append_by_kernel(layer, key, value, accept)[0]
    tier, window = getattr(layer, layer.growing), segments.append(layer.window, key, value, accept)
    config, full = layer.config, window.length == window.capacity
    first, keeps = config.first_encoded, config.window_keeps
    tier, window = jax.lax.cond(
        full.any(), lambda s, w: _flush(s, w, full, first, keeps), lambda s, w: (s, w), tier, window
    )
    return dataclasses.replace(layer, window=window, **{layer.growing: tier})


def _append_by_kernel(layer: LayerCache, key, value, accept, rotation: Rotation | None = None):
    """`_arrive_in_window` in one launch, and the query of `rotation`. Raises NotImplementedError without a kernel."""
    tier, window, query = segments.append_to_window(
        getattr(layer, layer.growing), layer.window, key, value, accept, layer.config.first_encoded,
        layer.config.window_keeps, rotation,
    )  # fmt: skip
    return dataclasses.replace(layer, window=window, **{layer.growing: tier}), query


def _flush(
    segment: PackedSegment, window: DenseSegment, full: Bool[Array, "B"], first: int, keeps: int
) -> tuple[PackedSegment, DenseSegment]:
    """Encodes the windows of the sequences that are `full` behind their segment's last token.

    Rows before `first` stay, and the newest `keeps` move behind them.
    """
    last = window.capacity - keeps
    codes = segments.encode(segment, window.key[:, :, first:last], window.value[:, :, first:last])
    start = jnp.broadcast_to(segment.length[:, None], window.key.shape[:2])
    count = jnp.where(full, last - first, 0)

    def moved(rows):
        if keeps == 0:
            return rows
        return jnp.where(full[:, None, None, None], rows.at[:, :, first : first + keeps].set(rows[:, :, last:]), rows)

    segment = segments.put_codes(segment, start, *codes, full)
    return (
        dataclasses.replace(segment, length=segment.length + count),
        DenseSegment(moved(window.key), moved(window.value), window.length - count),
    )


def _enter(ledger: Ledger, segment: Segment, key, value, position, accept, config: CacheConfig, score) -> Ledger:
    """The ledger with a row for the new token."""
    new = (row_numbers(segment.capacity, axes=2) == segment.length[:, None]) & accept[:, None]
    new = new[:, None]
    score = position.astype(jnp.float32)[:, None] if config.rank.by == "position" else jnp.asarray(score)
    score = jnp.broadcast_to(score, key.shape[:2])
    friendliness = ledger.friendliness
    if friendliness is not None:
        fresh = _friendliness(key, value, jnp.ones((1, 1, 1), bool), config)
        friendliness = jnp.where(new, fresh, friendliness)
    return dataclasses.replace(
        ledger,
        positions=jnp.where(new, position[:, None, None], ledger.positions),
        scores=jnp.where(new, score[..., None], ledger.scores),
        friendliness=friendliness,
    )


def attend(
    layer: LayerCache,
    query: Float[Array, "B T N H"],
    position: Int[Array, "B"],
    also: tuple[Partial, ...] = (),
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"], Float[Array, "B T N S"] | None]:
    """Attention over everything the layer holds, and `also`, of queries as its keys are held.

    `position` is that of the newest token held.

    Returns:
        The output in the query's dtype, for values as they came; the log-sum-exp; and if tokens are given up after
        attention the logits of the first tier's rows.
    """
    scored = layer.config.evict == "after"
    parts = [part for part in (layer.segment, layer.retained) if part is not None]
    if isinstance(layer.window, KiviWindow):
        parts.append(kivi.tail(layer.segment, layer.window, position))
    elif layer.window is not None:
        parts.append(layer.window)
    if not (also or layer.prefix):
        rotated = _units(layer).value if layer.config.rotate_values else None
        parts = [segments.part(query, part) for part in parts]
        output, lse, *logits = decode_attention(parts, return_logits=scored, rotated=rotated)
        if rotated is None:
            output = _outwards(layer, output)
        return output, lse, logits[0] if scored else None
    first = segments.attention(query, layer.segment, return_logits=scored)
    first, logits = first if scored else (first, None)
    others = [segments.attention(query, part) for part in parts[1:]]
    others += [_shared_attention(query, part) for part in layer.prefix]
    output, lse = merge_partials([first, *others, *also])
    return _outwards(layer, output.astype(query.dtype)), lse, logits


def _shared_attention(query: Float[Array, "B T N H"], prefix: Segment) -> Partial:
    """All sequences' queries over one shared segment: to it they are so many more queries of one sequence."""
    b, t = query.shape[:2]
    partial = segments.attention(query.reshape(1, b * t, *query.shape[2:]), prefix)
    return Partial(*(x.reshape(b, t, *x.shape[2:]) for x in partial))


def add_scores(layer: LayerCache, logits: Float[Array, "B T N S"], lse, counted: Bool[Array, "B T"]) -> LayerCache:
    """The layer whose tokens are credited with the attention they just received from the counted queries."""
    held = below(layer.segment.length, logits.shape[-1])
    gained = segments.received(logits, lse, counted[:, :, None] & held[:, None], layer.ledger.scores.shape[1])
    return dataclasses.replace(layer, ledger=dataclasses.replace(layer.ledger, scores=layer.ledger.scores + gained))


def settle(layer: LayerCache, position, accept) -> LayerCache:
    """What a method does after attention: give up a token, or encode what has grown too old."""
    if isinstance(layer.window, KiviWindow):
        segment, window = kivi.settle(layer.segment, layer.window, position, accept)
        return dataclasses.replace(layer, segment=segment, window=window)
    if layer.config.evict == "after":
        return _give_up(layer, position, accept & (layer.segment.length > layer.ledger.size))
    return layer


def _give_up(layer: LayerCache, position, must: Bool[Array, "B"]) -> LayerCache:
    """Takes the lowest token of each head out of the first tier: into the retained tier, or away.

    The last row moves into its place, so that rows stay without gaps. Of equal scores the later token goes.
    """
    segment, ledger = layer.segment, layer.ledger
    victim = _victim(segment, ledger, position, layer.config)
    retained = layer.retained
    if retained is not None:
        retained = segments.append(retained, *segments.take(segment, victim), must)
    last = jnp.broadcast_to(segment.length[:, None] - 1, victim.shape)
    last = jnp.maximum(last, 0)
    segment = segments.move(segment, last, victim, must)
    into = (row_numbers(segment.capacity, axes=3) == victim[..., None]) & must[:, None, None]

    def moved(x):
        return jnp.where(into, jnp.take_along_axis(x, last[..., None], axis=2), x)

    ledger = dataclasses.replace(
        ledger,
        positions=moved(ledger.positions),
        scores=moved(ledger.scores),
        friendliness=None if ledger.friendliness is None else moved(ledger.friendliness),
    )
    segment = dataclasses.replace(segment, length=segment.length - must.astype(jnp.int32))
    return dataclasses.replace(layer, segment=segment, retained=retained, ledger=ledger)


def _victim(segment: Segment, ledger: Ledger, position, config: CacheConfig) -> Int[Array, "B K"]:
    held = below(segment.length, segment.capacity)[:, None]
    # The oldest of the newest `recent` tokens stands at position + 1 - recent; make room before the next one arrives.
    newest = position - 1 if config.evict == "before" else position
    old = ledger.positions <= (newest - ledger.recent)[:, None, None]
    if config.evict == "before":
        old = jnp.ones_like(held)
    candidates = held & old & (ledger.positions >= config.allocation.sinks)
    priority = ledger.scores
    if ledger.friendliness is not None:
        valid = jnp.broadcast_to(held, priority.shape)
        weight = config.rank.attention_weight
        priority = rank.mix(priority, ledger.friendliness, candidates, valid, ledger.protected, weight)
    lowest = jnp.min(jnp.where(candidates, priority, jnp.inf), axis=-1, keepdims=True)
    return jnp.argmax(jnp.where(candidates & (priority == lowest), ledger.positions, -1), axis=-1).astype(jnp.int32)
