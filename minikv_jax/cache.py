"""The state of a batch of sequences: one layer's, and all layers' together.

KVCache
  layers[l]: LayerCache
    first    DenseSegment | PackedSegment   the first tier
    rest     PackedSegment | None           the second tier
    flow     of the method's inflow         a window of the newest tokens, a ledger of scores, or nothing
    frames   of the method's bases          what each has learnt of the prompt
    prefix   (Segment, ...)                 prefixes that sequences share, each held once

What the axes of these arrays are is said by `axes` alone. The batch of `prefix` is one of prefixes, that of all else
one of sequences: what is done with sequences is done by `by_sequence`, which leaves `prefix` alone.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from minikv_jax import allocate, channels, segments
from minikv_jax.allocate import Budget
from minikv_jax.basis import Moments
from minikv_jax.codec import Codec
from minikv_jax.config import CacheConfig, Method
from minikv_jax.segments import Segment


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's share of a cache, and the layer's method (static).

    Attributes:
        first, rest, flow, frames: see the module.
        prefix: tiers of prefixes that sequences share.
        prefix_of: int32 [B], which of them each sequence has; -1 for none. None where there are no prefixes.
        prefixes: how many there are (static).
    """

    first: Segment
    method: Method = dataclasses.field(metadata={"static": True})
    rest: Segment | None = None
    flow: Any = None
    frames: tuple[Any, ...] = ()
    prefix: tuple[Segment, ...] = ()
    prefix_of: Int[Array, "B"] | None = None
    prefixes: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def tiers(self) -> tuple[Segment, ...]:
        """The tiers that there are, the first one first."""
        return (self.first,) if self.rest is None else (self.first, self.rest)

    @property
    def heads(self) -> tuple[int, int]:
        """Key/value heads, and their size."""
        return self.first.heads

    @property
    def of_model(self) -> tuple[int, int]:
        """Heads of the model's keys and values, and their size, whatever rows the layer holds."""
        latent = self.method.latent
        return self.heads if latent is None else (latent.heads, latent.head_size)

    @property
    def alone(self) -> "LayerCache":
        """The layer of sequences that have no prefix."""
        return dataclasses.replace(self, prefix=(), prefix_of=None, prefixes=0)

    def sharing(self, prefix: tuple[Segment, ...], prefix_of: Int[Array, "B"]) -> "LayerCache":
        """The layer whose sequences have these tiers of prefixes before what is their own."""
        count = prefix[0].length.shape[0]
        return dataclasses.replace(self, prefix=prefix, prefix_of=prefix_of, prefixes=count)

    @property
    def own(self) -> "LayerCache":
        """The layer without what its sequences share."""
        return dataclasses.replace(self, prefix=())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The whole state of B sequences between two calls of `decode_step`.

    Attributes:
        layers: one LayerCache a layer; their capacities may differ.
        lengths: int32 [B], tokens read so far: the rotary position of the next one.
        room: int32 [B], tokens that may still follow. Where it is 0, `decode_step` stores nothing and returns NaN.
        prompts: int32 [B], tokens of the prompt, which was compressed as a whole: none of them can be taken back.
        config: the method (static).
    """

    layers: tuple[LayerCache, ...]
    lengths: Int[Array, "B"]
    room: Int[Array, "B"]
    prompts: Int[Array, "B"]
    config: CacheConfig = dataclasses.field(metadata={"static": True})

    def after(self, layers: Sequence[LayerCache], read: Int[Array, "B"]) -> "KVCache":
        """The cache with these layers, after so many more tokens of each sequence."""
        lengths, room = self.lengths + read, self.room - read
        return dataclasses.replace(self, layers=tuple(layers), lengths=lengths, room=room)


def axes(x: Array | jax.ShapeDtypeStruct) -> tuple[str | None, ...]:
    """What each axis of an array of a cache is: "batch", "heads" (of keys and values), or None for all others.

    Arrays of one axis are counters, one number a sequence; all others start with batch and heads. Slots, shardings and
    pieces of work go by this and by nothing else.
    """
    return ("batch",) if x.ndim == 1 else ("batch", "heads", *(None,) * (x.ndim - 2))


def is_counter(x: Array | jax.ShapeDtypeStruct) -> bool:
    """Whether an array of a cache holds one number a sequence."""
    return axes(x) == ("batch",)


def is_layer(x: Any) -> bool:
    """Whether a part of a cache is one layer's."""
    return isinstance(x, LayerCache)


def shared_by(cache: KVCache) -> list[Array]:
    """The arrays that sequences share."""
    parts = jax.tree.leaves(cache, is_leaf=is_layer)
    return jax.tree.leaves([part.prefix for part in parts if is_layer(part)])


def with_none_of(cache: KVCache, other: KVCache) -> KVCache:
    """The other cache, of sequences without a prefix, as sequences of a cache that shares some."""

    def without(x: Any, y: Any) -> Any:
        if not is_layer(x) or not y.prefixes:
            return x
        return dataclasses.replace(x, prefix_of=jnp.full_like(x.first.length, -1), prefixes=y.prefixes)

    return jax.tree.map(without, other, cache, is_leaf=is_layer)


def fitted(x: Array, like: Array) -> Array:
    """Filled with zeros to as many rows: axis 2, where the capacities of two caches may differ."""
    return segments.fit(x, like.shape[2], axis=2) if x.shape[2:3] != like.shape[2:3] else x


def own(cache: KVCache) -> KVCache:
    """The cache without what its sequences share: all arrays have the batch of sequences."""
    return jax.tree.map(lambda x: x.own if is_layer(x) else x, cache, is_leaf=is_layer)


def by_sequence(change: Callable[..., Array], cache: KVCache, *others: KVCache) -> KVCache:
    """The cache with `change` made to every array that has an axis of sequences, beside those of other caches.

    What sequences share stays that of the first cache.
    """
    changed = jax.tree.map(change, own(cache), *map(own, others))
    shared = lambda x, y: dataclasses.replace(x, prefix=y.prefix) if is_layer(x) else x  # noqa: E731
    return jax.tree.map(shared, changed, cache, is_leaf=is_layer)


def in_both(new: KVCache, old: KVCache) -> KVCache | None:
    """The arrays that are the same objects in two caches, None in the place of others; None if there are none.

    To give the new cache away (`jit`'s donation) would take these from the old one: they are lent.
    """
    if not set(map(id, jax.tree.leaves(new))) & set(map(id, jax.tree.leaves(old))):
        return None
    return jax.tree.map(lambda x, y: x if x is y else None, new, old)


def without_lent(cache: KVCache, lent: KVCache | None) -> KVCache:
    """The cache with None in the place of arrays that are lent to it."""
    if lent is None:
        return cache
    return jax.tree.map(lambda x, y: y if x is None else None, lent, cache, is_leaf=lambda x: x is None)


def with_lent(cache: KVCache, lent: KVCache | None) -> KVCache:
    """The cache with the arrays that are lent to it."""
    if lent is None:
        return cache
    return jax.tree.map(lambda x, y: y if x is None else x, lent, cache, is_leaf=lambda x: x is None)


def nbytes(cache: Any) -> int:
    """Bytes of every array a cache, or any part of one, holds: codes, scales, minima, windows and counters."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))


class Readers(NamedTuple):
    """What a method may know of what reads a layer's keys and values, per key/value head, float32.

    Attributes:
        loudest: the largest magnitude of each channel of the prompt's queries.
        latest: sums of squares of each channel of the prompt's last `channels.LAST` queries.
        moments: of these queries, and of the output projection.
    """

    loudest: Float[Array, "B K H"]
    latest: Float[Array, "B K H"]
    moments: Moments

    @classmethod
    def of(
        cls, query: Float[Array, "B T N H"], heads: int, counted: Bool[Array, "B T"], last: Bool[Array, "B T"]
    ) -> "Readers":
        """The counted queries, of so many key/value heads. Nothing is known of the output projection.

        `last` are those among them that are the last of their prompts.
        """
        b, t, n, h = query.shape
        grouped = jnp.where(counted[:, :, None, None], query, 0).reshape(b, t, heads, n // heads, h)
        moment = jnp.einsum("btkgh,btkgi->bkhi", grouped, grouped, preferred_element_type=jnp.float32)
        loudest = jnp.abs(grouped).max(axis=(1, 3)).astype(jnp.float32)
        # Masked before it is summed: one reduction, beside the maximum, and nothing as long as the prompt.
        newest = jnp.where(last[:, :, None, None, None], grouped, 0).astype(jnp.float32)
        latest = jnp.square(newest).sum(axis=(1, 3))
        return cls(loudest, latest, Moments(moment, None))

    @classmethod
    def none(cls, x: Float[Array, "B ..."], heads: int, head_size: int) -> "Readers":
        """No queries. What is made varies over a mesh as x does."""
        zeros = jnp.zeros_like(x, jnp.float32, shape=(x.shape[0], heads, head_size, head_size))
        return cls(zeros[..., 0], zeros[..., 0], Moments(zeros, None))

    def join(self, other: "Readers") -> "Readers":
        """Both sets of queries, and the output projection of the first."""
        query = self.moments.query + other.moments.query
        loudest = jnp.maximum(self.loudest, other.loudest)
        return Readers(loudest, self.latest + other.latest, Moments(query, self.moments.output))

    def with_projection(self, projection: Float[Array, "N H D"] | None) -> "Readers":
        """The same queries, and this output projection, which may be unknown."""
        if projection is None:
            return self
        query = self.moments.query
        rows = projection.reshape(query.shape[1], -1, *projection.shape[1:])
        output = jnp.einsum("kghd,kgid->khi", rows, rows, preferred_element_type=jnp.float32)
        return self._replace(moments=Moments(query, jnp.broadcast_to(output[None], query.shape)))


class Shape(NamedTuple):
    """Rows that one layer's tiers have room for; static."""

    first: int
    rest: int

    @classmethod
    def of(cls, config: CacheConfig, layer: int, layers: int) -> "Shape":
        """That of a layer, of a config with its capacities."""
        method, prompt = config.of_layer(layer), cast(int, config.prompt_capacity)
        totals = np.asarray(allocate.budget(config, layer, layers, np.arange(prompt + 1)).total)
        kept = allocate.most_kept(totals)
        left = allocate.most_left(totals) if method.rest is not None else 0
        return cls(*method.inflow.rows(method, kept, left, int(totals[-1]), config))

    @classmethod
    def largest(cls, config: CacheConfig, layers: int) -> "Shape":
        """Room for any of the layers: one program compresses them all."""
        return cls(*map(max, zip(*(cls.of(config, i, layers) for i in range(layers)))))


class Prompt(NamedTuple):
    """One layer's prompt, as its tiers hold it, for `Inflow.begin`.

    Attributes:
        key, value: after the method's bases; zeros behind each sequence's length.
        scores: attention received, after the rank's corrections.
        lengths: true lengths.
        budget: of the first tier.
        balance: of key channels (`codec.balance`), or None.
        moment: of the queries as they meet the keys.
        latest: of `Readers`.
        dtype: of dense rows.
        shape: rows of the tiers; static.
    """

    key: Float[Array, "B K T H"]
    value: Float[Array, "B K T V"]
    scores: Float[Array, "B K T"]
    lengths: Int[Array, "B"]
    budget: Budget
    balance: Float[Array, "B K H"] | None
    moment: Float[Array, "B K H H"]
    latest: Float[Array, "B K H"]
    dtype: DTypeLike
    shape: Shape

    def tier(
        self,
        codec: Codec,
        key: Float[Array, "B K S H"],
        value: Float[Array, "B K S V"],
        count: Int[Array, "B"],
        capacity: int,
        kept: tuple[Float[Array, "B K R H"], Int[Array, "B"]] | None = None,
    ) -> Segment:
        """A tier of the first `count` rows of key and value.

        `kept` are the keys that channels are chosen by, and how many of them are tokens; None: those of the tier.
        """
        head_size = key.shape[-1]
        width, chosen = codec.key_channels(head_size), None
        if width < head_size:
            chosen = channels.chosen(self.latest, *((key, count) if kept is None else kept), width)
        return segments.build(codec, key, value, count, capacity, self.dtype, self.balance, self.moment, chosen)
