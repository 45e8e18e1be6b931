"""Models whose layers cache latents: what LoRC and CSKV do to weights. Pure functions of the params.

    params = lorc(params, least, most)          W_k and W_v become products of low rank; ranks fall with depth
    params = cskv(params, keys, values)         beside W_k and W_v there are products of low rank, for older tokens

A product A B takes what enters attention to a latent (A) and the latent to the keys or values of all heads (B). As it
is made here the rows of B are orthonormal: an error of a latent is one of the same size in what is rebuilt from it.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from minikv_jax.errors import ConfigError
from minikv_jax.latent import CSKV, Latent, LoRC, Weights, rank_of, whole_rank
from minikv_jax.model import Params, as_model, made_into
from minikv_jax.models.llama import Llama, LlamaLayer
from minikv_jax.models.shared import queries_of
from minikv_jax.models.trained import Product, Products, read_products


class LatentLlamaLayer(nnx.Module):
    """A layer that gives latents for its cache, as `minikv_jax.model.LatentLayer` describes it.

    Args:
        layer: the layer as it was; its keys and values too where rows carry them, else its queries alone.
        key, value: the products.
        made: what the model's weights are made into.
        latent: of this layer.
    """

    def __init__(self, layer: LlamaLayer, key: Product, value: Product, made: Weights, latent: Latent):
        config = layer.config
        self.config, self.made, self.latent = config, made, latent
        n, k, h = config.num_heads, config.num_kv_heads, config.head_dim
        dtype = layer.query_key_value[...].dtype

        def param(x, *shape: int) -> nnx.Param:
            return nnx.Param(jnp.asarray(x, dtype).reshape(shape))

        bias = layer.query_key_value_bias[...] if config.query_key_value_bias else np.zeros((n + 2 * k) * h)
        self.layer = layer if latent.exact else queries_of(layer)
        self.down = param(np.concatenate((key.down, value.down), axis=1), config.hidden_size, -1)
        self.key_up, self.value_up = param(key.up, -1, k, h), param(value.up, -1, k, h)
        self.key_bias, self.value_bias = param(bias[n * h : -k * h], k, h), param(bias[-k * h :], k, h)

    def projection(self) -> Float[Array, "N H D"]:
        return self.layer.projection()

    def before_attention(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T 1 R"], Float[Array, "B T 1 V"]]:
        """Queries, rotated, and rows for the cache."""
        normed, n = self.layer.normed(x), self.config.num_heads
        rows = jnp.split(normed @ self.down[...], (self.latent.keys,), axis=-1)
        heads = self.layer.heads(normed)
        if self.latent.exact:
            key, value = jnp.split(heads[:, :, n:], 2, axis=2)
            exact = self.layer.keys(key, positions), value
            rows = (jnp.concatenate((row, y.reshape(*y.shape[:2], -1)), axis=-1) for row, y in zip(rows, exact))
        key, value = (row[:, :, None] for row in rows)
        return self.layer.queries(heads[:, :, :n], positions), key, value

    def exact(
        self, key: Float[Array, "B T R"], value: Float[Array, "B T V"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Keys, rotated, and values: as rows carry them, or rebuilt."""
        if self.latent.exact:
            return self.latent.behind(key, value)
        values = jnp.einsum("btv,vkh->btkh", value, self.value_up[...]) + self.value_bias[...][None, None]
        return self.rebuilt(key, positions), values

    def rebuilt(self, key: Float[Array, "B S R"], positions: Int[Array, "#B S"]) -> Float[Array, "B S K H"]:
        """Keys of latents, rotated."""
        up = self.key_up[...]
        keys = jnp.einsum("bsr,rkh->bskh", key.astype(up.dtype), up) + self.key_bias[...][None, None]
        return self.layer.keys(keys, positions)

    def lifted(self, output: Float[Array, "B T N V"], total: Float[Array, "B T N"]) -> Float[Array, "B T N H"]:
        """Attention over values from attention over latents.

        The output matrix could take latents itself, of N V rows in the place of N H. One product a head before it
        costs fewer weights and operations unless V is below H.
        """
        b, t, n, v = output.shape
        heads = (b, t, self.config.num_kv_heads, -1)
        up, bias = (x[...].astype(jnp.float32) for x in (self.value_up, self.value_bias))
        values = jnp.einsum("btkgv,vkh->btkgh", output.reshape(*heads, v), up)
        values = values + total.reshape(heads)[..., None] * bias[None, None, :, None]
        return values.reshape(b, t, n, -1)

    def after_attention(self, x: Float[Array, "B T D"], attention: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        return self.layer.after_attention(x, attention)


def key_value_weights(layer: LlamaLayer) -> tuple[Float[np.ndarray, "D KH"], Float[np.ndarray, "D KH"]]:
    """W_k and W_v, the columns of all heads side by side, float64."""
    config = layer.config
    weights = np.asarray(layer.query_key_value[...], np.float64)
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return weights[:, queries : queries + keys], weights[:, queries + keys :]


def product(weights: Float[np.ndarray, "D KH"], rank: int, loudness: Float[np.ndarray, "D"] | None = None) -> Product:
    """The product of this rank that is nearest to a matrix.

    Args:
        weights: the matrix.
        rank: R.
        loudness: what errors of each row count (ASVD, arXiv 2312.05821); default all alike.
    """
    scale = np.ones(weights.shape[0]) if loudness is None else loudness
    left, singular, right = np.linalg.svd(weights * scale[:, None], full_matrices=False)
    return Product(left[:, :rank] * singular[:rank] / scale[:, None], right[:rank])


def progressive_ranks(conditions: Sequence[float], least: int, most: int) -> list[int]:
    """LoRC's ranks: the more an error of a layer may be amplified behind it, the higher.

    The cumulative condition number of layer l is the product of those of layers l to the last. Ranks go linearly with
    its logarithm, from `least` in the last layer to `most` in the first, in whole multiples of 16.

    Args:
        conditions: condition numbers of the layers' matrices, above 0.
        least, most: ranks.
    """
    cumulative = np.cumsum(np.log(conditions)[::-1])[::-1]
    lowest, highest = cumulative.min(), cumulative.max()
    place = (cumulative - lowest) / (highest - lowest) if highest > lowest else np.ones_like(cumulative)
    return [whole_rank(float(x), most) for x in least + (most - least) * place]


def lorc(params: Params, least: float, most: float) -> Llama:
    """The model with products of low rank in the place of W_k and W_v (LoRC, arXiv 2410.03111).

    Args:
        params: a Llama.
        least, most: ranks of the last layer and of the first, as shares of K H.

    Returns:
        A model that gives latents. Layers share their other weights with the model given.

    Raises:
        ConfigError: another kind of model; shares out of range.
    """
    model, made = _as_llama(params, "lorc"), LoRC(least, most)
    weights = [key_value_weights(layer) for layer in model.layers]
    width = weights[0][0].shape[1]
    bounds = rank_of(least, width), rank_of(most, width)
    ranks = [progressive_ranks([_condition(x) for x in column], *bounds) for column in zip(*weights)]
    products = [
        Products(product(key, key_rank), product(value, value_rank))
        for (key, value), key_rank, value_rank in zip(weights, *ranks)
    ]
    return with_products(model, products, made)


def _condition(weights: Float[np.ndarray, "D KH"]) -> float:
    """Largest singular value over the smallest that is not rounding."""
    singular = np.linalg.svd(weights, compute_uv=False)
    kept = singular[singular > singular[0] * np.finfo(np.float32).eps * max(weights.shape)]
    return float(kept[0] / kept[-1])


class Seen(NamedTuple):
    """Of what enters a layer's attention, means over tokens.

    Attributes:
        loudness: magnitudes of its channels.
        key, value: second moments of what comes of it, before biases.
    """

    loudness: Float[np.ndarray | Array, "D"]
    key: Float[np.ndarray | Array, "KH KH"]
    value: Float[np.ndarray | Array, "KH KH"]


type Start = Literal["svd", "asvd", "pca"]


def cskv(params: Params, keys: float, values: float, weights: str | None = None) -> Llama:
    """The model with products of low rank beside W_k and W_v (CSKV, arXiv 2409.10593).

    Args:
        params: a Llama.
        keys, values: ranks as shares of K H.
        weights: name of trained ones beside the model; None: by singular values.

    Returns:
        A model whose rows carry latents, and keys and values as they are.

    Raises:
        ConfigError: another kind of model; shares out of range.
        CheckpointError: trained weights that are not there, or of other ranks or another model.
    """
    model, made = _as_llama(params, "cskv"), CSKV(keys, values, weights)
    products = products_of(model, keys, values) if weights is None else read_products(model, made)
    return with_products(model, products, made)


def products_of(
    model: Llama, keys: float, values: float, start: Start = "svd", seen: Sequence[Seen] | None = None
) -> list[Products]:
    """Products of keys and values of each layer, from its weights and, but for "svd", what it has `seen`.

    "asvd" scales channels of what enters by (mean |x| + 1e-6) ** 0.5 (ASVD, arXiv 2312.05821, as CSKV does). "pca"
    takes principal directions of keys and values: no product of this rank has a smaller error on what was seen.
    """
    found = []
    for i, layer in enumerate(model.layers):
        weights = key_value_weights(layer)
        ranks = [rank_of(share, x.shape[1]) for share, x in zip((keys, values), weights)]
        if seen is None or start == "svd":
            pair = [product(x, rank) for x, rank in zip(weights, ranks)]
        elif start == "asvd":
            loudness = np.sqrt(np.asarray(seen[i].loudness) + 1e-6)
            pair = [product(x, rank, loudness) for x, rank in zip(weights, ranks)]
        else:
            moments = seen[i].key, seen[i].value
            pair = [_along(x, moment, rank) for x, moment, rank in zip(weights, moments, ranks)]
        found.append(Products(*pair))
    return found


def _along(weights: Float[np.ndarray, "D KH"], moment: Float[np.ndarray | Array, "KH KH"], rank: int) -> Product:
    """The product whose rows B are the directions of the largest second moments."""
    principal = np.linalg.eigh(np.asarray(moment, np.float64))[1][:, ::-1][:, :rank]
    return Product(weights @ principal, principal.T)


def with_products(model: Llama, products: Sequence[Products], made: Weights) -> Llama:
    """The model whose layers give latents of these products of keys and values."""
    other, config = nnx.clone(model), model.config
    layers = []
    for layer, (key, value) in zip(model.layers, products, strict=True):
        latent = Latent(
            key.up.shape[0], value.up.shape[0], config.num_kv_heads, config.head_dim, exact=isinstance(made, CSKV)
        )
        layers.append(LatentLlamaLayer(layer, key, value, made, latent))
    other.layers = nnx.List(layers)
    return other


def _as_llama(params: Params, name: str) -> Llama:
    model = as_model(params)
    if not isinstance(model, Llama) or made_into(model) is not None:
        raise ConfigError(f"{name} changes the weights of a Llama as `load` gives it, not of a {type(model).__name__}.")
    return model
