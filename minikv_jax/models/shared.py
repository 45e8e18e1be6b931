"""KVSharer's model (arXiv 2410.18517): some layers give queries alone, and read an earlier layer's keys and values."""

from collections.abc import Sequence

from flax import nnx
from jaxtyping import Array, Float, Int

from minikv_jax.errors import ConfigError
from minikv_jax.model import Params, as_model, made_into
from minikv_jax.models.llama import Llama, LlamaLayer
from minikv_jax.sharing import KVSharer


class SharingLlamaLayer(nnx.Module):
    """A layer without keys and values, as `minikv_jax.model.SharingLayer` describes it.

    Args:
        layer: the layer as it was, whose queries and all that follows attention it keeps.
        made: what the model's weights are made into.
        source: the layer that it reads.
    """

    def __init__(self, layer: LlamaLayer, made: KVSharer, source: int):
        self.config, self.made, self.source = layer.config, made, source
        self.layer = queries_of(layer)

    def projection(self) -> Float[Array, "N H D"]:
        return self.layer.projection()

    def before_attention(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T 0 H"], Float[Array, "B T 0 H"]]:
        """Queries, and keys and values of no head."""
        query = self.layer.queries(self.layer.heads(self.layer.normed(x)), positions)
        return query, query[:, :, :0], query[:, :, :0]

    def after_attention(self, x: Float[Array, "B T D"], attention: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        return self.layer.after_attention(x, attention)


def queries_of(layer: LlamaLayer) -> LlamaLayer:
    """The layer whose first product is of queries alone."""
    config = layer.config
    columns, cut = config.num_heads * config.head_dim, nnx.clone(layer)
    cut.query_key_value = nnx.Param(layer.query_key_value[...][:, :columns])
    if config.query_key_value_bias:
        cut.query_key_value_bias = nnx.Param(layer.query_key_value_bias[...][:columns])
    return cut


def kvsharer(params: Params, layers: Sequence[int], sources: Sequence[int]) -> Llama:
    """The model some of whose layers read the keys and values of earlier ones (KVSharer, arXiv 2410.18517).

    Args:
        params: a Llama.
        layers: those that hold nothing; `minikv calibrate --share` finds some that lose little.
        sources: the earlier layer that each of them reads.

    Returns:
        A model that shares its other weights with the one given. The matrices of keys and values are gone from
        `layers`.

    Raises:
        ConfigError: another kind of model, layers that it does not have, a source that is itself one of `layers`.
    """
    model, made = as_model(params), KVSharer(tuple(layers), tuple(sources))
    if not isinstance(model, Llama) or made_into(model) is not None:
        raise ConfigError(f"kvsharer changes a Llama as `load` gives it, not a {type(model).__name__} changed before.")
    beyond = [layer for layer in made.layers if layer >= len(model.layers)]
    if beyond:
        raise ConfigError(f"layers={beyond}: this model has {len(model.layers)} layers, counted from 0.")
    other, given = nnx.clone(model), enumerate(model.layers)
    sharing = dict(zip(made.layers, made.sources))
    kept: list = [SharingLlamaLayer(layer, made, sharing[i]) if i in sharing else layer for i, layer in given]
    other.layers = nnx.List(kept)
    return other
