"""A dense window of the newest tokens beside a tier that holds them otherwise: narrower, or in fewer bits."""

import dataclasses

import jax.numpy as jnp

from minikv_jax import segments
from minikv_jax.append import one_by_one, second_tier
from minikv_jax.cache import LayerCache
from minikv_jax.checks import check_types, require
from minikv_jax.choose import choose, gather
from minikv_jax.inflow import Inflow, repeated
from minikv_jax.segments import DenseSegment
from pallas_kernels.rows import row_numbers


@dataclasses.dataclass(frozen=True)
class Newest(Inflow):
    """A full window gives its oldest token to the first tier with each new one.

    The state is a ring: kept token i lies in row i % window, and the tier is empty until the window is full.

    Attributes:
        window: newest kept tokens that stay dense and whole (ThinK and CSKV: 32).
    """

    waits = True
    stays = "what its window has given to its tier stays there"
    window: int = 32

    def __post_init__(self):
        check_types(self)
        require(self.window >= 1, f"window={self.window}: give at least 1 token.")

    def check(self, method):
        one_by_one(method)

    def rows(self, method, kept, left, total, config):
        return max(kept - self.window, 0) + config.generated_capacity, left

    def begin(self, prompt, method):
        choice = choose(prompt, method)
        older = jnp.maximum(choice.kept - self.window, 0)
        old_key, old_value = method.tier_rows(choice.key, choice.value)
        first = prompt.tier(method.codec, old_key, old_value, older, prompt.shape.first, (old_key, choice.kept))
        last = choice.kept[:, None, None] - 1
        row = last - (last - row_numbers(self.window, axes=3)) % self.window
        # Rows of a window that is not full yet are read by nobody.
        key, value = (gather(x, jnp.maximum(row, 0)).astype(prompt.dtype) for x in (choice.key, choice.value))
        window = DenseSegment(key, value, choice.kept - older)
        return LayerCache(first, method, second_tier(prompt, choice, method), window)

    def has_row(self, layer, position):
        return (layer.flow.length < self.window) | (layer.first.length < layer.first.capacity)

    def arrive(self, layer, key, value, position, accept, score=0.0):
        tier, window = layer.first, layer.flow
        full = window.length == self.window
        slot = jnp.broadcast_to(self._next(layer)[:, None], key.shape[:2])
        old_key, old_value = layer.method.tier_rows(*window.take(slot))
        tier = segments.append(tier, old_key, old_value, accept & full)
        window = window.put(slot, key, value, accept)
        more = (accept & ~full).astype(jnp.int32)
        window = dataclasses.replace(window, length=window.length + more)
        return dataclasses.replace(layer, first=tier, flow=window)

    def _next(self, layer):
        """Row [B] of the window that the next token takes."""
        return (layer.first.length + layer.flow.length) % self.window

    def newest(self, layer, position):
        return [layer.flow]

    def waiting(self, layer):
        return layer.flow

    def forked(self, layer, count, room):
        # The continuations' own tiers are empty, so their windows begin with row 0.
        start = jnp.where(layer.flow.length == self.window, self._next(layer), 0)
        row = (start[:, None, None] + row_numbers(self.window, axes=3)) % self.window
        key, value = (gather(x, row) for x in (layer.flow.key, layer.flow.value))
        window, frames = repeated((DenseSegment(key, value, layer.flow.length), layer.frames), count)
        own = layer.first.empty(count, room)
        forks = LayerCache(own, layer.method, flow=window, frames=frames)
        return forks.sharing(layer.tiers, jnp.zeros((count,), jnp.int32))

    def ahead(self, layer, position):
        return self.window - layer.flow.length

    def behind(self, layer, position):
        return jnp.where(layer.first.length == 0, layer.flow.length, 0)

    def taken_back(self, layer, counts):
        window = dataclasses.replace(layer.flow, length=layer.flow.length - counts)
        return dataclasses.replace(layer, flow=window)
