"""CSKV's inflow (arXiv 2409.10593): the newest tokens as they are, and the latents of all that are older.

Rows of the window carry latents and, behind them, keys and values. A token that leaves takes its latents to the tier.
"""

import dataclasses

import jax.numpy as jnp

from minikv_jax import segments
from minikv_jax.append import one_by_one
from minikv_jax.cache import LayerCache
from minikv_jax.checks import check_types, require
from minikv_jax.choose import gather
from minikv_jax.inflow import Inflow, repeated
from minikv_jax.segments import DenseSegment
from pallas_kernels.rows import row_numbers


@dataclasses.dataclass(frozen=True)
class Beside(Inflow):
    """A dense ring of the newest tokens beside a tier of latents. Token t lies in row t % window.

    Attributes:
        window: tokens of the ring.
    """

    waits = True
    window: int = 32

    def __post_init__(self):
        check_types(self)
        require(self.window >= 1, f"window={self.window}: give at least 1 token.")

    def check(self, method):
        one_by_one(method)

    def rows(self, method, kept, left, total, config):
        return max(kept + config.generated_capacity - self.window, 1), left

    def begin(self, prompt, method):
        size, lengths = self.window, prompt.lengths
        key, value = method.latent.split(prompt.key, prompt.value)
        first = prompt.tier(method.codec, key, value, jnp.maximum(lengths - size, 0), prompt.shape.first)
        last = lengths[:, None] - 1
        newest = last - (last - row_numbers(size, axes=2)) % size
        key, value = (gather(x, newest[:, None]).astype(prompt.dtype) for x in (prompt.key, prompt.value))
        return LayerCache(first, method, flow=DenseSegment(key, value, jnp.minimum(lengths, size)))

    def has_row(self, layer, position):
        return (position < self.window) | (layer.first.length < layer.first.capacity)

    def arrive(self, layer, key, value, position, accept, score=0.0):
        window, slot = layer.flow, (position % self.window)[:, None]
        old_key, old_value = layer.method.latent.split(*window.take(slot))
        first = segments.append(layer.first, old_key, old_value, accept & (position >= self.window))
        window = window.put(slot, key, value, accept)
        length = jnp.where(accept, jnp.minimum(position + 1, self.window), window.length)
        return dataclasses.replace(layer, first=first, flow=dataclasses.replace(window, length=length))

    def newest(self, layer, position):
        return [layer.flow]

    def waiting(self, layer):
        return layer.flow

    def forked(self, layer, count, room):
        own = layer.first.empty(count, room)
        return LayerCache(own, layer.method, flow=repeated(layer.flow, count), prefix=layer.tiers)
