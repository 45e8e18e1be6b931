"""Reading prompts: a pure function over a model and tokens, and the pieces it is made of, one layer at a time.

`params` is a `Llama` or what `nnx.split` makes of one; both are pytrees and go through `jax.jit` as they are.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from minikv_jax import allocate, inputs
from minikv_jax.cache import KVCache, LayerCache, QueryStatistics, Shape, compress
from minikv_jax.config import CacheConfig
from minikv_jax.errors import ConfigError, PromptError
from minikv_jax.models.llama import Llama, LlamaLayer, Params, as_model
from minikv_jax.segments import group_size
from pallas_kernels import two_pass_attention
from pallas_kernels.rows import row_numbers

# Rows of all sequences together that a layer works on at once, outside of attention: what bounds MLP activations.
# Enough for the products to run at full rate.
_ROWS = 4096
# Rows of all sequences together whose queries and attention exist at once, 512 MiB for 4096 channels: few calls of
# attention, for each reads all keys before it, yet no more memory than the weights' tenth that a peak may have.
_ATTENDED_ROWS = 1 << 15
# Numbers of a layer's keys that are compressed at once.
_COMPRESSED = 1 << 26


class Chunks(NamedTuple):
    """Rows of each sequence that are worked on at once, by one call of attention and by the products around it."""

    attention: int
    products: int


def chunk_rows(batch: int, tokens: int) -> Chunks:
    """The rows of a [batch, tokens] prompt to work on at once: all, or even shares.

    Products take a multiple of 128 rows, attention a multiple of what products take.
    """
    products, attention = (max(most // batch // 128, 1) * 128 for most in (_ROWS, _ATTENDED_ROWS))
    if tokens <= products:
        return Chunks(tokens, tokens)
    share = -(-tokens // -(-tokens // attention))
    pieces = -(-share // products)
    products = -(-share // pieces // 128) * 128
    return Chunks(pieces * products, products)


def read_layer(
    layer: LlamaLayer,
    x: Float[Array, "B T D"],
    lengths: Int[Array, "B"],
    rows: Chunks,
    score_rows: int | str,
    sliding_window: int | None,
) -> tuple[Array, Array, Array, Array, QueryStatistics]:
    """One layer over the whole prompt. Jitted on its own: called outside `jit`, it compiles once for all layers.

    x is donated, except while a gradient is traced, which needs it again.

    One chunk is one piece of work; of more, each chunk's result takes its rows' place in x. Nothing but keys, values, x
    and scores is ever as long as the prompt.

    Args:
        layer: the layer.
        x: [B, T, D] what the layer before gave, a whole number of chunks as from `embed`.
        lengths: [B] true lengths; rows behind them are padding.
        rows: of `chunk_rows`.
        score_rows: "all", or the last so many queries of each sequence, whose attention is summed.
        sliding_window: keys that a query sees, None for all before it.

    Returns:
        x after the layer, and what `compress_layer` takes: keys and values [B, T, K, H], scores [B, K, T] in float32
        and the queries' statistics.
    """
    read = _read_layer if isinstance(x, jax.core.Tracer) else _read_layer_in_place
    return read(layer, x, lengths, rows, score_rows, sliding_window)


def _read_whole_layer(layer: LlamaLayer, x, lengths, rows: Chunks, score_rows, sliding_window):
    if rows.products < x.shape[1]:
        return _read_layer_in_chunks(layer, x, lengths, rows, score_rows, sliding_window)
    positions = jnp.broadcast_to(row_numbers(x.shape[1], axes=2), x.shape[:2])
    query, key, value = layer.before_attention(x, positions)
    attention, scores, _ = two_pass_attention(
        query,
        key,
        value,
        query_lengths=lengths,
        key_value_lengths=lengths,
        score_rows=score_rows,
        sliding_window=sliding_window,
    )
    counted = positions < lengths[:, None]
    queries = QueryStatistics.of(query, key.shape[2], counted)
    return layer.after_attention(x, attention), key, value, scores, queries


_STATIC = ("rows", "score_rows", "sliding_window")
_read_layer = jax.jit(_read_whole_layer, static_argnames=_STATIC)
_read_layer_in_place = jax.jit(_read_whole_layer, static_argnames=_STATIC, donate_argnames="x")


def _read_layer_in_chunks(layer: LlamaLayer, x, lengths, rows: Chunks, score_rows, sliding_window):
    b, tokens, _ = x.shape
    config = layer.config
    heads, head_size = config.num_kv_heads, config.head_dim
    pieces = _starts(rows.attention, rows.products)

    def rows_of(whole, start):
        return jax.lax.dynamic_slice_in_dim(whole, start, rows.products, axis=1)

    def put(whole, part, start):
        return jax.lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), start, axis=1)

    def attend(query, key, value, first, counts, score_rows):
        # Keys after a chunk's rows are zeros so far, and causal attention does not look at them.
        return two_pass_attention(
            query,
            key,
            value,
            query_lengths=counts,
            query_offset=jnp.broadcast_to(first, (b,)).astype(jnp.int32),
            score_rows=score_rows,
            sliding_window=sliding_window,
        )

    def chunk(state, first):
        x, key, value, scores, queries = state

        def before(state, start):
            query, key, value, queries = state
            positions = jnp.broadcast_to(first + start + row_numbers(rows.products, axes=2), (b, rows.products))
            present = positions < lengths[:, None]
            new = layer.before_attention(rows_of(x, first + start), positions)
            queries = queries.join(QueryStatistics.of(new[0], heads, present))
            # Zeros instead of padding: the attention then needs no lengths of keys, and makes no cleaned copy.
            new = [jnp.where(present[..., None, None], y, 0) for y in new]
            key, value = (put(whole, y, first + start) for whole, y in zip((key, value), new[1:]))
            return (put(query, new[0], start), key, value, queries), None

        query = jnp.zeros_like(x, shape=(b, rows.attention, config.num_heads, head_size))
        (query, key, value, queries), _ = jax.lax.scan(before, (query, key, value, queries), pieces)
        counts = jnp.clip(lengths - first, 0, rows.attention)
        attention, received, _ = attend(query, key, value, first, counts, "all" if score_rows == "all" else 0)

        def after(x, start):
            part = layer.after_attention(rows_of(x, first + start), rows_of(attention, start))
            return put(x, part, first + start), None

        x, _ = jax.lax.scan(after, x, pieces)
        return (x, key, value, scores + received, queries), None

    last = score_rows not in ("all", 0)
    if last:  # each sequence's last rows may lie in different chunks: they are asked on their own, when all keys exist
        first = jnp.maximum(lengths - score_rows, 0)
        positions = first[:, None] + row_numbers(score_rows, axes=2)
        their_x = jnp.take_along_axis(x, positions[..., None], axis=1, mode="clip")
        their_query, _, _ = layer.before_attention(their_x, positions)

    empty = jnp.zeros_like(x, shape=(b, tokens, heads, head_size))
    none = functools.partial(jnp.zeros_like, x, jnp.float32)
    queries = QueryStatistics(none((b, heads, head_size)), none((b, heads, head_size, head_size)))
    state = x, empty, empty, none((b, heads, tokens)), queries
    (x, key, value, scores, queries), _ = jax.lax.scan(chunk, state, _starts(tokens, rows.attention))
    if last:
        _, scores, _ = attend(their_query, key, value, first, jnp.minimum(lengths, score_rows), "all")
    return x, key, value, scores, queries


@functools.partial(jax.jit, static_argnames=("config", "shape", "at_once"))
def compress_layer(key, value, scores, queries, lengths, budget, config, shape, at_once=_COMPRESSED) -> LayerCache:
    """`compress`, for long prompts sequence by sequence and some heads at a time: it ranks and casts what it is given.

    Arguments are those of `cache.compress`; `at_once` bounds the numbers of the keys in one piece of work.
    """
    arrays = key, value, scores, queries
    b, tokens, heads, head_size = key.shape
    if config.keeps_all_as_it_is:  # one pass over each
        return compress(*arrays, lengths, budget, config=config, shape=shape)

    def some_heads(arrays, lengths, budget):
        together = max(at_once // (arrays[0].shape[0] * tokens * head_size), 1)
        # Q-Hitter's mix looks at all heads of a layer.
        if together >= heads or config.rank.attention_weight < 1:
            return compress(*arrays, lengths, budget, config=config, shape=shape)
        together = _even_share(heads, together)

        def one(first):
            def some(x, axis):
                return jax.lax.dynamic_slice_in_dim(x, first, together, axis)

            key, value = (some(x, 2) for x in arrays[:2])
            scores, queries = jax.tree.map(lambda x: some(x, 1), arrays[2:])
            return compress(key, value, scores, queries, lengths, budget, config=config, shape=shape)

        # What has heads has them second; the rest is the same for all of them.
        parts = jax.lax.map(one, _starts(heads, together))
        return jax.tree.map(lambda x: _joined_heads(x) if x.ndim > 2 else x[0], parts)

    if b == 1 or key.size <= at_once:
        return some_heads(arrays, lengths, budget)

    def one_sequence(arguments):
        return some_heads(*jax.tree.map(lambda x: x[None], arguments))

    caches = jax.lax.map(one_sequence, (arrays, lengths, budget))
    return jax.tree.map(lambda x: x[:, 0], caches)


def _starts(size: int, step: int) -> Int[Array, "pieces"]:
    return jnp.arange(0, size, step, dtype=jnp.int32)


def _joined_heads(x):
    """[parts, B, K, ...] -> [B, parts K, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


@functools.partial(jax.jit, static_argnames=("like",))
def _shrink(layer: LayerCache, like) -> LayerCache:
    """The layer's arrays cut to the shapes of `like`."""
    leaves, structure = jax.tree.flatten(layer)
    return jax.tree.unflatten(structure, [x[tuple(slice(n) for n in shape)] for x, shape in zip(leaves, like)])


@functools.partial(jax.jit, static_argnames="rows")
def embed(model: Llama, tokens: Int[Array, "B T"], rows: Chunks) -> Float[Array, "B padded D"]:
    """Embeddings of [B, T] tokens, padded to whole chunks."""
    return model.embed(jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % rows.attention))))


@jax.jit
def logits_at(model: Llama, x: Float[Array, "B T D"], index: Int[Array, "B"]) -> Float[Array, "B V"]:
    """float32 next-token logits of each sequence at its row `index` of the last layer's x."""
    last = jnp.take_along_axis(x, index[:, None, None], axis=1, mode="clip")
    return model.logits(last)[:, 0]


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
    tokens = inputs.integers(tokens, "tokens", "B T")
    longest = tokens.shape[1]
    step = max((1 << max(longest - 1, 1).bit_length() - 1) // 8, 16)
    padded = -(-longest // step) * step
    if limit is not None:
        padded = max(min(padded, limit), longest)
    # NumPy's padding is compiled for no length.
    pad = np.pad if isinstance(tokens, np.ndarray) else jnp.pad
    return inputs.on_device(pad(tokens, ((0, 0), (0, padded - longest))))


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
    tokens = inputs.integers(tokens, "tokens", "B T")
    lengths = np.full(tokens.shape[:1], tokens.shape[1], np.int32) if lengths is None else lengths
    tokens, lengths = inputs.token_rows(tokens, lengths, model.config.vocab_size, least=1)
    rows = chunk_rows(*tokens.shape)
    x = embed(model, tokens, rows)
    for layer in model.layers:
        x, *_ = read_layer(layer, x, lengths, rows, score_rows=0, sliding_window=model.config.sliding_window)
    return _logits(model, x[:, : tokens.shape[1]], lengths)


@jax.jit
def _logits(model: Llama, x: Float[Array, "B T D"], lengths: Int[Array, "B"]) -> Float[Array, "B T V"]:
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
    if isinstance(tokens, jax.core.Tracer) or isinstance(lengths, jax.core.Tracer):
        groups = [x.reshape(-1, together, *x.shape[1:]) for x in (tokens, lengths)]
        parts = jax.lax.map(lambda group: _prefill(model, *group, cache_config, None), tuple(groups))
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


def sequences_at_once(batch: int, tokens: int) -> int:
    """Sequences of a [batch, tokens] prompt that are read through all layers before others: as many as fill one call of
    attention. Hidden states of more would only wait for their turn, two bytes a channel of every token."""
    return _even_share(batch, max(min(_ATTENDED_ROWS // max(tokens, 1), batch), 1))


def _even_share(count: int, most: int) -> int:
    """The largest divisor of `count` up to `most`: shares of one size need one program."""
    return next(n for n in range(most, 0, -1) if count % n == 0)


def _prefill(model: Llama, tokens, lengths, cache_config: CacheConfig, progress) -> tuple[Array, KVCache]:
    layers = model.config.num_layers
    largest = Shape.largest(cache_config, layers)
    rows = chunk_rows(*tokens.shape)
    x = embed(model, tokens, rows)
    caches = []
    for i, layer in enumerate(model.layers):
        config = cache_config.of_layer(i)
        x, *attended = read_layer(layer, x, lengths, rows, score_rows=config.score_rows, sliding_window=None)
        budget = allocate.budgets(cache_config, i, layers, lengths, tokens.shape[1])
        # Every layer is compressed at the largest layer's capacity and then cut: one program for a whole pyramid.
        cache = compress_layer(*attended, lengths, budget, config=config, shape=largest)
        shape = Shape.of(cache_config, i, layers)
        if shape != largest:
            compress_to = functools.partial(compress, config=config, shape=shape)
            like = jax.eval_shape(compress_to, *attended, lengths, budget)
            cache = _shrink(cache, tuple(leaf.shape for leaf in jax.tree.leaves(like)))
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
    return jnp.where(read[:, None], logits, jnp.nan), KVCache(tuple(layers), jnp.array(lengths), room, config)


def _joined(parts: list[tuple[Array, KVCache]]) -> tuple[Array, KVCache]:
    """Logits and cache of all sequences. Layer by layer, and `parts` is emptied, so that only one is there twice."""
    caches = [cache for _, cache in parts]
    logits, lengths, room = (
        jnp.concatenate(x) for x in zip(*((logits, cache.lengths, cache.room) for logits, cache in parts))
    )
    config, waiting = caches[0].config, [list(cache.layers) for cache in caches]
    del caches, parts[:]
    layers = [_concatenated([some.pop(0) for some in waiting]) for _ in range(len(waiting[0]))]
    return logits, KVCache(tuple(layers), jnp.array(lengths), room, config)


@jax.jit
def _concatenated(parts: list):
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


def checked(model: Llama, longest: int, config: CacheConfig) -> CacheConfig:
    """The config with its prompt capacity filled in, after every check that needs the model and the `longest` prompt.

    Raises:
        PromptError: a prompt longer than the cache or the model allows.
        ConfigError: a method that this model cannot run.
    """
    if not isinstance(config, CacheConfig):
        raise ConfigError(f"The method is a {type(config).__name__}: give a CacheConfig, as presets.minikv().")
    prompt_capacity = config.prompt_capacity or longest
    if longest > prompt_capacity:
        raise PromptError(
            f"A prompt of {longest} tokens is longer than prompt_capacity={prompt_capacity}: shorten it or raise that."
        )
    total = prompt_capacity + config.generated_capacity
    limit = model.config.max_position_embeddings
    if total > limit:
        raise PromptError(
            f"{prompt_capacity} prompt tokens and generated_capacity={config.generated_capacity} make {total}, more "
            f"than the model's {limit} positions: shorten the prompt or lower generated_capacity."
        )
    window = model.config.sliding_window
    if window is not None and total > window:
        raise ConfigError(
            f"This model attends to the last {window} tokens only; a cache for {total} tokens would need masking by "
            f"position, which compressed rows do not have. Keep prompt and answer within {window} tokens."
        )
    _check_codecs(config, model.config.head_dim)
    beyond = [i for i in (*config.precise, *config.brief) if i >= model.config.num_layers]
    if beyond:
        raise ConfigError(
            f"This model has {model.config.num_layers} layers, counted from 0, and none numbered {beyond}."
        )
    return config.replace(prompt_capacity=prompt_capacity)


def _check_codecs(config: CacheConfig, head_size: int) -> None:
    if (config.rotate_keys or config.rotate_values) and head_size & (head_size - 1):
        group = head_size & -head_size
        raise ConfigError(
            f"{config.name} rotates keys and values, which takes a head size that is a power of two, not {head_size}. "
            f"These run here: mikv, minikv:group_size={group}, kivi:group_size={group}, and methods that only evict."
        )
    for codec in (config.codec, config.retained, config.quantized_first):
        if codec is None or codec.dense:
            continue
        groups = [codec.value_group] + ([codec.key_group] if codec.key_axis == "channels" else [])
        if any(head_size % group_size(group, head_size) for group in groups):
            raise ConfigError(f"Groups of {groups} channels must divide the model's head size of {head_size}.")


def empty_cache(params: Params, cache_config: CacheConfig, batch: int) -> KVCache:
    """A cache of `batch` empty slots without room, for `insert`. The config needs its prompt_capacity.

    Raises:
        ConfigError: no prompt_capacity, no slots, a method that this model cannot run.
    """
    batch = inputs.count(batch, "batch")
    if cache_config.prompt_capacity is None:
        raise ConfigError("An empty cache must know its prompt_capacity: set it in the config.")
    tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
    _, like = jax.eval_shape(prefill, params, tokens, lengths, cache_config)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
