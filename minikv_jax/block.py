"""MiniKV's inflow (arXiv 2411.18077, Algorithm 1): a dense window of the newest tokens, encoded when full."""

import dataclasses
from typing import cast

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from minikv_jax import basis, rank
from minikv_jax.cache import LayerCache, Prompt
from minikv_jax.checks import check_types, require
from minikv_jax.choose import choose, gather
from minikv_jax.codec import Codec
from minikv_jax.inflow import Inflow, repeated
from minikv_jax.segments import DenseSegment, PackedSegment, Segment
from pallas_kernels import Rotation, packed_append
from pallas_kernels.packed_decode.layout import BLOCK
from pallas_kernels.packed_rows import touched_blocks
from pallas_kernels.rows import below, row_numbers


@dataclasses.dataclass(frozen=True)
class Block(Inflow):
    """A full window is encoded at once, before the step's attention: into the second tier where there is one.

    Nothing has asked for new tokens yet, so none of them has a score that could lift it into the first of two tiers.

    Attributes:
        window: tokens of the window; a multiple of the codec's groups of tokens.
        keeps: newest tokens that stay dense when the others are encoded, and of a prompt; whole groups, at most half of
            the window.
        exact_sinks: the allocation's sinks are not encoded, nor do they stretch any group's range: they stay dense, in
            front of the window.
    """

    window: int = 128
    keeps: int = 0
    exact_sinks: bool = False

    stays = "what its window has encoded stays encoded; `keeps` leaves newest tokens in it"

    def __post_init__(self):
        check_types(self)
        size, keeps = self.window, self.keeps
        require(size >= 1, f"window={size}: give at least 1 token.")
        require(0 <= keeps <= size // 2, f"keeps={keeps}: give at most half of the window.")

    def check(self, method):
        group, size = method.codec.token_group, self.window
        require(not method.codec.dense, f"window={size}: only tokens that are encoded together need a window.")
        require(size % group == 0, f"window={size} must be a multiple of the key group {group}.")
        require(self.keeps % group == 0, f"keeps={self.keeps} must be a multiple of the key group {group}.")
        if method.rest is None:
            return
        require(method.rest.token_group == group, "Tiers behind one window need the same groups of tokens.")
        require(
            method.rank.attention_weight == 1,
            "Tiers behind one window are ranked by attention alone: leave attention_weight at 1.",
        )

    def first_encoded(self, method):
        return method.allocation.sinks if self.exact_sinks else 0

    def rows(self, method, kept, left, total, config):
        # What a window encodes touches whole blocks, even at the end of a segment.
        touched = BLOCK * touched_blocks(self.window - self.keeps)
        kept = kept - self.first_encoded(method)
        if method.rest is None:
            return max(kept - self.keeps + config.generated_capacity, touched), left
        # The first tier takes whole groups; what that leaves over goes to the other one.
        spare = method.codec.token_group - 1 - self.keeps
        return kept, max(left + spare + config.generated_capacity, touched)

    def begin(self, prompt, method):
        if method.rest is not None:
            return self._two_tiers(prompt, method)
        choice, sinks = choose(prompt, method), self.first_encoded(method)
        # Exact sinks, the newest tokens and those that do not fill a group are not encoded: they start the window.
        encoded = self._encoded(choice.kept, method)
        rows = choice.key[:, :, sinks:], choice.value[:, :, sinks:]
        first = prompt.tier(method.codec, *rows, encoded, prompt.shape.first, (choice.key, choice.kept))
        window = self._begun(choice.key, choice.value, choice.kept, encoded, sinks, prompt.dtype)
        return LayerCache(first, method, flow=window)

    def _encoded(self, held: Int[Array, "B"], method) -> Int[Array, "B"]:
        """Of so many tokens those that are encoded: whole groups."""
        group = method.codec.token_group
        return jnp.maximum(held - self.first_encoded(method) - self.keeps, 0) // group * group

    def _two_tiers(self, prompt: Prompt, method) -> LayerCache:
        """The most attended tokens, the window, and all other tokens, of which none is dropped.

        Sinks (where exact) and the newest tokens start the window; of those between, both tiers take whole groups.
        """
        sinks, group = self.first_encoded(method), method.codec.token_group
        encoded = self._encoded(prompt.lengths, method)
        important = jnp.clip(prompt.budget.total - sinks, 0, encoded) // group * group
        key, value, scores = prompt.key[:, :, sinks:], prompt.value[:, :, sinks:], prompt.scores[:, :, sinks:]
        between = below(encoded[:, None], key.shape[2])
        chosen = rank.best(scores, encoded, jnp.zeros_like(encoded), 0, important)

        def tier(codec: Codec, mine: Bool[Array, "B K T"], count: Int[Array, "B"], capacity: int) -> Segment:
            rows = rank.in_text_order(mine, min(max(capacity, 1), mine.shape[-1]))
            return prompt.tier(codec, gather(key, rows), gather(value, rows), count, capacity)

        first = tier(method.codec, chosen, important, prompt.shape.first)
        rest = tier(method.rest, between & ~chosen, encoded - important, prompt.shape.rest)
        window = self._begun(prompt.key, prompt.value, prompt.lengths, encoded, sinks, prompt.dtype)
        return LayerCache(first.final(), method, rest, window)  # no more tokens come to the first tier

    def _begun(self, key, value, held: Int[Array, "B"], encoded: Int[Array, "B"], sinks: int, dtype) -> DenseSegment:
        """The window of `held` tokens [B, K, T, H] in text order: exact sinks, and those behind the encoded ones."""
        row = row_numbers(sinks + self.window, axes=3)
        row = jnp.where(row < sinks, row, row + encoded[:, None, None])
        key, value = (gather(x, row).astype(dtype) for x in (key, value))
        return DenseSegment(key, value, held - encoded)

    def has_row(self, layer, position):
        window, tier = layer.flow, _tier(layer)
        encoded = window.capacity - self.first_encoded(layer.method) - self.keeps
        return (window.length + 1 < window.capacity) | (tier.length + encoded <= tier.capacity)

    def take_in(self, layer, query, key, value, position, accept):
        scales = basis.kernel_scales(layer.method.bases, layer.frames, key.shape[0], key.shape[2])
        if scales is None:
            return super().take_in(layer, query, key, value, position, accept)
        key, value = (jnp.swapaxes(x, 1, 2) for x in (key, value))
        layer, turned = self._append(layer, key, value, accept, Rotation(query, *scales))
        return layer, cast(Array, turned)  # None only without a rotation

    def arrive(self, layer, key, value, position, accept, score=0.0):
        return self._append(layer, key, value, accept)[0]

    def _append(
        self, layer: LayerCache, key, value, accept, rotation: Rotation | None = None
    ) -> tuple[LayerCache, Float[Array, "B 1 N H"] | None]:
        """The layer with one more token, and with `rotation` that one's query as it meets the keys held."""
        tier, window = _tier(layer), layer.flow
        new = packed_append(
            key, value, accept, window.key, window.value, window.length, tier.keys, tier.values, tier.length,
            first=self.first_encoded(layer.method), keeps=self.keeps, options=tier.options, rotation=rotation,
        )  # fmt: skip
        tier = dataclasses.replace(tier, keys=new.keys, values=new.values, length=new.length)
        window = DenseSegment(new.window_key, new.window_value, new.window_length)
        changed = {"first": tier} if layer.rest is None else {"rest": tier}
        return dataclasses.replace(layer, flow=window, **changed), new.query

    def newest(self, layer, position):
        return [layer.flow]

    def waiting(self, layer):
        return layer.flow

    def forked(self, layer, count, room):
        # New tokens still come through the window, which starts with what the prompt left in it.
        own = _tier(layer).empty(count, room + layer.flow.capacity)
        window, frames = repeated((layer.flow, layer.frames), count)
        # The prompt's tiers are the prefix; what follows has one tier, its first.
        forks = LayerCache(own, layer.method, flow=window, frames=frames)
        return forks.sharing(layer.tiers, jnp.zeros((count,), jnp.int32))

    def ahead(self, layer, position):
        return layer.flow.capacity - 1 - layer.flow.length

    def behind(self, layer, position):
        return layer.flow.length - self.first_encoded(layer.method)

    def taken_back(self, layer, counts):
        window = dataclasses.replace(layer.flow, length=layer.flow.length - counts)
        return dataclasses.replace(layer, flow=window)


def _tier(layer: LayerCache) -> PackedSegment:
    """The tier that windows are encoded into."""
    return cast(PackedSegment, layer.first if layer.rest is None else layer.rest)  # `Block.check` refuses others
