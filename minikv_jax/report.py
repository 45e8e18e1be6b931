"""What a cache costs: every array it holds against a bfloat16 cache of the same text."""

import dataclasses

import jax
import numpy as np

from minikv_jax.cache import KVCache, LayerCache, nbytes
from minikv_jax.segments import DenseSegment

_BFLOAT16_BYTES = 2


@dataclasses.dataclass(frozen=True)
class Size:
    """Memory of one layer, or of a whole cache.

    Attributes:
        tokens_kept: of all sequences together, averaged over the layers for a whole cache.
        tokens_read: of all sequences together.
        bytes_held: codes, scales, minima, windows, counters and unused room.
        bytes_bfloat16: of a cache that keeps every token read in bfloat16.
    """

    tokens_kept: float
    tokens_read: int
    bytes_held: int
    bytes_bfloat16: int

    @property
    def bits_per_element(self) -> float:
        """Bits held for each number that a full cache would hold."""
        return 8 * _BFLOAT16_BYTES * self.bytes_held / max(self.bytes_bfloat16, 1)

    @property
    def times_smaller(self) -> float:
        return self.bytes_bfloat16 / max(self.bytes_held, 1)


@dataclasses.dataclass(frozen=True)
class CacheReport:
    layers: tuple[Size, ...]
    total: Size


def cache_report(cache: KVCache) -> CacheReport:
    """Sizes of a concrete cache, per layer and in total."""
    read = int(np.sum(jax.device_get(cache.lengths)))
    layers = tuple(_layer_size(layer, read) for layer in cache.layers)
    total = Size(
        tokens_kept=float(np.mean([layer.tokens_kept for layer in layers])),
        tokens_read=read,
        bytes_held=nbytes(cache),
        bytes_bfloat16=sum(layer.bytes_bfloat16 for layer in layers),
    )
    return CacheReport(layers, total)


def _layer_size(layer: LayerCache, read: int) -> Size:
    parts = [layer.segment] if layer.window is None else [layer.segment, layer.window]
    dense = isinstance(layer.segment, DenseSegment)
    codes = layer.segment.key if dense else layer.segment.keys.codes
    heads, head_size = codes.shape[1], codes.shape[-1]
    return Size(
        tokens_kept=int(sum(np.sum(jax.device_get(part.length)) for part in parts)),
        tokens_read=read,
        bytes_held=nbytes(layer),
        bytes_bfloat16=2 * read * heads * head_size * _BFLOAT16_BYTES,
    )
