"""New tokens go straight into the first tier, one by one: a cache that only grows."""

import dataclasses

import jax.numpy as jnp

from minikv_jax import rank, segments
from minikv_jax.cache import LayerCache, Prompt
from minikv_jax.checks import require
from minikv_jax.choose import Choice, choose, gather
from minikv_jax.config import Method
from minikv_jax.inflow import Inflow, repeated
from minikv_jax.segments import Segment
from pallas_kernels.rows import below


@dataclasses.dataclass(frozen=True)
class Append(Inflow):
    """What the prompt left stays, and each new token joins the first tier."""

    def check(self, method):
        one_by_one(method)

    def rows(self, method, kept, left, total, config):
        return kept + config.generated_capacity, left

    def begin(self, prompt, method):
        choice = choose(prompt, method)
        first = prompt.tier(method.codec, choice.key, choice.value, choice.kept, prompt.shape.first)
        return LayerCache(first, method, second_tier(prompt, choice, method))

    def has_row(self, layer, position):
        return layer.first.length < layer.first.capacity

    def arrive(self, layer, key, value, position, accept, score=0.0):
        return dataclasses.replace(layer, first=segments.append(layer.first, key, value, accept))

    def forked(self, layer, count, room):
        own = layer.first.empty(count, room)
        frames = repeated(layer.frames, count)
        return LayerCache(own, layer.method, frames=frames).sharing(layer.tiers, jnp.zeros((count,), jnp.int32))

    def ahead(self, layer, position):
        return layer.first.capacity - layer.first.length

    def behind(self, layer, position):
        return layer.first.length

    def taken_back(self, layer, counts):
        first = dataclasses.replace(layer.first, length=layer.first.length - counts)
        return dataclasses.replace(layer, first=first)


def one_by_one(method: Method) -> None:
    """Refuses codecs that take tokens in groups only.

    Raises:
        ConfigError: naming what such a codec needs.
    """
    for codec in method.codecs:
        require(
            codec.token_group == 1,
            f"key_group={codec.key_group} tokens are encoded together: give key_axis='channels', or an inflow with a "
            f"window of at least {codec.token_group} tokens.",
        )


def second_tier(prompt: Prompt, choice: Choice, method: Method) -> Segment | None:
    """What the first tier leaves of a prompt, if the method has a second one."""
    if method.rest is None or choice.chosen is None:
        return None
    tokens, capacity = prompt.key.shape[2], prompt.shape.rest
    present = below(prompt.lengths, tokens)[:, None]
    rows = rank.in_text_order(present & ~choice.chosen, min(max(capacity, 1), tokens))
    rest = gather(prompt.key, rows), gather(prompt.value, rows)
    return prompt.tier(method.rest, *rest, prompt.lengths - choice.kept, capacity)
