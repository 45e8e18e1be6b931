"""Latents: narrow rows, shared by all heads, from which a layer's keys are rebuilt and whose values are lifted.

A layer that caches latents (`model.LatentLayer`) gives the cache rows of one head: key latents of one width, value
latents of another, and behind both, where a method has a dense window, keys and values as they are. Tiers hold such
rows as any others. What differs is how they are read: keys are rebuilt and rotated at their rows' positions, and
attention over values returns latents, which are lifted once for all tokens.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minikv_jax import segments
from minikv_jax.checks import check_types, require
from minikv_jax.errors import shortened
from minikv_jax.segments import DenseSegment, Segment
from minikv_jax.sharing import KVSharer
from pallas_kernels import (
    Part,
    Partial,
    latent_decode_attention,
    merge_partials,
    partial_attention,
    with_sinks,
)
from pallas_kernels.rows import row_numbers

# Ranks are whole multiples of this, which groups of a codec divide and matrix units want.
_STEP = 16


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Latent:
    """One layer's latents. Static.

    Attributes:
        keys, values: their widths, R and V.
        heads, head_size: K and H, of the model's keys and values.
        exact: whether rows given to the cache carry keys and values as they are behind the latents.
    """

    keys: int
    values: int
    heads: int
    head_size: int
    exact: bool

    @property
    def widths(self) -> tuple[int, int]:
        """Of the rows given to the cache: of keys and of values."""
        more = self.heads * self.head_size if self.exact else 0
        return self.keys + more, self.values + more

    def split(self, key: Float[Array, "B 1 S _"], value: Float[Array, "B 1 S _"]) -> tuple[Array, Array]:
        """Latents of rows that may carry more."""
        return key[..., : self.keys], value[..., : self.values]

    def behind(
        self, key: Float[Array, "B S _"], value: Float[Array, "B S _"]
    ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Keys and values as they are, of rows that carry them."""
        shape = (*key.shape[:2], self.heads, self.head_size)
        return key[..., self.keys :].reshape(shape), value[..., self.values :].reshape(shape)


def rank_of(share: float, width: int) -> int:
    """The whole multiple of 16 next to this share of a width; at least 16, at most the width."""
    return whole_rank(share * width, width)


def whole_rank(rank: float, most: int) -> int:
    """The multiple of 16 next to a rank; at least 16, at most `most`."""
    return min(max(round(rank / _STEP), 1) * _STEP, most)


def _require_share(name: str, share: float) -> None:
    require(0 < share <= 1, f"{name}={share} is a share of the model's key width: give a number above 0.0, up to 1.0.")


@dataclasses.dataclass(frozen=True)
class LoRC:
    """LoRC's weights (arXiv 2410.03111): `models.latent.lorc` makes them.

    Attributes:
        least, most: ranks of the last layer and of the first, as shares of K H.
    """

    name: ClassVar[str] = "lorc"
    least: float
    most: float

    def __post_init__(self):
        check_types(self)
        _require_share("least", self.least)
        _require_share("most", self.most)
        require(self.least <= self.most, f"least={self.least} is above most={self.most}: exchange them.")

    def assumed(self, heads: int, head_size: int, layers: int) -> tuple[Latent, ...]:
        """Latents of a model whose weights are not known: the mean rank in every layer."""
        rank = rank_of((self.least + self.most) / 2, heads * head_size)
        return (Latent(rank, rank, heads, head_size, exact=False),) * layers


@dataclasses.dataclass(frozen=True)
class CSKV:
    """CSKV's weights (arXiv 2409.10593): `models.latent.cskv` makes them.

    Attributes:
        keys, values: ranks as shares of K H, the paper's densities.
        weights: name of what `minikv train` has written beside the model; None: of the model's by singular values.
    """

    name: ClassVar[str] = "cskv"
    keys: float
    values: float
    weights: str | None = None

    def __post_init__(self):
        check_types(self)
        named = self.weights is None or self.weights.isidentifier()
        require(named, f"weights={shortened(self.weights)} is a name, not a path: give letters, digits and _ alone.")
        _require_share("keys", self.keys)
        _require_share("values", self.values)

    def assumed(self, heads: int, head_size: int, layers: int) -> tuple[Latent, ...]:
        """Latents of a model of these sizes."""
        keys, values = (rank_of(share, heads * head_size) for share in (self.keys, self.values))
        return (Latent(keys, values, heads, head_size, exact=True),) * layers


def attend(
    layer: Any,
    query: Float[Array, "B T N H"],
    cache: Any,
    parts: Sequence[Segment],
    also: Sequence[Partial],
    sinks: Float[Array, "N"] | None,
    **softmax: Any,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attention over all that a layer holds: each part's rows have the places behind those of the parts before it.

    Args:
        layer: the `model.LatentLayer`.
        query: rotated.
        cache: the `cache.LayerCache`, whose prefixes come first.
        parts: each sequence's own, likewise.
        also: partial attention over other tokens.
        sinks, softmax: as `minikv_jax.layer.prefill`.

    Returns:
        The output in the query's dtype, for values as they came, and the log-sum-exp.
    """
    start, partials = jnp.zeros((1,), jnp.int32), list(also)
    for part in cache.prefix:
        read = functools.partial(attention, start=start, layer=layer)
        partials.append(segments.shared_attention(query, part, cache.prefix_of, read, **softmax))
        start = start + part.length
    if cache.prefix:
        start = jnp.where(cache.prefix_of >= 0, start[jnp.maximum(cache.prefix_of, 0)], 0)
    for part in parts:
        partials.append(attention(query, part, start, layer, **softmax))
        start = start + part.length
    output, lse = merge_partials(partials)
    if sinks is not None:
        output, lse = with_sinks(output, lse, sinks)
    return output.astype(query.dtype), lse


def attention(
    query: Float[Array, "B T N H"],
    segment: Segment,
    start: Int[Array, "#B"],
    layer: Any,
    **softmax: Any,
) -> Partial:
    """Partial attention of the queries over a segment of rows.

    Args:
        query: rotated.
        segment: of latents, or of rows that carry keys and values as they are.
        start: position of the segment's first row.
        layer: the `model.LatentLayer`.
        softmax: scale and soft_cap.

    Returns:
        Of values as they came, [B, T, N, H].
    """
    latent: Latent = layer.latent
    if segment.heads[1] != latent.values:
        rows = cast(DenseSegment, segment)  # tiers hold latents alone
        key, value = latent.behind(rows.key[:, 0], rows.value[:, 0])
        part = Part(query, jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2), rows.length)
        return partial_attention(part, **softmax)

    def rebuilt(rows, first):
        return layer.rebuilt(rows, start[:, None] + first + row_numbers(rows.shape[1], axes=2))

    part = segment.part(query)
    found = latent_decode_attention(part.query, part.keys, part.values, part.lengths, rebuilt, latent.heads, **softmax)
    return Partial(layer.lifted(found.output, found.total), found.maximum, found.total)


# What a model's weights may have been made into.
type Weights = LoRC | CSKV | KVSharer
