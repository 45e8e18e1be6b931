"""Prompts through one layer of a model: what comes before its cache is made."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from minikv_jax.cache import Readers
from minikv_jax.channels import LAST
from minikv_jax.compress import even_share, starts
from minikv_jax.model import Layer, Model, attended, row_sizes, sharing_layer
from minikv_jax.sharing import Borrowing
from pallas_kernels import two_pass_attention
from pallas_kernels.rows import row_numbers
from pallas_kernels.two_pass_attention.common import ScoreRows

# Rows of all sequences together that a layer works on at once, outside of attention: what bounds MLP activations.
# Enough for the products to run at full rate.
_ROWS = 4096
# Rows of all sequences together whose queries and attention exist at once, 512 MiB for 4096 channels: few calls of
# attention, for each reads all keys before it, yet no more memory than the weights' tenth that a peak may have.
_ATTENDED_ROWS = 1 << 15


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


def sequences_at_once(batch: int, tokens: int) -> int:
    """Sequences of a [batch, tokens] prompt that are read through all layers before others: as many as fill one call of
    attention. Hidden states of more would only wait for their turn, two bytes a channel of every token."""
    return even_share(batch, max(min(_ATTENDED_ROWS // max(tokens, 1), batch), 1))


def read_layer(
    layer: Layer,
    x: Float[Array, "B T D"],
    lengths: Int[Array, "B"],
    rows: Chunks,
    score_rows: ScoreRows,
    sliding_window: int | None,
) -> tuple[Array, Array, Array, Array, Readers]:
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
        x after the layer, and what `compress` takes: keys and values [B, T, K, H], or rows of latents, scores
        [B, K, T] in float32 and what reads them.
    """
    read = _read_layer if isinstance(x, Tracer) else _read_layer_in_place
    return read(layer, x, lengths, rows, score_rows, sliding_window)


def read_layers(
    model: Model,
    x: Float[Array, "B T D"],
    lengths: Int[Array, "B"],
    rows: Chunks,
    score_rows: Sequence[ScoreRows],
    sliding_window: int | None,
) -> Iterator[tuple[int, Float[Array, "B T D"], tuple[Any, ...] | None]]:
    """All layers over the whole prompt, one after the other.

    Args:
        model: the model.
        x: embeddings; donated as by `read_layer`.
        lengths, rows, sliding_window: as `read_layer`.
        score_rows: of each layer.

    Yields:
        The layer's number, x after it, and what `compress` takes; None for a layer that shares an earlier one's.
    """
    sharing = {i: layer for i, layer in enumerate(map(sharing_layer, model.layers)) if layer is not None}
    last_use = {layer.source: i for i, layer in sharing.items()}
    lent: dict[int, Sequence[Array]] = {}
    for i, layer in enumerate(model.layers):
        if i in sharing:
            key, value = lent[sharing[i].source]
            layer = Borrowing(layer, key, value, jnp.zeros_like(lengths))
        x, key, value, *read = read_layer(layer, x, lengths, rows, 0 if i in sharing else score_rows[i], sliding_window)
        if i in last_use:
            lent[i] = key, value
        lent = {source: held for source, held in lent.items() if last_use[source] > i}
        yield i, x, None if i in sharing else (key, value, *read)
        del key, value, read  # before the next layer makes its own keys and values


def _read_whole_layer(layer: Layer, x, lengths, rows: Chunks, score_rows, sliding_window):
    if rows.products < x.shape[1]:
        return _read_layer_in_chunks(layer, x, lengths, rows, score_rows, sliding_window)
    positions = jnp.broadcast_to(row_numbers(x.shape[1], axes=2), x.shape[:2])
    query, key, value = layer.before_attention(x, positions)
    exact = attended(layer, key, value, positions)
    attention, scores, _ = two_pass_attention(
        query,
        *exact,
        query_lengths=lengths,
        key_value_lengths=lengths,
        score_rows=score_rows,
        sliding_window=sliding_window,
    )
    counted = positions < lengths[:, None]
    last = counted & (positions >= lengths[:, None] - LAST)
    readers = Readers.of(query, exact[0].shape[2], counted, last).with_projection(layer.projection())
    return layer.after_attention(x, attention), key, value, _of_rows(scores, key), readers


def _of_rows(scores: Float[Array, "B K T"], key: Float[Array, "B T _ _"]) -> Float[Array, "B _ T"]:
    """Attention received by each head of the rows that are cached: latents are shared by all heads of a layer."""
    b, _, tokens = scores.shape
    return scores.reshape(b, key.shape[2], -1, tokens).sum(axis=2)


_STATIC = ("rows", "score_rows", "sliding_window")
_read_layer = jax.jit(_read_whole_layer, static_argnames=_STATIC)
_read_layer_in_place = jax.jit(_read_whole_layer, static_argnames=_STATIC, donate_argnames="x")


def _read_layer_in_chunks(layer: Layer, x, lengths, rows: Chunks, score_rows, sliding_window):
    b, tokens, _ = x.shape
    config = layer.config
    heads, head_size = config.num_kv_heads, config.head_dim
    pieces = starts(rows.attention, rows.products)
    everywhere = jnp.broadcast_to(row_numbers(tokens, axes=2), (b, tokens))

    def rows_of(whole, start):
        return jax.lax.dynamic_slice_in_dim(whole, start, rows.products, axis=1)

    def put(whole, part, start):
        return jax.lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), start, axis=1)

    def attend(query, key, value, first, counts, score_rows):
        # Keys after a chunk's rows are zeros so far, and causal attention does not look at them.
        offset = jnp.broadcast_to(first, (b,)).astype(jnp.int32)
        options = {"score_rows": score_rows, "sliding_window": sliding_window}
        key, value = attended(layer, key, value, everywhere)
        return two_pass_attention(query, key, value, query_lengths=counts, query_offset=offset, **options)

    def chunk(state, first):
        x, key, value, scores, readers = state

        def before(state, start):
            query, key, value, readers = state
            positions = jnp.broadcast_to(first + start + row_numbers(rows.products, axes=2), (b, rows.products))
            present = positions < lengths[:, None]
            new = layer.before_attention(rows_of(x, first + start), positions)
            readers = readers.join(Readers.of(new[0], heads, present, present & (positions >= lengths[:, None] - LAST)))
            # Zeros instead of padding: the attention then needs no lengths of keys, and makes no cleaned copy.
            new = [jnp.where(present[..., None, None], y, 0) for y in new]
            key, value = (put(whole, y, first + start) for whole, y in zip((key, value), new[1:]))
            return (put(query, new[0], start), key, value, readers), None

        query = jnp.zeros_like(x, shape=(b, rows.attention, config.num_heads, head_size))
        (query, key, value, readers), _ = jax.lax.scan(before, (query, key, value, readers), pieces)
        counts = jnp.clip(lengths - first, 0, rows.attention)
        attention, received, _ = attend(query, key, value, first, counts, "all" if score_rows == "all" else 0)

        def after(x, start):
            part = layer.after_attention(rows_of(x, first + start), rows_of(attention, start))
            return put(x, part, first + start), None

        x, _ = jax.lax.scan(after, x, pieces)
        return (x, key, value, scores + received, readers), None

    # Each sequence's last rows may lie in different chunks: they are asked on their own, when all keys exist.
    last = None if score_rows in ("all", 0) else _last_queries(layer, x, lengths, score_rows)

    row_heads, *sizes = row_sizes(layer)
    empty = [jnp.zeros_like(x, shape=(b, tokens, row_heads, size)) for size in sizes]
    readers = Readers.none(x, heads, head_size).with_projection(layer.projection())
    state = x, *empty, jnp.zeros_like(x, jnp.float32, shape=(b, heads, tokens)), readers
    (x, key, value, scores, readers), _ = jax.lax.scan(chunk, state, starts(tokens, rows.attention))
    if last is not None:
        their_query, first = last
        _, scores, _ = attend(their_query, key, value, first, jnp.minimum(lengths, their_query.shape[1]), "all")
    return x, key, value, _of_rows(scores, key), readers


def _last_queries(layer: Layer, x, lengths, count: int) -> tuple[Float[Array, "B count N H"], Int[Array, "B"]]:
    """Queries of each sequence's last rows, and the first of these rows."""
    first = jnp.maximum(lengths - count, 0)
    positions = first[:, None] + row_numbers(count, axes=2)
    their_x = jnp.take_along_axis(x, positions[..., None], axis=1, mode="clip")
    return layer.before_attention(their_x, positions)[0], first


@functools.partial(jax.jit, static_argnames="rows")
def embed(model: Model, tokens: Int[Array, "B T"], rows: Chunks) -> Float[Array, "B padded D"]:
    """Embeddings of [B, T] tokens, padded to whole chunks."""
    return model.embed(jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % rows.attention))))


@jax.jit
def logits_at(model: Model, x: Float[Array, "B T D"], index: Int[Array, "B"]) -> Float[Array, "B V"]:
    """float32 next-token logits of each sequence at its row `index` of the last layer's x."""
    last = jnp.take_along_axis(x, index[:, None, None], axis=1, mode="clip")
    return model.logits(last)[:, 0]
