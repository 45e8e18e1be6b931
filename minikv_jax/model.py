"""What a whole model must answer for `prefill`, `decode_step`, `extend` and all that is built on them.

A model is a pytree with these attributes; `models/llama.py` has ours. To use a cache inside a model of one's own,
`layer.py` needs nothing of this.
"""

import itertools
from collections.abc import Sequence
from typing import Any, Protocol, cast, runtime_checkable

from jaxtyping import Array, Float, Int

from minikv_jax.errors import ConfigError
from minikv_jax.latent import Latent, Weights


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
class LatentLayer(Layer, Protocol):
    """A layer that caches latents: what `before_attention` gives for keys and values are rows of one head.

    A row of keys is a latent, and behind it, where `latent.exact`, the key of every head as it is, rotated; likewise
    of values. Attention over values is lifted before `after_attention` takes it.
    """

    @property
    def latent(self) -> Latent: ...
    @property
    def made(self) -> Weights:
        """What the model's weights were made into."""
        ...

    def exact(
        self, key: Float[Array, "B T _"], value: Float[Array, "B T _"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Keys, rotated, and values that tokens of a prompt attend to, from their rows."""
        ...

    def rebuilt(self, key: Float[Array, "B S R"], positions: Int[Array, "#B S"]) -> Float[Array, "B S K H"]:
        """Keys of latents, rotated."""
        ...

    def lifted(self, output: Float[Array, "B T N V"], total: Float[Array, "B T N"]) -> Float[Array, "B T N H"]:
        """What attention over values would give, from attention over their latents whose weights sum to `total`."""
        ...


@runtime_checkable
class SharingLayer(Layer, Protocol):
    """A layer that reads an earlier layer's keys and values: its `before_attention` gives queries alone."""

    @property
    def source(self) -> int:
        """The earlier layer, one that holds its own."""
        ...

    @property
    def made(self) -> Weights:
        """What the model's weights were made into."""
        ...


def sharing_layer(layer: Layer) -> SharingLayer | None:
    """The layer, if it holds no keys and values."""
    return layer if isinstance(layer, SharingLayer) else None


def owners(model: "Model") -> list[int]:
    """The layers that hold keys and values, in the order of a cache's."""
    return [i for i, layer in enumerate(model.layers) if sharing_layer(layer) is None]


def made_into(model: "Model") -> Weights | None:
    """What the model's weights were made into; None: they are as they were loaded."""
    changed = (latent_layer(layer) or sharing_layer(layer) for layer in model.layers)
    return next((layer.made for layer in changed if layer is not None), None)


def latent_layer(layer: Layer) -> LatentLayer | None:
    """The layer, if it caches latents."""
    return layer if isinstance(layer, LatentLayer) else None


def attended(
    layer: Layer, key: Float[Array, "B T _ _"], value: Float[Array, "B T _ _"], positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Keys and values that tokens of a prompt attend to, from what `before_attention` gave for the cache."""
    own = latent_layer(layer)
    return (key, value) if own is None else own.exact(key[:, :, 0], value[:, :, 0], positions)


def row_sizes(layer: Layer) -> tuple[int, int, int]:
    """Heads of the rows that `before_attention` gives, and their sizes in keys and in values."""
    own, config = latent_layer(layer), layer.config
    return (config.num_kv_heads, config.head_dim, config.head_dim) if own is None else (1, *own.latent.widths)


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
