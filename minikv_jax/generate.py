"""Reading a prompt and writing an answer: pure functions over (model, cache).

`params` is a `Llama` or what `nnx.split` makes of one; both are pytrees and go through `jax.jit` as they are.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from minikv_jax import allocate
from minikv_jax.cache import KVCache, LayerCache, QueryStatistics, Shape, compress, read_token, read_tokens
from minikv_jax.config import Allocation, CacheConfig, Rank
from minikv_jax.errors import ConfigError, PromptError
from minikv_jax.models.llama import Llama, LlamaLayer
from minikv_jax.segments import group_size
from pallas_kernels import two_pass_attention

type Params = Llama | tuple[Any, Any]


def _model(params: Params) -> Llama:
    return params if isinstance(params, Llama) else nnx.merge(*params)


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


def _chunk_rows(batch: int, tokens: int) -> Chunks:
    """All rows, or even shares: products a multiple of 128, attention a multiple of products."""
    products, attention = (max(most // batch // 128, 1) * 128 for most in (_ROWS, _ATTENDED_ROWS))
    if tokens <= products:
        return Chunks(tokens, tokens)
    share = -(-tokens // -(-tokens // attention))
    pieces = -(-share // products)
    products = -(-share // pieces // 128) * 128
    return Chunks(pieces * products, products)


@functools.partial(jax.jit, static_argnames=("rows", "score_rows", "sliding_window"), donate_argnames="x")
def _read_layer(layer: LlamaLayer, x, lengths, rows: Chunks, score_rows, sliding_window):
    """One layer over the whole prompt. Jitted on its own: called outside `jit`, it compiles once for all layers.

    x has a whole number of chunks. One chunk is one piece of work; of more, each chunk's result takes its rows' place
    in x. Nothing but keys, values, x and scores is ever as long as the prompt.
    """
    if rows.products < x.shape[1]:
        return _read_layer_in_chunks(layer, x, lengths, rows, score_rows, sliding_window)
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
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


def _read_layer_in_chunks(layer: LlamaLayer, x, lengths, rows: Chunks, score_rows, sliding_window):
    b, tokens, _ = x.shape
    config = layer.config
    heads, head_size = config.num_kv_heads, config.head_dim
    pieces = jnp.arange(0, rows.attention, rows.products)

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
            positions = jnp.broadcast_to(first + start + jnp.arange(rows.products), (b, rows.products))
            present = positions < lengths[:, None]
            new = layer.before_attention(rows_of(x, first + start), positions)
            queries = queries.join(QueryStatistics.of(new[0], heads, present))
            # Zeros instead of padding: the attention then needs no lengths of keys, and makes no cleaned copy.
            new = [jnp.where(present[..., None, None], y, 0) for y in new]
            key, value = (put(whole, y, first + start) for whole, y in zip((key, value), new[1:]))
            return (put(query, new[0], start), key, value, queries), None

        query = jnp.zeros((b, rows.attention, config.num_heads, head_size), x.dtype)
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
        positions = first[:, None] + jnp.arange(score_rows)
        their_x = jnp.take_along_axis(x, positions[..., None], axis=1, mode="clip")
        their_query, _, _ = layer.before_attention(their_x, positions)

    empty = jnp.zeros((b, tokens, heads, head_size), x.dtype)
    queries = QueryStatistics(jnp.zeros((b, heads, head_size)), jnp.zeros((b, heads, head_size, head_size)))
    state = x, empty, empty, jnp.zeros((b, heads, tokens), jnp.float32), queries
    (x, key, value, scores, queries), _ = jax.lax.scan(chunk, state, jnp.arange(0, tokens, rows.attention))
    if last:
        _, scores, _ = attend(their_query, key, value, first, jnp.minimum(lengths, score_rows), "all")
    return x, key, value, scores, queries


@functools.partial(jax.jit, static_argnames=("config", "shape", "at_once"))
def _compress(key, value, scores, queries, lengths, budget, config, shape, at_once=_COMPRESSED) -> LayerCache:
    """`compress`, for long prompts sequence by sequence and some heads at a time: it sorts and casts what it is given.

    `at_once` bounds the numbers of the keys in one piece of work.
    """
    arrays = key, value, scores, queries
    b, tokens, heads, head_size = key.shape

    def some_heads(arrays, lengths, budget):
        together = max(at_once // (arrays[0].shape[0] * tokens * head_size), 1)
        # Q-Hitter's mix looks at all heads of a layer.
        if together >= heads or config.rank.attention_weight < 1:
            return compress(*arrays, lengths, budget, config=config, shape=shape)
        together = next(n for n in range(together, 0, -1) if heads % n == 0)

        def one(first):
            def some(x, axis):
                return jax.lax.dynamic_slice_in_dim(x, first, together, axis)

            key, value = (some(x, 2) for x in arrays[:2])
            scores, queries = jax.tree.map(lambda x: some(x, 1), arrays[2:])
            return compress(key, value, scores, queries, lengths, budget, config=config, shape=shape)

        # What has heads has them second; the rest is the same for all of them.
        parts = jax.lax.map(one, jnp.arange(0, heads, together))
        return jax.tree.map(lambda x: _joined_heads(x) if x.ndim > 2 else x[0], parts)

    if b == 1 or key.size <= at_once:
        return some_heads(arrays, lengths, budget)

    def one_sequence(arguments):
        return some_heads(*jax.tree.map(lambda x: x[None], arguments))

    caches = jax.lax.map(one_sequence, (arrays, lengths, budget))
    return jax.tree.map(lambda x: x[:, 0], caches)


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
def _embed(model: Llama, tokens, rows: Chunks):
    """Embeddings, padded to whole chunks."""
    return model.embed(jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % rows.attention))))


@jax.jit
def _logits_at(model: Llama, x, index):
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
    """
    longest = tokens.shape[1]
    step = max((1 << max(longest - 1, 1).bit_length() - 1) // 8, 16)
    padded = -(-longest // step) * step
    if limit is not None:
        padded = max(min(padded, limit), longest)
    return jnp.pad(tokens, ((0, 0), (0, padded - longest)))


def forward(params: Params, tokens: Int[Array, "B T"], lengths: Int[Array, "B"] | None = None) -> Float[Array, "B T V"]:
    """Next-token logits at every position, without a cache.

    Args:
        params: the model.
        tokens: [B, T] token ids, padded on the right.
        lengths: [B] true lengths; default T.

    Returns:
        float32 logits [B, T, V]; rows of padding are meaningless.
    """
    model = _model(params)
    lengths = jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32) if lengths is None else jnp.asarray(lengths)
    rows = _chunk_rows(*tokens.shape)
    x = _embed(model, tokens, rows)
    for layer in model.layers:
        x, *_ = _read_layer(layer, x, lengths, rows, score_rows=0, sliding_window=model.config.sliding_window)
    return jax.jit(type(model).logits)(model, x[:, : tokens.shape[1]])


def prefill(
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    cache_config: CacheConfig,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Reads prompts and compresses them, one layer at a time: no two layers' full keys and values exist together.

    Pure; works inside `jax.jit` as it is (`cache_config` is static by itself). Outside `jit` it compiles one layer
    and runs it for all, which starts faster.

    Args:
        params: the model.
        tokens: [B, T] token ids, padded on the right.
        lengths: [B] int32 true lengths, 1 <= length <= T.
        cache_config: the method and its capacities.
        progress: called with (layers done, layers) as they finish; only outside `jit`.

    Returns:
        float32 logits [B, V] of the token after each prompt, and the cache.

    Raises:
        PromptError: an empty prompt, or one longer than the cache or the model allows.
        ConfigError: a method that this model cannot run.
    """
    model = _model(params)
    lengths = jnp.asarray(lengths, jnp.int32)
    cache_config = _fitting(model, tokens, lengths, cache_config)
    layers = model.config.num_layers
    largest = Shape.largest(cache_config, layers)

    rows = _chunk_rows(*tokens.shape)
    x = _embed(model, tokens, rows)
    caches = []
    for i, layer in enumerate(model.layers):
        x, *attended = _read_layer(layer, x, lengths, rows, score_rows=cache_config.score_rows, sliding_window=None)
        budget = allocate.budgets(cache_config, i, layers, lengths, tokens.shape[1])
        # Every layer is compressed at the largest layer's capacity and then cut: one program for a whole pyramid.
        cache = _compress(*attended, lengths, budget, config=cache_config, shape=largest)
        shape = Shape.of(cache_config, i, layers)
        if shape != largest:
            compress_to = functools.partial(compress, config=cache_config, shape=shape)
            like = jax.eval_shape(compress_to, *attended, lengths, budget)
            cache = _shrink(cache, tuple(leaf.shape for leaf in jax.tree.leaves(like)))
        caches.append(cache)
        del attended  # before the next layer makes its own keys and values
        if progress is not None:
            jax.block_until_ready(cache)
            progress(i + 1, layers)
    room = jnp.full(lengths.shape, cache_config.generated_capacity, jnp.int32)
    # A copy: the cache is made to be donated, the caller's lengths are not.
    return _logits_at(model, x, lengths - 1), KVCache(tuple(caches), jnp.array(lengths), room, cache_config)


def _fitting(model: Llama, tokens, lengths, config: CacheConfig) -> CacheConfig:
    """The config with its prompt capacity filled in, after every check that needs model and prompt together."""
    if tokens.ndim != 2 or lengths.shape != tokens.shape[:1]:
        raise PromptError(f"tokens {tokens.shape} and lengths {lengths.shape} must be [B, T] and [B].")
    longest = tokens.shape[1]
    if longest == 0:
        raise PromptError("The prompt is empty: give at least one token.")
    if not isinstance(lengths, jax.core.Tracer):
        given = np.asarray(lengths)
        if given.min() < 1 or given.max() > longest:
            raise PromptError(f"lengths {given.tolist()} must be from 1 to the {longest} tokens given.")
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
    return config.replace(prompt_capacity=prompt_capacity)


def _check_codecs(config: CacheConfig, head_size: int) -> None:
    if (config.rotate_keys or config.rotate_values) and head_size & (head_size - 1):
        raise ConfigError(f"A Hadamard rotation needs a head size that is a power of two, not {head_size}.")
    for codec in (config.codec, config.retained, config.quantized_first):
        if codec is None or codec.dense:
            continue
        groups = [codec.value_group] + ([codec.key_group] if codec.key_axis == "channels" else [])
        if any(head_size % group_size(group, head_size) for group in groups):
            raise ConfigError(f"Groups of {groups} channels must divide the model's head size of {head_size}.")


@functools.partial(jax.jit, static_argnames="config")
def _decode_layer(layer: LlamaLayer, cache: LayerCache, x, lengths, accept, config: CacheConfig):
    """One layer over one new token. Jitted on its own, it is traced and lowered once for all layers of one shape."""
    query, key, value = layer.before_attention(x, lengths[:, None])
    cache, attention = read_token(cache, query, key, value, lengths, accept, config)
    return cache, layer.after_attention(x, attention)


def decode_step(params: Params, cache: KVCache, tokens: Int[Array, "B"]) -> tuple[Float[Array, "B V"], KVCache]:
    """Reads one more token of every sequence.

    Use it as `jax.jit(decode_step, donate_argnames="cache")`: the cache is then updated in place.

    Args:
        params: the model.
        cache: of B sequences.
        tokens: [B] token ids.

    Returns:
        float32 logits [B, V] of the next token, and the cache. A sequence without room left stores nothing and its
        logits are NaN.
    """
    model = _model(params)
    accept = cache.room > 0
    x = model.embed(tokens[:, None])
    layers = []
    for layer, layer_cache in zip(model.layers, cache.layers):
        layer_cache, x = _decode_layer(layer, layer_cache, x, cache.lengths, accept, cache.config)
        layers.append(layer_cache)
    logits = jnp.where(accept[:, None], model.logits(x)[:, 0], jnp.nan)
    step = accept.astype(jnp.int32)
    return logits, KVCache(tuple(layers), cache.lengths + step, cache.room - step, cache.config)


# Tokens read at once by `extend`: bounds the attention of new tokens among themselves.
_CHUNK = 128


def extend(
    params: Params, cache: KVCache, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]
) -> tuple[Float[Array, "B V"], KVCache]:
    """Reads more of a prompt, or a next turn, onto a cache: many tokens at once instead of one a `decode_step`.

    New tokens attend to everything the cache holds and, in chunks, exactly to each other. They take the way of
    generated tokens: through the window into the first tier, with evicting methods giving up one token for each.

    Args:
        params: the model.
        cache: of B sequences; donate it under `jit`.
        tokens: [B, T] token ids, padded on the right.
        lengths: [B] true numbers of new tokens, 0 <= length <= T.

    Returns:
        float32 logits [B, V] of the token after each sequence's last new one (NaN where it had none, or more than it
        had room for), and the cache.

    Raises:
        PromptError: shapes that do not fit, no tokens, or more than any sequence could have room for.
    """
    lengths = jnp.asarray(lengths, jnp.int32)
    if tokens.ndim != 2 or lengths.shape != tokens.shape[:1] or lengths.shape != cache.lengths.shape:
        raise PromptError(
            f"tokens {tokens.shape}, lengths {lengths.shape} and a cache of {cache.lengths.shape[0]} sequences must "
            "be [B, T], [B] and B."
        )
    if tokens.shape[1] == 0:
        raise PromptError("There is nothing to read: give at least one token.")
    fits = lengths <= cache.room
    lengths = jnp.where(fits, lengths, 0)
    logits = jnp.full((tokens.shape[0], _model(params).config.vocab_size), jnp.nan, jnp.float32)
    for start in range(0, tokens.shape[1], _CHUNK):
        chunk = tokens[:, start : start + _CHUNK]
        counts = jnp.clip(lengths - start, 0, chunk.shape[1])
        counted = jnp.arange(chunk.shape[1]) < counts[:, None]
        new, cache, _ = _extend_chunk(params, cache, chunk, counts, counted)
        logits = jnp.where((counts > 0)[:, None], new, logits)
    return logits, cache


@jax.jit
def _extend_chunk(params, cache: KVCache, tokens, counts, counted):
    """Logits after a chunk, the cache with it, and statistics of each layer's queries."""
    model = _model(params)
    x = model.embed(tokens)
    positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1])
    layers, queries = [], []
    for layer, layer_cache in zip(model.layers, cache.layers):
        query, key, value = layer.before_attention(x, positions)
        layer_cache, attention = read_tokens(
            layer_cache, query, key, value, cache.lengths, counts, counted, cache.config
        )
        x = layer.after_attention(x, attention)
        layers.append(layer_cache)
        read = jnp.arange(tokens.shape[1]) < counts[:, None]
        queries.append(QueryStatistics.of(query, key.shape[2], read))
    logits = _logits_at(model, x, counts - 1)
    return logits, KVCache(tuple(layers), cache.lengths + counts, cache.room - counts, cache.config), queries


def prefill_in_chunks(
    params: Params, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], cache_config: CacheConfig, chunk: int = _CHUNK
) -> tuple[Float[Array, "B V"], KVCache]:
    """`prefill` that goes through the model chunk by chunk, for servers that interleave prompts with decoding.

    What a method keeps depends on the whole prompt, so until its end every token is held dense with its score so far;
    then the layers are compressed. Result and arguments are those of `prefill`; the peak is a full cache.

    Args:
        chunk: tokens read at once.
    """
    model = _model(params)
    lengths = jnp.asarray(lengths, jnp.int32)
    cache_config = _fitting(model, tokens, lengths, cache_config)
    if chunk < 1:
        raise ConfigError(f"chunk={chunk}: read at least 1 token at once.")
    layers, longest = model.config.num_layers, tokens.shape[1]
    # A cache that scores all tokens and is never so full that it gives one up.
    staging = CacheConfig(
        name="staging",
        rank=Rank(by="attention"),
        allocation=Allocation(heavy=longest),
        evict="after",
        prompt_capacity=1,
        generated_capacity=longest,
    )
    cache = empty_cache(params, staging, tokens.shape[0])
    held = [dataclasses.replace(x, ledger=dataclasses.replace(x.ledger, size=lengths)) for x in cache.layers]
    cache = dataclasses.replace(cache, layers=tuple(held))
    scored = longest if cache_config.score_rows == "all" else cache_config.score_rows
    logits, queries = None, []
    for start in range(0, longest, chunk):
        part = tokens[:, start : start + chunk]
        place = start + jnp.arange(part.shape[1])
        counts = jnp.clip(lengths - start, 0, part.shape[1])
        counted = (place < lengths[:, None]) & (place >= (lengths - scored)[:, None])
        new, cache, more = _extend_chunk(params, cache, part, counts, counted)
        logits = new if logits is None else jnp.where((counts > 0)[:, None], new, logits)
        queries = [a.join(b) for a, b in zip(queries, more)] if queries else more
    compressed = []
    for i, layer in enumerate(cache.layers):
        key, value = (x[:, :, :longest].swapaxes(1, 2) for x in (layer.segment.key, layer.segment.value))
        budget = allocate.budgets(cache_config, i, layers, lengths, longest)
        scores, shape = layer.ledger.scores[:, :, :longest], Shape.of(cache_config, i, layers)
        compressed.append(_compress(key, value, scores, queries[i], lengths, budget, config=cache_config, shape=shape))
    room = jnp.full(lengths.shape, cache_config.generated_capacity, jnp.int32)
    return logits, KVCache(tuple(compressed), jnp.array(lengths), room, cache_config)


def empty_cache(params: Params, cache_config: CacheConfig, batch: int) -> KVCache:
    """A cache of `batch` empty slots without room, for `insert`. The config needs its prompt_capacity."""
    if cache_config.prompt_capacity is None:
        raise ConfigError("An empty cache must know its prompt_capacity: set it in the config.")
    tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
    _, like = jax.eval_shape(prefill, params, tokens, lengths, cache_config)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_p: draw only among the most likely tokens that together have this probability.
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self):
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"temperature={self.temperature} must be at least 0 and top_p={self.top_p} above 0 and at most 1."
            )


GREEDY = Sampling()


def sample(logits: Float[Array, "B V"], key: Array, sampling: Sampling) -> Int[Array, "B"]:
    """Token ids drawn from next-token logits."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_p < 1:
        best_first = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(best_first, axis=-1), axis=-1) - jax.nn.softmax(best_first, axis=-1)
        least = jnp.min(jnp.where(before < sampling.top_p, best_first, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, donate_argnames="cache")
def _next(params: Params, cache: KVCache, tokens, key, sampling: Sampling):
    logits, cache = decode_step(params, cache, tokens)
    return sample(logits, key, sampling), cache


def stream(
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    cache_config: CacheConfig,
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[Int[Array, "B"], KVCache]]:
    """Yields the new tokens [B] one step at a time, with the cache that led to them.

    The yielded cache is given away to the next step: read what you need before asking for the next token.

    Raises:
        PromptError, ConfigError: as `prefill`; more new tokens than the cache has room for.
    """
    _require_room(cache_config, max_new_tokens)
    key = jax.random.key(seed)
    logits, cache = prefill(params, tokens, lengths, cache_config, progress=progress)
    token = sample(logits, key, sampling)
    yield token, cache
    for i in range(1, max_new_tokens):
        token, cache = _next(params, cache, token, jax.random.fold_in(key, i), sampling)
        yield token, cache


# Steps between two looks at whether every sequence has ended. A loop whose condition depends on data makes the host
# wait for the device each time round; a scan of known length does not.
_STEPS = 16


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "eos_token_ids"), donate_argnames="cache")
def _decode_loop(params, cache, token, key, sampling, max_new_tokens, eos_token_ids):
    """Decodes until every sequence has ended or `max_new_tokens` are there: one dispatch for all of it."""
    ends = jnp.asarray(eos_token_ids or (-1,))

    def step(state, i):
        cache, ended, token = state
        cache = _counted_in_every_layer(cache)
        # Where all have ended, or past the last token, no sequence has room and the step changes nothing.
        room = jnp.where(ended.all() | (i >= max_new_tokens), 0, cache.room)
        logits, stepped = decode_step(params, dataclasses.replace(cache, room=room), token)
        cache = dataclasses.replace(stepped, room=cache.room - (stepped.lengths - cache.lengths))
        token = jnp.where(ended, token, sample(logits, jax.random.fold_in(key, i), sampling))
        return (_counted_once(cache), ended | jnp.isin(token, ends), token), token

    state = _counted_once(cache), jnp.isin(token, ends), token
    if not eos_token_ids:
        (cache, _, _), tokens = jax.lax.scan(step, state, jnp.arange(1, max_new_tokens))
        return jnp.concatenate([token[None], tokens]).T, _counted_in_every_layer(cache)

    chunks = -(-(max_new_tokens - 1) // _STEPS)
    tokens = jnp.zeros((1 + chunks * _STEPS, token.shape[0]), jnp.int32).at[0].set(token)

    def more(carry):
        done, _, (_, ended, _) = carry
        return (done < max_new_tokens) & ~ended.all()

    def chunk(carry):
        done, tokens, state = carry
        state, new = jax.lax.scan(step, state, done + jnp.arange(_STEPS))
        return done + _STEPS, jax.lax.dynamic_update_slice_in_dim(tokens, new, done, 0), state

    done, tokens, (cache, _, token) = jax.lax.while_loop(more, chunk, (jnp.int32(1), tokens, state))
    written = jnp.arange(max_new_tokens)[:, None] < done
    return jnp.where(written, tokens[:max_new_tokens], token).T, _counted_in_every_layer(cache)


def _counted_once(cache: KVCache) -> KVCache:
    """Without the numbers that sequences have in every layer but the first, where layers keep the same.

    A loop copies each number that it carries once a step: for 32 layers that took as long as attending to a window.
    """
    if cache.config.allocation.is_pyramid:
        return cache
    others = jax.tree.map(lambda x: None if x.ndim == 1 else x, cache.layers[1:])
    return dataclasses.replace(cache, layers=(cache.layers[0], *others))


def _counted_in_every_layer(cache: KVCache) -> KVCache:
    """What `_counted_once` left out, filled in again."""
    first, *others = cache.layers
    others = [
        jax.tree.map(lambda x, of_first: of_first if x is None else x, layer, first, is_leaf=lambda x: x is None)
        for layer in others
    ]
    return dataclasses.replace(cache, layers=(first, *others))


def generate(
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    cache_config: CacheConfig,
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    eos_token_ids: Sequence[int] = (),
    seed: int = 0,
) -> tuple[Int[Array, "B max_new_tokens"], KVCache]:
    """Reads prompts and writes up to `max_new_tokens` tokens each, all steps in one dispatch.

    Args:
        params: the model.
        tokens: [B, T] prompts, padded on the right.
        lengths: [B] true lengths.
        cache_config: the method and its capacities.
        max_new_tokens: at most `generated_capacity` + 1, for the last token is not read again.
        sampling: greedy by default.
        eos_token_ids: a sequence ends with one of these; the rest of its row repeats it.
        seed: of the random draws.

    Returns:
        The new tokens [B, max_new_tokens], and the cache after them.

    Raises:
        PromptError, ConfigError: as `prefill`; more new tokens than the cache has room for.
    """
    _require_room(cache_config, max_new_tokens)
    key = jax.random.key(seed)
    logits, cache = prefill(params, tokens, lengths, cache_config)
    token = sample(logits, key, sampling)
    return _decode_loop(params, cache, token, key, sampling, max_new_tokens, tuple(eos_token_ids))


def _require_room(config: CacheConfig, max_new_tokens: int) -> None:
    if not 1 <= max_new_tokens <= config.generated_capacity + 1:
        raise ConfigError(
            f"max_new_tokens={max_new_tokens} must be from 1 to generated_capacity + 1 = "
            f"{config.generated_capacity + 1}: change one of them."
        )
