"""TOVA's inflow (arXiv 2401.06104, section 3): each step gives up the token that its query attends to least."""

import dataclasses

from minikv_jax.evict import Evict


@dataclasses.dataclass(frozen=True)
class Tova(Evict):
    """`Evict` whose scores are the attention of the newest query alone: nothing is remembered of earlier ones."""

    def add_scores(self, layer, received):
        return dataclasses.replace(layer, flow=dataclasses.replace(layer.flow, scores=received))
