"""GPU attention kernels for compressed KV caches, usable without minikv_jax.

Shapes are written with the letters of `jax.nn.dot_product_attention`: B batch, T queries, S keys, N query heads,
K key/value heads, G = N // K query heads per key/value head, H head size.
"""

from pallas_kernels.packed_append.api import Rotation, Run, packed_append, packed_write
from pallas_kernels.packed_decode.api import (
    Part,
    decode_attention,
    dense_decode_attention,
    packed_decode_attention,
    partial_attention,
)
from pallas_kernels.packed_decode.layout import BLOCK, PackedTensor, dequantize, pack, unpack
from pallas_kernels.packed_decode.xla import latent_decode_attention
from pallas_kernels.partial import Partial, merge_partials, with_sinks
from pallas_kernels.two_pass_attention.api import two_pass_attention

__all__ = [
    "BLOCK",
    "PackedTensor",
    "Part",
    "Partial",
    "Rotation",
    "Run",
    "decode_attention",
    "dense_decode_attention",
    "dequantize",
    "latent_decode_attention",
    "merge_partials",
    "pack",
    "packed_append",
    "packed_decode_attention",
    "packed_write",
    "partial_attention",
    "two_pass_attention",
    "unpack",
    "with_sinks",
]
