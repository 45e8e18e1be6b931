"""One layer's cache for anybody's model: attention over a prompt, over one new token, over several.

    out, state = layer.prefill(query, key, value, lengths, config, layer=i, layers=L)
    out, state = layer.step(query, key, value, state)
    out, state = layer.extend(query, key, value, counts, state)

The functions are pure and know no model: importing this module loads neither flax nor transformers. Queries and keys
come after rotary embedding. A state is one pytree; donate it under `jit`, and it is updated in place.
`read_token` and `read_tokens` are the work itself, for callers that count tokens and room for all layers at once.
"""

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from minikv_jax import allocate, basis, inputs, latent, rank, segments
from minikv_jax.cache import LayerCache, Readers, Shape, nbytes
from minikv_jax.channels import LAST
from minikv_jax.compress import compress_in_pieces
from minikv_jax.config import Allocation, CacheConfig, Method
from minikv_jax.errors import ConfigError, PromptError
from minikv_jax.evict import Evict
from minikv_jax.model import LatentLayer
from pallas_kernels import (
    Part,
    Partial,
    decode_attention,
    merge_partials,
    partial_attention,
    two_pass_attention,
    with_sinks,
)
from pallas_kernels.rows import below, row_numbers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """One layer's cache of B sequences between two calls.

    Attributes:
        cache: what the layer holds, and its method (static).
        lengths: int32 [B], tokens read so far.
        room: int32 [B], tokens that may still follow. Where it is 0, a step stores nothing and its output is NaN.
        window: newest tokens that a query sees, of a layer that is local by its model's design (static).
    """

    cache: LayerCache
    lengths: Int[Array, "B"]
    room: Int[Array, "B"]
    window: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def nbytes(self) -> int:
        """Bytes of every array it holds."""
        return nbytes(self)


def local(config: CacheConfig, window: int) -> CacheConfig:
    """The cache of a layer that attends to the newest `window` tokens only: it holds these, dense, and no others."""
    window = inputs.count(window, "window")
    method = Method(allocation=Allocation(heavy=0, recent=window), inflow=Evict("before"))
    return dataclasses.replace(config, method=method, layers=())


def prefill(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    lengths: Int[Array, "B"],
    config: CacheConfig,
    *,
    layer: int = 0,
    layers: int = 1,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    window: int | None = None,
    projection: Float[Array, "N H D"] | None = None,
) -> tuple[Float[Array, "B T N H"], State]:
    """Causal attention over prompts, and what the method keeps of them.

    Args:
        query, key, value: of the prompts, padded on the right; N is a multiple of K.
        lengths: [B] true lengths, 1 <= length <= T.
        config: the method and its capacities.
        layer, layers: this layer's number, and how many the model has: budgets may differ from layer to layer.
        scale: of the logits; default H ** -0.5.
        soft_cap: c bounds logits x by c tanh(x / c).
        sinks: [N] logits that take a share of each head's attention and have no value.
        window: newest tokens that a query sees, of a layer that is local by its model's design: it keeps these
            (`local`) whatever the config says, and its state knows.
        projection: [N, H, D] what the output of each head is multiplied by next. Methods that balance values
            (`minikv_plus`) weigh errors by it, and lose a little less.

    Returns:
        Attention [B, T, N, H] in the query's dtype, 0 behind a sequence's length, and the state. A traced sequence
        whose length is out of range has NaN and an empty state without room.

    Raises:
        PromptError: lengths or shapes that do not fit one another, a prompt longer than prompt_capacity.
        ConfigError: a method that heads of this size cannot be held in.
    """
    inputs.check_heads(query, key, value)
    inputs.check_projection(projection, query)
    longest = key.shape[1]
    lengths = inputs.row_counts(lengths, key.shape[0], longest, least=1)
    config = config if window is None else local(config, window)
    config = config.for_prompts(longest)
    config.check_model(key.shape[3], layers)
    method = config.of_layer(layer)
    output, scores, _ = two_pass_attention(
        query, key, value, query_lengths=lengths, key_value_lengths=lengths, scale=scale, soft_cap=soft_cap,
        sinks=sinks, sliding_window=window, score_rows=method.score_rows,
    )  # fmt: skip
    counted = below(lengths, longest)
    readers = Readers.of(query, key.shape[2], counted, counted & ~below(lengths - LAST, longest))
    readers = readers.with_projection(projection)
    budget = allocate.budgets(config, layer, layers, lengths, longest)
    shape = Shape.of(config, layer, layers)
    cache = compress_in_pieces(key, value, scores, readers, lengths, budget, method, shape, config.dtype)
    read = lengths > 0
    room = jnp.where(read, jnp.int32(config.generated_capacity), 0)
    return jnp.where(read[:, None, None, None], output, jnp.nan), State(cache, jnp.array(lengths), room, window)


def spec(
    batch: int,
    heads: int,
    head_size: int,
    config: CacheConfig,
    dtype: DTypeLike,
    *,
    layer: int = 0,
    layers: int = 1,
    window: int | None = None,
) -> State:
    """Shapes and dtypes of the state of `batch` sequences: nothing is computed or allocated.

    Keys and values have K `heads` of size H and this dtype; the config needs its prompt_capacity. `layer`, `layers` and
    `window` are as in `prefill`.

    Raises:
        ConfigError: no prompt_capacity, or a method that heads of this size cannot be held in.
    """
    if config.prompt_capacity is None:
        raise ConfigError("A state without a prompt must know its prompt_capacity: set it in the config.")
    rows = batch, config.prompt_capacity, heads, head_size
    return _spec(rows, jnp.dtype(dtype), config, layer, layers, window)


# Engines ask for a state of every layer before every prompt.
@functools.lru_cache(maxsize=1024)
def _spec(shape: tuple[int, ...], dtype: jnp.dtype, config: CacheConfig, layer: int, layers: int, window) -> State:
    def state(query, key, value, lengths):
        return prefill(query, key, value, lengths, config, layer=layer, layers=layers, window=window)[1]

    rows, lengths = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    return jax.eval_shape(state, rows, rows, rows, lengths)


def empty(batch: int, heads: int, head_size: int, config: CacheConfig, dtype: DTypeLike, **place: Any) -> State:
    """A state of `batch` sequences without tokens and without room. Arguments are those of `spec`."""
    like = spec(batch, heads, head_size, config, dtype, **place)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)


def step(
    query: Float[Array, "B 1 N H"],
    key: Float[Array, "B 1 K H"],
    value: Float[Array, "B 1 K H"],
    state: State,
    accept: Bool[Array, "B"] | None = None,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
) -> tuple[Float[Array, "B 1 N H"], State]:
    """Stores one more token of every sequence, and attends to all that is held, the token included.

    Args:
        query, key, value: of the token.
        state: donate it under `jit`.
        accept: [B] sequences that take part; default all. Others, and those without room, store nothing.
        scale, soft_cap, sinks: as `prefill`.

    Returns:
        Attention in the query's dtype, NaN for a sequence that stored nothing, and the state.

    Raises:
        PromptError: shapes that do not fit the state.
    """
    inputs.check_heads(query, key, value, state.cache)
    if query.shape[1] != 1:
        raise PromptError(f"step reads one token of each sequence, not {query.shape[1]}: use extend.")
    fits = (state.room > 0) & has_row(state.cache, state.lengths)
    fits = fits if accept is None else fits & accept
    cache, output = read_token(
        state.cache, query, key, value, state.lengths, fits, scale=scale, soft_cap=soft_cap, sinks=sinks
    )
    count = fits.astype(jnp.int32)
    output = jnp.where(fits[:, None, None, None], output, jnp.nan)
    return output, dataclasses.replace(state, cache=cache, lengths=state.lengths + count, room=state.room - count)


def extend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    counts: Int[Array, "B"],
    state: State,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
) -> tuple[Float[Array, "B T N H"], State]:
    """Reads several more tokens at once: they attend to everything held and, exactly, to each other.

    Args:
        query, key, value: of the tokens, padded on the right.
        counts: [B] true numbers of new tokens, 0 <= count <= T.
        state: donate it under `jit`.
        scale, soft_cap, sinks: as `prefill`. A local layer reads tokens one after the other.

    Returns:
        Attention [B, T, N, H], NaN behind a sequence's tokens, and the state. A traced sequence whose count is above
        its room stores nothing.

    Raises:
        PromptError: counts or shapes that do not fit, more tokens than a sequence has room for.
    """
    inputs.check_heads(query, key, value, state.cache)
    softmax = {"scale": scale, "soft_cap": soft_cap, "sinks": sinks}
    counts = inputs.row_counts(counts, key.shape[0], key.shape[1], least=0)
    counts = inputs.with_room(counts, state)
    if state.window is not None:
        return _one_by_one(query, key, value, counts, state, softmax)
    counted = below(counts, key.shape[1])
    cache, output = read_tokens(state.cache, query, key, value, state.lengths, counts, counted, **softmax)
    output = jnp.where(counted[..., None, None], output, jnp.nan)
    return output, dataclasses.replace(state, cache=cache, lengths=state.lengths + counts, room=state.room - counts)


def _one_by_one(query, key, value, counts, state: State, softmax: dict) -> tuple[Array, State]:
    def one(state, token):
        query, key, value, i = token
        output, state = step(query[:, None], key[:, None], value[:, None], state, i < counts, **softmax)
        return state, output[:, 0]

    tokens = (*(jnp.moveaxis(x, 1, 0) for x in (query, key, value)), row_numbers(query.shape[1]))
    state, output = jax.lax.scan(one, state, tokens)
    return jnp.moveaxis(output, 0, 1), state


def has_row(layer: LayerCache, position: Int[Array, "B"]) -> Bool[Array, "B"]:
    """Whether each sequence, which has read `position` tokens, can store one more in the rows there are."""
    return layer.method.inflow.has_row(layer, position)


def read_token(
    layer: LayerCache,
    query: Float[Array, "B 1 N H"],
    key: Float[Array, "B 1 K H"],
    value: Float[Array, "B 1 K H"],
    position: Int[Array, "B"],
    accept: Bool[Array, "B"],
    rows: LatentLayer | None = None,
    **softmax: Any,
) -> tuple[LayerCache, Float[Array, "B 1 N H"]]:
    """Stores one more token of every accepting sequence, and attends to all that is held, the token included.

    In the order of the methods' code: make room, append, encode a full window, attend, update scores, give up.

    Args:
        layer: the layer.
        query, key, value: of the token, query and key after rotary embedding.
        position: tokens read before this one.
        accept: sequences that store the token; all have a row left (`has_row`).
        rows: how the layer's rows are read, where it caches latents.
        softmax: scale, soft_cap and sinks, as `prefill`.
    """
    inflow = layer.method.inflow
    layer, query = inflow.take_in(layer, query, key, value, position, accept)
    output, lse, logits = attend(layer, query, position, rows=rows, **softmax)
    if logits is not None:
        layer = _scored(layer, logits, lse, accept[:, None])
    return inflow.settle(layer, position, accept), output


def read_only(
    layer: LayerCache, query: Float[Array, "B T N H"], position: Int[Array, "B"], **softmax: Any
) -> Float[Array, "B T N H"]:
    """Attends to all that is held, the newest token at `position` included, and changes nothing."""
    nothing = jnp.zeros_like(query[:, :, : layer.heads[0]])
    query, _, _ = basis.take_in(layer.method.bases, layer.frames, query, nothing, nothing)
    return attend(layer, query, position, **softmax)[0]


def read_tokens(
    layer: LayerCache,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    position: Int[Array, "B"],
    counts: Int[Array, "B"],
    counted: Bool[Array, "B T"],
    rows: LatentLayer | None = None,
    *,
    sinks: Float[Array, "N"] | None = None,
    **softmax: Any,
) -> tuple[LayerCache, Float[Array, "B T N H"]]:
    """Reads the first `counts` of T more tokens of each sequence at once, from `position` on.

    They attend to all that was held and, exactly, to each other; then they are stored one after the other. The
    queries in `counted` add their attention to the scores.
    """
    inflow = layer.method.inflow
    query, key, value = basis.take_in(layer.method.bases, layer.frames, query, key, value)
    tokens = row_numbers(query.shape[1])
    exact = key, value
    if rows is not None:
        exact = rows.exact(key[:, :, 0], value[:, :, 0], position[:, None] + tokens[None])
    own, _, lse = two_pass_attention(
        query, *exact, query_lengths=counts, key_value_lengths=counts, score_rows=0, **softmax
    )
    own = Partial(own.astype(jnp.float32), lse, jnp.where(jnp.isneginf(lse), 0.0, 1.0))
    output, lse, logits = attend(layer, query, position - 1, also=(own,), rows=rows, sinks=sinks, **softmax)
    key, value = (jnp.swapaxes(x, 1, 2) for x in (key, value))
    scores = jnp.zeros(key.shape[:3])
    if logits is not None:
        layer = _scored(layer, logits, lse, counted)
        seen = (tokens[None] <= tokens[:, None])[None] & counted[:, :, None] & below(counts, len(tokens))[:, None]
        _, fresh = partial_attention(Part(query, key, value, counts), return_logits=True, **softmax)
        scores = rank.received(fresh, lse, seen, key.shape[1])

    def store(layer, token):
        k, v, score, i = token
        accept = i < counts
        layer = inflow.arrive(layer, k[:, :, None], v[:, :, None], position + i, accept, score)
        return inflow.settle(layer, position + i, accept), None

    stream = (*(jnp.moveaxis(x, 2, 0) for x in (key, value, scores)), tokens)
    return jax.lax.scan(store, layer, stream)[0], output


def attend(
    layer: LayerCache,
    query: Float[Array, "B T N H"],
    position: Int[Array, "B"],
    also: tuple[Partial, ...] = (),
    rows: LatentLayer | None = None,
    *,
    sinks: Float[Array, "N"] | None = None,
    **softmax: Any,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"], Float[Array, "B T N S"] | None]:
    """Attention over everything the layer holds, and `also`, of queries as its keys are held.

    `position` is that of the newest token held.

    Returns:
        The output in the query's dtype, for values as they came; the log-sum-exp; and if the inflow wants scores the
        logits of the first tier's rows.
    """
    method, frames = layer.method, layer.frames
    scored = method.inflow.scored
    parts = [*layer.tiers, *method.inflow.newest(layer, position)]
    if rows is not None:
        return *latent.attend(rows, query, layer, parts, also, sinks, **softmax), None
    if not (also or layer.prefix):
        scales = basis.kernel_scales(method.bases, frames, query.shape[0], layer.heads[0])
        back = {} if scales is None else {"rotated": scales.value_unit, "balanced": scales.value_balance}
        output, lse, *logits = decode_attention(
            [part.part(query) for part in parts], return_logits=scored, **back, sinks=sinks, **softmax
        )
        if scales is None:
            output = basis.give_back(method.bases, frames, output)
        return output, lse, logits[0] if scored else None
    if scored:
        first, logits = segments.attention(query, layer.first, return_logits=True, **softmax)
    else:
        first, logits = segments.attention(query, layer.first, **softmax), None
    others = [segments.attention(query, part, **softmax) for part in parts[1:]]
    of = cast(Array, layer.prefix_of)
    others += [segments.shared_attention(query, part, of, **softmax) for part in layer.prefix]
    output, lse = merge_partials([first, *others, *also])
    if sinks is not None:
        output, lse = with_sinks(output, lse, sinks)
    return basis.give_back(method.bases, frames, output.astype(query.dtype)), lse, logits


def _scored(layer: LayerCache, logits: Float[Array, "B T N S"], lse, counted: Bool[Array, "B T"]) -> LayerCache:
    """The layer whose tokens are credited with the attention they just received from the counted queries."""
    held = below(layer.first.length, logits.shape[-1])
    gained = rank.received(logits, lse, counted[:, :, None] & held[:, None], layer.heads[0])
    return layer.method.inflow.add_scores(layer, gained)
