"""TOVA's inflow (arXiv 2401.06104, section 3): each step gives up the token that its query attends to least."""

import dataclasses

import jax.numpy as jnp

from minikv_jax.evict import Evict


@dataclasses.dataclass(frozen=True)
class Tova(Evict):
    """`Evict` whose scores are the attention of the newest query alone: nothing is remembered of earlier ones."""

    def add_scores(self, layer, received):
        # A sequence that takes no part in the step has given no attention, and its scores stay.
        asked = (received > 0).any(axis=(1, 2), keepdims=True)
        scores = jnp.where(asked, received, layer.flow.scores)
        return dataclasses.replace(layer, flow=dataclasses.replace(layer.flow, scores=scores))
