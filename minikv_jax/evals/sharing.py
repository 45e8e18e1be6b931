"""Which layers of a model may read an earlier layer's keys and values: `minikv calibrate --share`.

KVSharer's search (arXiv 2410.18517): pairs of layers are tried in the order of how unlike their keys and values are,
the most unlike first, which the paper found to lose less than the most like. A pair stays if the model's last hidden
states still point where they did.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from minikv_jax.errors import ConfigError
from minikv_jax.evals.engine import fitted
from minikv_jax.evals.task import Lab
from minikv_jax.evals.texts import passages
from minikv_jax.model import Model, made_into
from minikv_jax.reading import chunk_rows, embed, read_layer
from minikv_jax.sharing import Borrowing

TOKENS = 64  # of a passage, in the paper's search


class Shared(NamedTuple):
    """
    Attributes:
        layers, sources: as `presets.kvsharer` takes them.
        cosine: of the last hidden states with and without, after each pair that stayed.
    """

    layers: tuple[int, ...]
    sources: tuple[int, ...]
    cosine: tuple[float, ...]


class _Read(NamedTuple):
    """What the last layer gave, and the keys and values of all."""

    hidden: Float[Array, "B T D"]
    lent: list[tuple[Array, Array]]


def find(lab: Lab, count: int, threshold: float = 0.5, progress: Callable[[int, int], None] | None = None) -> Shared:
    """Finds `count` layers that lose little by reading an earlier one's keys and values.

    Args:
        lab: the model, and passages of 64 tokens to look at (`Settings.limit`; the paper has 30).
        count: of layers.
        threshold: least cosine of the last hidden states, mean over tokens.
        progress: called with (layers found, count).

    Raises:
        ConfigError: a model that was changed before, more layers than it can share, or too few found.
    """
    model, layers = lab.model, lab.model.config.num_layers
    if made_into(model) is not None:
        raise ConfigError(f"This model's weights were made into {made_into(model)}: give it as it was loaded.")
    if not 0 < count < layers:
        raise ConfigError(f"--share {count}: give from 1 to {layers - 1} of the model's {layers} layers.")
    prompts = [tokens for _, tokens in passages(lab, TOKENS)]
    tokens, lengths = fitted(model, prompts, 0, TOKENS)
    start = _read(model, jnp.asarray(tokens), jnp.asarray(lengths), {})
    unlike = sorted(itertools.combinations(range(layers), 2), key=lambda pair: -_distance(start, *pair))
    chosen: dict[int, int] = {}
    cosines: list[float] = []
    for source, layer in unlike:
        if len(chosen) == count:
            break
        if layer in chosen:
            continue
        tried = _resolved(chosen | {layer: source})
        found = _cosine(_read(model, jnp.asarray(tokens), jnp.asarray(lengths), tried), start)
        if found > threshold:
            chosen = tried
            cosines.append(found)
            if progress is not None:
                progress(len(chosen), count)
    if len(chosen) < count:
        raise ConfigError(
            f"--share {count}: with {len(chosen)} layers no pair more keeps a cosine above {threshold}: give fewer."
        )
    pairs = sorted(chosen.items())
    return Shared(tuple(layer for layer, _ in pairs), tuple(source for _, source in pairs), tuple(cosines))


def _resolved(sources: Mapping[int, int]) -> dict[int, int]:
    """Sources that hold their own: one that reads another itself stands for that one."""

    def root(layer: int) -> int:
        return root(sources[layer]) if layer in sources else layer

    return {layer: root(source) for layer, source in sources.items()}


def _read(model: Model, tokens, lengths, sources: Mapping[int, int]) -> _Read:
    """The model over passages, some of whose layers read others' keys and values."""
    rows = chunk_rows(*tokens.shape)
    x = embed(model, tokens, rows)
    lent, first = [], jnp.zeros_like(lengths)
    for i, layer in enumerate(model.layers):
        if i in sources:
            key, value = lent[sources[i]]
            layer = Borrowing(layer, key, value, first)
        x, key, value, *_ = read_layer(layer, x, lengths, rows, 0, None)
        lent.append((key, value))
    return _Read(x, lent)


def _distance(read: _Read, a: int, b: int) -> float:
    """Of two layers' keys, and of their values, each averaged over passages; the mean of both."""
    return float(np.mean([_norm(x, y) for x, y in zip(read.lent[a], read.lent[b])]))


@jax.jit
def _norm(x: Float[Array, "B T K H"], y: Float[Array, "B T K H"]) -> Float[Array, ""]:
    return jnp.linalg.norm(x.mean(axis=0) - y.mean(axis=0), axis=-1).mean()


def _cosine(read: _Read, other: _Read) -> float:
    """Of the last hidden states, mean over passages and tokens."""
    return float(_aligned(read.hidden, other.hidden))


@jax.jit
def _aligned(x: Float[Array, "B T D"], y: Float[Array, "B T D"]) -> Float[Array, ""]:
    x, y = (z.astype(jnp.float32) for z in (x, y))
    return ((x * y).sum(-1) / (jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1))).mean()
