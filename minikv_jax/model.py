"""What a whole model must answer for `prefill`, `decode_step`, `extend` and all that is built on them.

A model is a pytree with these attributes; `models/llama.py` has ours. To use a cache inside a model of one's own,
`layer.py` needs nothing of this.
"""

import itertools
from collections.abc import Sequence
from typing import Any, Protocol, cast, runtime_checkable

from jaxtyping import Array, Float, Int

from minikv_jax.errors import ConfigError


class Sizes(Protocol):
    """A model's sizes and end tokens, which nothing changes."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def sliding_window(self) -> int | None: ...
    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """What ends an answer, where that is evaluated; may be none."""
        ...


@runtime_checkable
class Layer(Protocol):
    """One decoder layer: what it does on either side of attention."""

    @property
    def config(self) -> Sizes: ...

    def projection(self) -> Float[Array, "N H D"] | None:
        """What `after_attention` multiplies each head's attention by, for methods that weigh errors by it; None where
        there is no such thing."""
        ...

    def before_attention(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Query, key and value of every token, query and key with rotary embedding."""
        ...

    def after_attention(self, x: Float[Array, "B T D"], attention: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        """The layer's result."""
        ...


@runtime_checkable
class Model(Protocol):
    """A decoder-only transformer."""

    @property
    def config(self) -> Sizes: ...
    @property
    def layers(self) -> Sequence[Layer]: ...

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """What the first layer takes; ids outside the vocabulary may give anything."""
        ...

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """float32 logits of what the last layer gave."""
        ...


type Params = Model | tuple[Any, Any]


def as_model(params: Any) -> Model:
    """The model: as it is, or merged from the graph definition and state that `nnx.split` made of it.

    Raises:
        ConfigError: neither of both.
    """
    if isinstance(params, tuple | list) and len(params) == 2:
        from flax import nnx  # a model of another kind needs no flax

        if isinstance(params[0], nnx.GraphDef):
            return nnx.merge(*params)
    _require(params, "model", ("config", "layers", "embed", "logits"))
    model = cast(Model, params)
    for layer in itertools.islice(model.layers, 1):  # callers come here at every step
        _require(layer, "model's layer", ("config", "projection", "before_attention", "after_attention"))
    return model


def _require(given: Any, what: str, names: tuple[str, ...]) -> None:
    missing = [name for name in names if not hasattr(given, name)]
    if missing:
        raise ConfigError(
            f"The {what} is a {type(given).__name__} without {', '.join(missing)}: give a Llama, as `load` does, "
            "nnx.split(model), or a model as minikv_jax.model describes it."
        )
