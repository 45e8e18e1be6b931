"""What every inflow answers: how new tokens come into a layer, and what leaves it.

An inflow is a static value of a method. It makes the layer from a prompt, and its own state is `LayerCache.flow`:
`append.py`, `block.py`, `ring.py` and `evict.py` have one each.
"""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from minikv_jax import basis
from minikv_jax.segments import Segment


@dataclasses.dataclass(frozen=True)
class Inflow:
    """The base of all inflows. `layer` is a `cache.LayerCache`, `method` a `config.Method`, `prompt` a `cache.Prompt`.

    Attributes:
        scored: whether each step adds its attention to the scores of the first tier's tokens.
        grows: whether the prompt's tokens stay where they are, so that forks may share them.
        waits: whether a prompt's newest tokens wait outside its tiers, whatever these are.
        stays: why tokens cannot be taken back, in words.
    """

    scored: ClassVar[bool] = False
    grows: ClassVar[bool] = True
    waits: ClassVar[bool] = False
    stays: ClassVar[str] = "they are held for good"

    def check(self, method) -> None:
        """Refuses, by ConfigError, a method that tokens cannot come into in this way."""

    def first_encoded(self, method) -> int:
        """Tokens at a text's start that are never encoded."""
        return 0

    def rows(self, method, kept: int, left: int, total: int, config) -> tuple[int, int]:
        """Rows of the first tier and of the second.

        Args:
            method: the layer's method.
            kept, left: most tokens of a prompt that the first tier keeps, and that it leaves.
            total: the first tier's budget for the longest prompt.
            config: a `CacheConfig` with its capacities.
        """
        raise NotImplementedError

    def begin(self, prompt, method) -> Any:
        """The layer after its prompt."""
        raise NotImplementedError

    def has_row(self, layer, position: Int[Array, "B"]) -> Bool[Array, "B"]:
        """Whether each sequence, which has read `position` tokens, can store one more in the rows there are."""
        raise NotImplementedError

    def take_in(
        self,
        layer,
        query: Float[Array, "B 1 N H"],
        key: Float[Array, "B 1 K R"],
        value: Float[Array, "B 1 K V"],
        position: Int[Array, "B"],
        accept: Bool[Array, "B"],
    ) -> tuple[Any, Float[Array, "B 1 N H"]]:
        """The layer with a token as the model gives it, and the token's query as it meets the keys held."""
        query, key, value = basis.take_in(layer.method.bases, layer.frames, query, key, value)
        key, value = (jnp.swapaxes(x, 1, 2) for x in (key, value))
        return self.arrive(layer, key, value, position, accept), query

    def arrive(
        self,
        layer,
        key: Float[Array, "B K 1 H"],
        value: Float[Array, "B K 1 V"],
        position: Int[Array, "B"],
        accept: Bool[Array, "B"],
        score: Float[Array, "B K"] | float = 0.0,
    ) -> Any:
        """The layer with one more token as it is held, whose score so far is `score`."""
        raise NotImplementedError

    def newest(self, layer, position: Int[Array, "B"]) -> Sequence[Segment]:
        """What to attend to beside the tiers; `position` is that of the newest token."""
        return []

    def add_scores(self, layer, received: Float[Array, "B K S"]) -> Any:
        """The layer whose first tier has just received this attention."""
        return layer

    def settle(self, layer, position: Int[Array, "B"], accept: Bool[Array, "B"]) -> Any:
        """The layer after attention: what has to leave has left."""
        return layer

    def ahead(self, layer, position: Int[Array, "B"]) -> Int[Array, "B"]:
        """Tokens that can come before one is encoded or given up; those that came until then leave no trace."""
        return jnp.zeros_like(position)

    def behind(self, layer, position: Int[Array, "B"]) -> Int[Array, "B"]:
        """Newest tokens that can be taken back, of a layer that has read `position`."""
        return jnp.zeros_like(position)

    def taken_back(self, layer, counts: Int[Array, "B"]) -> Any:
        """The layer without so many of its newest tokens, at most `behind`."""
        return layer

    def waiting(self, layer) -> Any:
        """The dense arrays of the newest tokens, for reports."""
        return None

    def held(self, layer, read: Int[Array, "B"]) -> Int[Array, "B"]:
        """Tokens of its own that each sequence holds, of `read` ones."""
        waiting = self.waiting(layer)
        parts = (*layer.tiers, *([] if waiting is None else [waiting]))
        return functools.reduce(operator.add, (part.length for part in parts))

    def forked(self, layer, count: int, room: int) -> Any:
        """`count` continuations of a layer of one sequence, each with room for so many tokens."""
        return repeated(layer, count)


def repeated(tree: Any, count: int) -> Any:
    """Every array, of one sequence, for `count` of them."""
    return jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), tree)
