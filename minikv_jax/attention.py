"""Attention of new tokens over everything a layer's cache holds."""

from jaxtyping import Array, Float

from minikv_jax.cache import LayerCache, PackedSegment, Segment
from pallas_kernels import Partial, dense_decode_attention, merge_partials, packed_decode_attention


def segment_attention(query: Float[Array, "B T N H"], segment: Segment) -> Partial:
    """The one question every segment answers: partial attention of the queries over the tokens it holds."""
    if isinstance(segment, PackedSegment):
        return packed_decode_attention(query, segment.keys, segment.values, segment.length)
    return dense_decode_attention(query, segment.key, segment.value, segment.length)


def attend(query: Float[Array, "B 1 N H"], layer: LayerCache) -> Float[Array, "B 1 N H"]:
    """Attention of one new token, which the layer already holds, over the layer's cache."""
    segments = [layer.segment] if layer.window is None else [layer.segment, layer.window]
    output, _ = merge_partials([segment_attention(query, segment) for segment in segments])
    return output.astype(query.dtype)
