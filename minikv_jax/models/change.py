"""Other weights of the same function: what a cache must not depend on, and quantised caches often do.

Queries and keys of a head meet in their product alone, and values reach the output through a matrix: both may be held
in other coordinates without a change of any logit. Training picks one of these models by accident.
"""

import os
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Float

from minikv_jax.models import Progress, load
from minikv_jax.models.llama import Llama, LlamaLayer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_LARGEST = 8.0  # scales are drawn from 1 / 8 to 8, evenly in their logarithm


def changed(model: Llama, seed: int) -> Llama:
    """A model that answers as `model` does, up to rounding, whose keys and values have other coordinates.

    Of each key/value head every rotary pair of channels (i, i + H / 2) is scaled, keys by s and queries by 1 / s, and
    both are turned by one angle, which commutes with rotary embedding; where queries and keys are normalised, the norms
    (whose weights all heads share) take one draw of scales. Values are multiplied by a random rotation and then each
    channel by a scale; the inverse of both goes into the output projection.

    Args:
        model: left as it is.
        seed: of all that is drawn.
    """
    rng = np.random.default_rng(seed)
    other = nnx.clone(model)
    for layer in other.layers:
        _change_layer(layer, rng)
    return other


def load_changed(
    path_or_name: str | os.PathLike[str], dtype: DTypeLike | None, seed: int, progress: Progress | None = None
) -> "tuple[Llama, PreTrainedTokenizerFast]":
    """`models.load`, and of the model what `changed` draws."""
    model, tokenizer = load(path_or_name, dtype, progress)
    return changed(model, seed), tokenizer


def _change_layer(layer: LlamaLayer, rng: np.random.Generator) -> None:
    config = layer.config
    n, k, h = config.num_heads, config.num_kv_heads, config.head_dim
    drawn = [(_pairs(rng, h), _values(rng, h)) for _ in range(k)]
    scales, turns = zip(*(pairs for pairs, _ in drawn), strict=True)
    if config.query_key_norm:
        _times(layer.key_norm, scales[0])
        _times(layer.query_norm, 1 / scales[0])
        scales, turns = [np.ones(h)] * k, [np.eye(h)] * k
    of_keys = [scale * turn for scale, turn in zip(scales, turns, strict=True)]
    of_queries = [turn / scale for scale, turn in zip(scales, turns, strict=True)]
    of_values = [matrix for _, matrix in drawn]
    group = n // k
    blocks = np.stack([*np.repeat(of_queries, group, axis=0), *of_keys, *of_values])  # [N + 2 K, H, H]

    def times_blocks(param: nnx.Param) -> None:
        x = np.asarray(param[...], np.float64).reshape(-1, n + 2 * k, h)
        y = np.einsum("dnh,nhi->dni", x, blocks).reshape(param[...].shape)
        param[...] = jnp.asarray(y, param[...].dtype)

    times_blocks(layer.query_key_value)
    if config.query_key_value_bias:
        times_blocks(layer.query_key_value_bias)
    back = np.repeat(np.linalg.inv(of_values), group, axis=0)  # [N, H, H]
    output = np.asarray(layer.output[...], np.float64).reshape(n, h, -1)
    output = np.einsum("nhi,nid->nhd", back, output).reshape(layer.output[...].shape)
    layer.output[...] = jnp.asarray(output, layer.output[...].dtype)


def _times(param: nnx.Param, scale: Float[np.ndarray, "H"]) -> None:
    param[...] = jnp.asarray(np.asarray(param[...], np.float64) * scale, param[...].dtype)


def _scales(rng: np.random.Generator, count: int) -> Float[np.ndarray, "count"]:
    return np.exp(rng.uniform(-np.log(_LARGEST), np.log(_LARGEST), count))


def _pairs(rng: np.random.Generator, h: int) -> tuple[Float[np.ndarray, "H"], Float[np.ndarray, "H H"]]:
    """Scales of the channels, and the turn of each pair, for rows times this matrix."""
    scale, angle = np.tile(_scales(rng, h // 2), 2), rng.uniform(0, 2 * np.pi, h // 2)
    cos, sin = np.diag(np.cos(angle)), np.diag(np.sin(angle))
    return scale, np.block([[cos, sin], [-sin, cos]])


def _values(rng: np.random.Generator, h: int) -> Float[np.ndarray, "H H"]:
    rotation, triangle = np.linalg.qr(rng.normal(size=(h, h)))
    return rotation * np.sign(np.diag(triangle)) * _scales(rng, h)
