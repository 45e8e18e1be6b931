"""What a cache costs: every array it holds against a bfloat16 cache of the same text."""

import dataclasses
import functools
import math
from collections.abc import Hashable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from minikv_jax import allocate
from minikv_jax.basis import Moments
from minikv_jax.cache import KVCache, LayerCache, Readers, Shape, nbytes
from minikv_jax.compress import compress
from minikv_jax.config import CacheConfig, Method
from minikv_jax.errors import ConfigError, shortened
from minikv_jax.models.config import ModelConfig
from minikv_jax.prefill import checked_sizes
from pallas_kernels.packed_decode.layout import BLOCK

_BFLOAT16_BYTES = 2
_MOST_TOKENS = 1 << 22  # budgets are tabulated for every length up to the prompt's: seconds for this one


@dataclasses.dataclass(frozen=True)
class Size:
    """Memory of one layer, or of a whole cache.

    Attributes:
        tokens_kept: of all sequences together, averaged over the layers for a whole cache.
        tokens_read: of all sequences together.
        bytes_tiers: codes, scales and minima of all tiers, their unused room included, which is what papers count, and
            what feedback needs for new keys.
        bytes_window: the dense window.
        bytes_held: everything: tiers, window, scores, balancers, counters.
        bytes_bfloat16: of a cache that keeps every token read in bfloat16.
    """

    tokens_kept: float
    tokens_read: int
    bytes_tiers: int
    bytes_window: int
    bytes_held: int
    bytes_bfloat16: int

    @property
    def bits_per_element(self) -> float:
        """Bits held, whatever for, for each number that a full cache would hold: infinity before a token is read."""
        if not self.bytes_bfloat16:
            return math.inf
        return 8 * _BFLOAT16_BYTES * self.bytes_held / self.bytes_bfloat16

    @property
    def borrowed(self) -> "Size":
        """That of a layer that reads what this one holds."""
        return dataclasses.replace(self, bytes_tiers=0, bytes_window=0, bytes_held=0)

    @property
    def times_smaller(self) -> float:
        return self.bytes_bfloat16 / self.bytes_held


@dataclasses.dataclass(frozen=True)
class CacheReport:
    layers: tuple[Size, ...]
    total: Size


def cache_report(cache: KVCache) -> CacheReport:
    """Sizes of a concrete cache, per layer and in total."""
    read = int(np.sum(jax.device_get(cache.lengths)))
    sizes = [_size(layer, _tokens_kept(layer, cache), read) for layer in cache.layers]
    sources = cache.config.sources(len(sizes))
    held = dict(zip(sorted(set(sources)), sizes))
    layers = [held[source] if source == i else held[source].borrowed for i, source in enumerate(sources)]
    return _report(layers, nbytes(cache))


def planned_report(model: ModelConfig, config: CacheConfig, prompt: int, generated: int) -> CacheReport:
    """Sizes of the cache of one sequence of a model, from shapes alone: nothing is computed or allocated.

    Args:
        model: its sizes; the cache is that of a bfloat16 model.
        config: the method; its capacities are replaced. Of latents whose ranks follow from weights it assumes them.
        prompt, generated: tokens read.

    Raises:
        ConfigError: numbers of tokens that are none or too large to be planned for; a method that the model cannot run.
    """
    for name, tokens in (("prompt", prompt), ("generated", generated)):
        if not isinstance(tokens, int) or not 1 <= tokens <= _MOST_TOKENS:
            raise ConfigError(f"{name}={shortened(tokens)}: give a whole number of tokens, 1 to {_MOST_TOKENS:,}.")
    # A plan may go beyond the model's positions.
    roomy = model.replace(max_position_embeddings=max(model.max_position_embeddings, prompt + generated))
    config = config.replace(prompt_capacity=prompt, generated_capacity=generated)
    latents = (
        None if config.weights is None else config.weights.assumed(model.num_kv_heads, model.head_dim, model.num_layers)
    )
    if latents is not None and config.method.latent is None:
        config = config.with_latents(latents)
    config = checked_sizes(roomy, prompt, config)
    kinds: dict[Hashable, Size] = {}
    sizes = []
    for i in range(model.num_layers):
        own = config.of_layer(i)
        # Only a pyramid tells layers of one method from each other.
        kind = own, i if own.allocation.is_pyramid else 0
        if kind not in kinds:
            kinds[kind] = _planned_size(model, config, i)
        sizes.append(kinds[kind] if config.source(i) == i else kinds[kind].borrowed)
    return _report(sizes, sum(size.bytes_held for size in sizes))


def assumed(model: ModelConfig, config: CacheConfig) -> str | None:
    """What a plan takes for granted that the method leaves to the model's weights, in words; None: nothing."""
    latents = None if config.weights is None else config.weights.assumed(model.num_kv_heads, model.head_dim, 1)
    if latents is None:
        return None
    (first,), width = latents, model.num_kv_heads * model.head_dim
    return f"latents of {first.keys} channels of keys and {first.values} of values in every layer, of {width}"


def _planned_size(model: ModelConfig, config: CacheConfig, i: int) -> Size:
    """What layer `i` weighs with all of its capacity in use."""
    prompt, generated, layers = cast(int, config.prompt_capacity), config.generated_capacity, model.num_layers
    total = int(allocate.budget(config, i, layers, prompt).total)
    method = config.of_layer(i)
    if method.rest is not None:
        kept = prompt + generated
    elif method.inflow.grows:
        kept = min(total, prompt) + generated
    else:
        kept = min(total, prompt + generated)
    layer = planned_layer(method, Shape.of(config, i, layers), model.num_kv_heads, model.head_dim, config.dtype)
    return _size(layer, kept, prompt + generated)


def planned_layer(method: Method, shape: Shape, heads: int, head_size: int, dtype: str | None = None) -> LayerCache:
    """Shapes of a layer's arrays for one sequence of a bfloat16 model."""
    blocks = [-(-rows // BLOCK) * BLOCK for rows in shape]
    rows = shape.first if method.codec.dense else blocks[0]
    first, longer, deeper = _probed(method.program, heads, head_size, dtype)

    def grown(x, more, below):
        steps = [(n, m - n, d - n) for n, m, d in zip(x.shape, more.shape, below.shape)]
        size = [n + (m * (rows - BLOCK) + d * (max(blocks[1], BLOCK) - BLOCK)) // BLOCK for n, m, d in steps]
        return jax.ShapeDtypeStruct(size, x.dtype)

    return jax.tree.map(grown, first, longer, deeper)


@functools.lru_cache(maxsize=512)
def _probed(method: Method, heads: int, head_size: int, dtype: str | None) -> list[LayerCache]:
    """Layers with room for one block, for two in the first tier, for two in the second: sizes are linear in both.

    Tracing takes a tenth of a second or more, and fitting a budget asks for many sizes.
    """

    def array(*shape: int, dtype=jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    widths = (head_size, head_size) if method.latent is None else method.latent.widths
    row_heads = method.row_sizes(heads, head_size)[0]
    key, value = (array(1, BLOCK, row_heads, width) for width in widths)
    scores = array(1, row_heads, BLOCK, dtype=jnp.float32)
    channels = (1, heads, head_size)
    moments = Moments(array(*channels, head_size, dtype=jnp.float32), None)
    of_channels = array(*channels, dtype=jnp.float32)
    readers = Readers(of_channels, of_channels, moments)
    lengths = array(1, dtype=jnp.int32)

    def layer_of(*rows: int):
        make = functools.partial(compress, method=method, shape=Shape(*rows), dtype=dtype)
        return jax.eval_shape(make, key, value, scores, readers, lengths, allocate.Budget(lengths, lengths))

    return [layer_of(BLOCK, BLOCK), layer_of(2 * BLOCK, BLOCK), layer_of(BLOCK, 2 * BLOCK)]


def _report(layers: list[Size], bytes_held: int) -> CacheReport:
    total = Size(
        tokens_kept=float(np.mean([layer.tokens_kept for layer in layers])),
        tokens_read=layers[0].tokens_read,
        bytes_tiers=sum(layer.bytes_tiers for layer in layers),
        bytes_window=sum(layer.bytes_window for layer in layers),
        bytes_held=bytes_held,
        bytes_bfloat16=sum(layer.bytes_bfloat16 for layer in layers),
    )
    return CacheReport(tuple(layers), total)


def _size(layer: LayerCache, tokens_kept: int, read: int) -> Size:
    heads, head_size = layer.of_model
    tiers = (*layer.prefix, *layer.tiers)
    return Size(
        tokens_kept=tokens_kept,
        tokens_read=read,
        bytes_tiers=nbytes([tier.stored for tier in tiers]),
        bytes_window=nbytes(layer.method.inflow.waiting(layer)),
        bytes_held=nbytes(layer),
        bytes_bfloat16=2 * read * heads * head_size * _BFLOAT16_BYTES,
    )


def _tokens_kept(layer: LayerCache, cache: KVCache) -> int:
    own = int(np.sum(jax.device_get(layer.method.inflow.held(layer, cache.lengths))))
    # Every sequence keeps the tokens of the prefix that it shares.
    lengths, which = jax.device_get(([part.length for part in layer.prefix], layer.prefix_of))
    return own + sum(int(np.where(which < 0, 0, x[which]).sum()) for x in lengths)
