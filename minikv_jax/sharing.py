"""KVSharer (arXiv 2410.18517): some layers read an earlier layer's keys and values, and hold none of their own.

A model whose layers do so (`model.SharingLayer`) gives their queries alone, so its cache has a `LayerCache` for each of
the other layers. While a prompt is read, `Borrowing` hands the earlier layer's keys and values on.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minikv_jax.checks import check_types, require


@dataclasses.dataclass(frozen=True)
class KVSharer:
    """KVSharer's model: `models.shared.kvsharer` makes it.

    Attributes:
        layers: those that hold nothing.
        sources: the earlier layer that each of them reads; one that holds its own.
    """

    name: ClassVar[str] = "kvsharer"
    layers: tuple[int, ...]
    sources: tuple[int, ...]

    def __post_init__(self):
        check_types(self)
        pairs = [*zip(self.layers, self.sources)]
        require(
            len(self.layers) == len(self.sources) and len(set(self.layers)) == len(self.layers),
            f"layers={self.layers} and sources={self.sources}: give each layer once, and one source for each.",
        )
        wrong = [(layer, source) for layer, source in pairs if not 0 <= source < layer or source in self.layers]
        require(
            not wrong,
            f"layers and their sources {wrong}: a source lies before its layer, and holds keys and values of its own.",
        )

    def source(self, layer: int) -> int:
        """The layer whose keys and values a layer reads; its own for most."""
        return dict(zip(self.layers, self.sources)).get(layer, layer)

    def assumed(self, heads: int, head_size: int, layers: int) -> None:
        """No layer's rows are other than a model's own."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Borrowing:
    """A sharing layer beside what it reads: to whoever reads a prompt it looks like any other layer.

    Attributes:
        layer: the `model.SharingLayer`.
        key, value: of its source, rotated.
        first: position of the first of them, of each sequence.
    """

    layer: Any
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K H"]
    first: Int[Array, "B"]

    @property
    def config(self) -> Any:
        return self.layer.config

    def projection(self) -> Float[Array, "N H D"] | None:
        return self.layer.projection()

    def before_attention(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        rows = (positions - self.first[:, None])[..., None, None]
        key, value = (jnp.take_along_axis(y, rows, axis=1, mode="clip") for y in (self.key, self.value))
        return self.layer.before_attention(x, positions)[0], key, value

    def after_attention(self, x: Float[Array, "B T D"], attention: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        return self.layer.after_attention(x, attention)
