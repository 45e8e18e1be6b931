"""Reading prompts: a pure function over a model and tokens, one layer at a time.

`params` is a `Llama` or what `nnx.split` makes of one, or any model as `model.py` describes it; all are pytrees and go
through `jax.jit` as they are.
"""

import functools
from collections.abc import Callable, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from minikv_jax import allocate, inputs
from minikv_jax.cache import KVCache, LayerCache, Shape
from minikv_jax.compress import compress, compress_in_pieces, cut
from minikv_jax.config import CacheConfig
from minikv_jax.errors import ConfigError, PromptError
from minikv_jax.latent import Weights
from minikv_jax.model import Model, Params, Sizes, as_model, latent_layer, made_into
from minikv_jax.reading import chunk_rows, embed, logits_at, read_layers, sequences_at_once
from pallas_kernels.two_pass_attention.common import ScoreRows


def bucket(tokens: Int[Array, "B T"], limit: int | None = None) -> Int[Array, "B padded"]:
    """Tokens padded on the right, so that prompts of nearly the same length share one compiled program.

    Lengths are rounded up to an eighth of their power of two, so at most an eighth is padding; what a method keeps
    depends on the true lengths alone. With JAX's persistent cache (`JAX_COMPILATION_CACHE_DIR`) later processes find
    the programs of earlier ones.

    Args:
        tokens: [B, T] token ids.
        limit: pad to no more than this, as what the model's positions leave beside `generated_capacity`.

    Raises:
        PromptError: no whole numbers of shape [B, T].
    """
    ids = inputs.integers(tokens, "tokens", "B T")
    longest = ids.shape[1]
    step = max((1 << max(longest - 1, 1).bit_length() - 1) // 8, 16)
    padded = -(-longest // step) * step
    if limit is not None:
        padded = max(min(padded, limit), longest)
    # NumPy's padding is compiled for no length.
    pad = np.pad if isinstance(ids, np.ndarray) else jnp.pad
    return inputs.on_device(pad(ids, ((0, 0), (0, padded - longest))))


def forward(params: Params, tokens: Int[Array, "B T"], lengths: Int[Array, "B"] | None = None) -> Float[Array, "B T V"]:
    """Next-token logits at every position, without a cache.

    Args:
        params: the model.
        tokens: [B, T] token ids, padded on the right.
        lengths: [B] true lengths; default T.

    Returns:
        float32 logits [B, T, V]; rows of padding are meaningless, and those of a traced sequence whose ids or length
        are out of range are NaN.

    Raises:
        PromptError: ids or lengths out of range, shapes or dtypes that do not fit.
    """
    model = as_model(params)
    ids = inputs.integers(tokens, "tokens", "B T")
    counts = np.full(ids.shape[:1], ids.shape[1], np.int32) if lengths is None else lengths
    tokens, lengths = inputs.token_rows(ids, counts, model.config.vocab_size, least=1)
    rows = chunk_rows(*tokens.shape)
    x = embed(model, tokens, rows)
    unscored = [0] * model.config.num_layers
    for _, after, _ in read_layers(model, x, lengths, rows, unscored, model.config.sliding_window):
        x = after
    return _logits(model, x[:, : tokens.shape[1]], lengths)


@jax.jit
def _logits(model: Model, x: Float[Array, "B T D"], lengths: Int[Array, "B"]) -> Float[Array, "B T V"]:
    return jnp.where((lengths > 0)[:, None, None], model.logits(x), jnp.nan)


def prefill(
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    cache_config: CacheConfig,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Reads prompts and compresses them, one layer at a time: no two layers' full keys and values exist together, nor
    those of more sequences than it takes to fill a device (`sequences_at_once`).

    Pure; works inside `jax.jit` as it is (`cache_config` is static by itself). Outside `jit` it compiles one layer
    and runs it for all, which starts faster.

    Args:
        params: the model.
        tokens: [B, T] token ids, padded on the right.
        lengths: [B] int32 true lengths, 1 <= length <= T.
        cache_config: the method and its capacities.
        progress: called with (layers done, all), of every group of sequences, as they finish; only outside `jit`.

    Returns:
        float32 logits [B, V] of the token after each prompt, and the cache. A traced sequence whose ids or length are
        out of range gets NaN and an empty cache without room.

    Raises:
        PromptError: an empty prompt, or one longer than the cache or the model allows; ids or lengths out of range;
            shapes or dtypes that do not fit.
        ConfigError: a method that this model cannot run.
    """
    model = as_model(params)
    tokens, lengths = inputs.token_rows(tokens, lengths, model.config.vocab_size, least=1)
    cache_config = checked(model, tokens.shape[1], cache_config)
    batch, together = tokens.shape[0], sequences_at_once(*tokens.shape)
    if together == batch:
        return _prefill(model, tokens, lengths, cache_config, progress)
    if isinstance(tokens, Tracer) or isinstance(lengths, Tracer):
        groups = [x.reshape(-1, together, *x.shape[1:]) for x in (tokens, lengths)]
        parts = jax.lax.map(lambda group: _prefill(model, group[0], group[1], cache_config, None), tuple(groups))
        return jax.tree.map(lambda x: x.reshape(batch, *x.shape[2:]), parts)

    parts = []
    for i in range(batch // together):
        group = slice(i * together, (i + 1) * together)
        parts.append(
            _prefill(model, tokens[group], lengths[group], cache_config, _counted_from(progress, i, batch // together))
        )
    return _joined(parts)


def _counted_from(progress: Callable[[int, int], None] | None, group: int, groups: int):
    """What the layers of one group of sequences report to."""
    return None if progress is None else lambda done, layers: progress(group * layers + done, groups * layers)


def _prefill(model: Model, tokens, lengths, cache_config: CacheConfig, progress) -> tuple[Array, KVCache]:
    layers = model.config.num_layers
    largest = Shape.largest(cache_config, layers)
    rows = chunk_rows(*tokens.shape)
    x = embed(model, tokens, rows)
    caches = []
    scored: list[ScoreRows] = [cache_config.of_layer(i).score_rows for i in range(layers)]
    for i, after, attended in read_layers(model, x, lengths, rows, scored, None):
        x = after
        if attended is None:
            continue
        method = cache_config.of_layer(i)
        budget = allocate.budgets(cache_config, i, layers, lengths, tokens.shape[1])
        # Every layer is compressed at the largest layer's capacity and then cut: one program for a whole pyramid.
        static = {"method": method, "dtype": cache_config.dtype}
        cache = compress_in_pieces(*attended, lengths, budget, **static, shape=largest)
        shape = Shape.of(cache_config, i, layers)
        if shape != largest:
            compress_to = functools.partial(compress, **static, shape=shape)
            like = jax.eval_shape(compress_to, *attended, lengths, budget)
            cache = cut(cache, tuple(leaf.shape for leaf in jax.tree.leaves(like)))
        caches.append(cache)
        del attended  # before the next layer makes its own keys and values
        if progress is not None:
            jax.block_until_ready(cache)
            progress(i + 1, layers)
    return opened(logits_at(model, x, lengths - 1), caches, lengths, cache_config)


def opened(
    logits: Float[Array, "B V"], layers: Sequence[LayerCache], lengths: Int[Array, "B"], config: CacheConfig
) -> tuple[Float[Array, "B V"], KVCache]:
    """Logits and cache of prompts; a sequence of which nothing was read has NaN and no room."""
    # The lengths are copied: the cache is made to be donated, a caller's array is not.
    read = lengths > 0
    room = jnp.where(read, jnp.int32(config.generated_capacity), 0)
    cache = KVCache(tuple(layers), jnp.array(lengths), room, jnp.array(lengths), config)
    return jnp.where(read[:, None], logits, jnp.nan), cache


def _joined(parts: list[tuple[Array, KVCache]]) -> tuple[Array, KVCache]:
    """Logits and cache of all sequences. Layer by layer, and `parts` is emptied, so that only one is there twice."""
    caches = [cache for _, cache in parts]
    logits, lengths, room = (
        jnp.concatenate(x) for x in zip(*((logits, cache.lengths, cache.room) for logits, cache in parts))
    )
    config, waiting = caches[0].config, [list(cache.layers) for cache in caches]
    del caches, parts[:]
    layers = [_concatenated([some.pop(0) for some in waiting]) for _ in range(len(waiting[0]))]
    return logits, KVCache(tuple(layers), lengths, room, jnp.array(lengths), config)


@jax.jit
def _concatenated(parts: list):
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


def checked(model: Model, longest: int, config: CacheConfig) -> CacheConfig:
    """The config with its prompt capacity filled in, after every check that needs the model and the `longest` prompt.

    Raises:
        PromptError: a prompt longer than the cache or the model allows.
        ConfigError: a method that this model cannot run.
    """
    if not isinstance(config, CacheConfig):
        raise ConfigError(f"The method is a {type(config).__name__}: give a CacheConfig, as presets.minikv().")
    return checked_sizes(model.config, longest, with_latents_of(model, config))


def with_latents_of(model: Model, config: CacheConfig) -> CacheConfig:
    """The config for the latents that the model's layers give, if they give any.

    Raises:
        ConfigError: weights that are not what the method needs.
    """
    made = made_into(model)
    if made == config.weights:
        layers = [latent_layer(layer) for layer in model.layers]
        return (
            config.with_latents([None if x is None else x.latent for x in layers]) if config.needs_latents else config
        )
    if config.weights is None:
        raise ConfigError(
            f"This model's weights were made into {made}: {config.name} reads the model as it was loaded. Give that, "
            f"or the method {cast(Weights, made).name}."
        )
    raise ConfigError(
        f"{config.name} needs weights made into {config.weights}, this model's are {made or 'as they were loaded'}: "
        "give minikv_jax.models.made.made(params, config.weights)."
    )


def checked_sizes(model: Sizes, longest: int, config: CacheConfig) -> CacheConfig:
    """`checked` for a model of these sizes, of whose weights nothing is asked."""
    config = config.for_prompts(longest)
    total = cast(int, config.prompt_capacity) + config.generated_capacity
    limit = model.max_position_embeddings
    if total > limit:
        raise PromptError(
            f"{config.prompt_capacity} prompt tokens and generated_capacity={config.generated_capacity} make {total}, "
            f"more than the model's {limit} positions: shorten the prompt or lower generated_capacity."
        )
    window = model.sliding_window
    if window is not None and total > window:
        raise ConfigError(
            f"This model attends to the last {window} tokens only; a cache for {total} tokens would need masking by "
            f"position, which compressed rows do not have. Keep prompt and answer within {window} tokens."
        )
    config.check_model(model.head_dim, model.num_layers)
    return config


def empty_cache(params: Params, cache_config: CacheConfig, batch: int) -> KVCache:
    """A cache of `batch` empty slots without room, for `insert`. The config needs its prompt_capacity.

    Raises:
        ConfigError: no prompt_capacity, no slots, a method that this model cannot run.
    """
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), cache_spec(params, cache_config, batch))


def cache_spec(params: Params, cache_config: CacheConfig, batch: int) -> KVCache:
    """Shapes and dtypes of a cache of `batch` sequences: nothing is computed or allocated.

    Raises:
        ConfigError: as `empty_cache`.
    """
    batch = inputs.count(batch, "batch")
    if cache_config.prompt_capacity is None:
        raise ConfigError("An empty cache must know its prompt_capacity: set it in the config.")
    tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return jax.eval_shape(prefill, params, tokens, lengths, cache_config)[1]
