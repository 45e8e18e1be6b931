"""Reading once for all methods, then going on exactly as `decode_step` does, but layer by layer.

Two facts make a study of many methods affordable:

* Attention over the prompt is exact, so hidden states do not depend on the method: one pass over the layers gives the
  keys and values that every method compresses (`read_prompt`). Methods that change weights have a pass of their own.
* Tokens that are known in advance need no decoding loop over the whole model. Layer l of token t reads layer l-1 of
  token t and layer l's cache, which holds tokens up to t: so `read_on` runs a layer over all tokens (projections and
  MLP at once, cache and attention token after token in the order of `decode_step`, flushes and evictions included)
  before it goes to the next. One layer is compiled for a method, not a whole model.

`read_follows` does both layer by layer, so that no more than one layer's caches exist at a time. What it compiles does
not depend on how many tokens a method keeps, nor on how many follow: prompts are as long as asked for or padded
(`fitted`), rooms and runs of following tokens are of fixed size, and budgets are numbers. So a study of a hundred
settings compiles a program for each kind of cache among them, not for each setting and task.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from minikv_jax import allocate
from minikv_jax.cache import KVCache, LayerCache, Shape, nbytes
from minikv_jax.compress import compress_in_pieces
from minikv_jax.config import CacheConfig, Method
from minikv_jax.decode import through_layers
from minikv_jax.errors import ConfigError
from minikv_jax.latent import Weights
from minikv_jax.layer import read_token
from minikv_jax.model import Model, as_model, latent_layer, owners
from minikv_jax.models.config import ModelConfig
from minikv_jax.prefill import checked, prefill, with_latents_of
from minikv_jax.reading import chunk_rows, embed, logits_at, read_layer
from minikv_jax.report import planned_layer, planned_report
from pallas_kernels.two_pass_attention.common import ScoreRows


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What reading a batch of prompts left: logits of the next token, with unchanged weights if some method has these,
    and a cache for each method."""

    logits: Float[Array, "B V"]
    caches: dict[str, KVCache]


def for_method(model: Model, config: CacheConfig) -> Model:
    """The model with the weights that a method asks for, made once."""
    return model if config.weights is None else _made(model, config.weights)


@functools.lru_cache(maxsize=4)
def _made(model: Model, weights: Weights) -> Model:
    from minikv_jax.models.made import made  # a model of another kind needs no flax

    return as_model(made(model, weights))


def _by_weights(model: Model, methods: Mapping[str, CacheConfig]) -> Iterator[tuple[Model, dict[str, CacheConfig]]]:
    """The methods, and the model that they read, for each way to change its weights; those that change none first."""
    for weights in sorted({config.weights for config in methods.values()}, key=lambda x: (x is not None, str(x))):
        some = {name: config for name, config in methods.items() if config.weights == weights}
        yield for_method(model, next(iter(some.values()))), some


def read_layers(model: Model, tokens, lengths, rows: Sequence[ScoreRows]) -> Iterator[dict[ScoreRows, tuple]]:
    """What each layer gives in turn, for each way to count scores: its result, and all that is compressed of it."""
    at_once = chunk_rows(*tokens.shape)
    x = embed(model, tokens, at_once)
    for layer in model.layers:
        # A layer takes the place of what it reads: each reading gets a copy.
        read: dict[ScoreRows, tuple] = {
            n: read_layer(layer, jnp.array(x), lengths, at_once, n, sliding_window=None) for n in rows
        }
        x = read[rows[0]][0]
        yield read


def read_prompt(
    model: Model,
    tokens: Int[Array | np.ndarray, "B T"],
    lengths: Int[Array | np.ndarray, "B"],
    methods: Mapping[str, CacheConfig],
) -> Prompt:
    """`prefill` for several methods at the price of one pass (two, where some rank by all rows and some by the last).

    Layers keep the largest layer's capacity, so that a pyramid needs one program and not one a layer; `weight_of`
    counts what `prefill` would hold.
    """
    found = [_read_prompt(own, tokens, lengths, some) for own, some in _by_weights(model, methods)]
    caches = {name: cache for prompt in found for name, cache in prompt.caches.items()}
    return Prompt(found[0].logits, {name: caches[name] for name in methods})


def _read_prompt(model: Model, tokens, lengths, methods: Mapping[str, CacheConfig]) -> Prompt:
    lengths = jnp.asarray(lengths, jnp.int32)
    methods = {name: checked(model, tokens.shape[1], config) for name, config in methods.items()}
    if _shares(model):
        read = {name: prefill(model, jnp.asarray(tokens), lengths, config) for name, config in methods.items()}
        return Prompt(next(iter(read.values()))[0], {name: cache for name, (_, cache) in read.items()})
    layers = model.config.num_layers
    largest = {name: Shape.largest(config, layers) for name, config in methods.items()}
    held: dict[str, list[LayerCache]] = {name: [] for name in methods}
    x = None
    for i, read in enumerate(read_layers(model, tokens, lengths, _rows(methods))):
        for name, config in methods.items():
            own = config.of_layer(i)
            x, *attended = _of(read, own)
            budget = allocate.budgets(config, i, layers, lengths, tokens.shape[1])
            held[name].append(compress_in_pieces(*attended, lengths, budget, own, largest[name], config.dtype))
    caches = {}
    for name, config in methods.items():
        room = jnp.full(lengths.shape, config.generated_capacity, jnp.int32)
        caches[name] = KVCache(tuple(held[name]), jnp.array(lengths), room, jnp.array(lengths), config)
    return Prompt(logits_at(model, x, lengths - 1), caches)


def _rows(methods: Mapping[str, CacheConfig]) -> list[ScoreRows]:
    """The ways to count scores that these methods need; at least one."""
    found: set[ScoreRows] = {method.score_rows for config in methods.values() for method in config.methods}
    return sorted(found - {0}, key=str) or [0]


def _of(read: dict[ScoreRows, tuple], method: Method) -> tuple:
    """The reading with the scores of a layer's method. One without scores takes any: it ignores them."""
    return read.get(method.score_rows, next(iter(read.values())))


# Tokens of one run of a program, in `read_follows`: most questions fit, and a long text is some runs.
_RUN = 16


def fitted(
    model: Model, prompts: Sequence[Sequence[int]], room: int, step: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]:
    """Prompts padded to a multiple of `step` tokens, or as near as the model's positions let, and their lengths."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    longest = int(lengths.max())
    most = (model.config.max_position_embeddings - room) // 128 * 128  # whole tiles of attention
    padded = max(min(-(-longest // step) * step, most), longest)
    tokens = np.zeros((len(prompts), padded), np.int32)
    for row, prompt in zip(tokens, prompts):
        row[: len(prompt)] = prompt
    return tokens, lengths


def read_follows(
    model: Model,
    tokens: Int[Array | np.ndarray, "B T"],
    lengths: Int[Array | np.ndarray, "B"],
    methods: Mapping[str, CacheConfig],
    follows: Sequence[tuple[Int[np.ndarray, "B F"], Int[np.ndarray, "B"]]],
) -> dict[str, list[Float[Array, "B padded D"]]]:
    """Compresses prompts, and reads each of `follows` (tokens and counts) on a copy of its own of what is left.

    Args:
        model: the model.
        tokens, lengths: prompts, padded on the right.
        methods: by name, with `generated_capacity` for the longest of the follows.
        follows: independent continuations of every prompt, padded on the right.

    Returns:
        For each method, hidden states before the last norm of each follow; they are padded, and meaningless past the
        counts.
    """
    found = {}
    for own, some in _by_weights(model, methods):
        found |= _read_follows(own, tokens, lengths, some, follows)
    return {name: found[name] for name in methods}


def _shares(model: Model) -> bool:
    """Whether some layers read others' caches, so that no layer can be finished before the next one begins."""
    return len(owners(model)) < model.config.num_layers


def _read_follows(model: Model, tokens, lengths, methods: Mapping[str, CacheConfig], follows) -> dict[str, list]:
    lengths = jnp.asarray(lengths, jnp.int32)
    padded = [np.pad(tokens, ((0, 0), (0, -tokens.shape[1] % _RUN))) for tokens, _ in follows]
    if _shares(model):
        caches = _read_prompt(model, tokens, lengths, methods).caches
        return {
            name: [_read_on(model, cache, jnp.asarray(x), counts)[0] for x, (_, counts) in zip(padded, follows)]
            for name, cache in caches.items()
        }
    layers = model.config.num_layers
    methods = {name: checked(model, tokens.shape[1], config) for name, config in methods.items()}
    starts = [range(0, tokens.shape[1], _RUN) for tokens, _ in follows]
    embedded = [[_embedded(model, x[:, i : i + _RUN]) for i in s] for x, s in zip(padded, starts)]
    x = dict.fromkeys(methods, embedded)
    places = [[lengths + i for i in s] for s in starts]
    counted = [
        [jnp.asarray(np.arange(i, i + _RUN) < counts[:, None]) for i in s] for s, (_, counts) in zip(starts, follows)
    ]
    for i, read in enumerate(read_layers(model, tokens, lengths, _rows(methods))):
        for name, config in methods.items():
            _, *attended = _of(read, config.of_layer(i))
            budget = allocate.budgets(config, i, layers, lengths, tokens.shape[1])
            shape = Shape(*(tokens.shape[1] + config.generated_capacity + 1,) * 2)
            program = config.of_layer(i).program
            cache = compress_in_pieces(*attended, lengths, budget, program, shape, config.dtype)
            x[name] = [_read_runs(model.layers[i], *run, cache) for run in zip(x[name], places, counted)]
    return {name: [jnp.concatenate(runs, axis=1) for runs in found] for name, found in x.items()}


def _read_runs(layer, runs, places, counted, cache: LayerCache) -> list:
    found = []
    for x, place, accept in zip(runs, places, counted):
        x, cache, _ = _read_on_layer(layer, x, cache, place, accept)
        found.append(x)
    return found


@jax.jit
def _embedded(model: Model, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    return model.embed(tokens)


@jax.jit
def _read_on_layer(layer, x, cache: LayerCache, position, counted: Bool[Array, "B T"]):
    places = position[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    query, key, value = layer.before_attention(x, places)

    def step(cache, token):
        q, k, v, place, accept = token
        cache, output = read_token(cache, q[:, None], k[:, None], v[:, None], place, accept, latent_layer(layer))
        return cache, output[:, 0]

    stream = tuple(jnp.moveaxis(y, 1, 0) for y in (query, key, value, places, counted))
    cache, attention = jax.lax.scan(step, cache, stream)
    attention = jnp.moveaxis(attention, 0, 1)
    return layer.after_attention(x, attention), cache, attention


def read_on(
    model: Model, cache: KVCache, tokens: Int[Array, "B T"], counts: Int[Array, "B"]
) -> tuple[Float[Array, "B T D"], KVCache]:
    """What a `decode_step` a token leaves: hidden states before the last norm, and the cache.

    Args:
        model: the model.
        cache: of B sequences, each with room for its tokens.
        tokens: known in advance, padded on the right.
        counts: true numbers of tokens. Hidden states past them are meaningless.
    """
    return _read_on(for_method(model, cache.config), cache, tokens, counts)


def _read_on(model: Model, cache: KVCache, tokens: Int[Array, "B T"], counts) -> tuple[Array, KVCache]:
    counts = jnp.asarray(counts, jnp.int32)
    counted = jnp.arange(tokens.shape[1])[None] < counts[:, None]
    if _shares(model):
        return _read_token_by_token(model, cache, tokens, counted)
    x, layers = _embedded(model, tokens), []
    for layer, held in zip(model.layers, cache.layers):
        x, held, _ = _read_on_layer(layer, x, held, cache.lengths, counted)
        layers.append(held)
    return x, cache.after(layers, counts)


@jax.jit
def _read_token_by_token(model: Model, cache: KVCache, tokens, counted) -> tuple[Float[Array, "B T D"], KVCache]:
    def step(cache, token):
        token, accept = token
        x, cache = through_layers(model, cache, model.embed(token[:, None]), accept)
        return cache, x[:, 0]

    cache, x = jax.lax.scan(step, cache, (jnp.moveaxis(tokens, 1, 0), jnp.moveaxis(counted, 1, 0)))
    return jnp.moveaxis(x, 0, 1), cache


def attention_errors(
    model: Model, full: KVCache, caches: Mapping[str, KVCache], tokens: Int[Array, "B T"]
) -> dict[str, np.ndarray]:
    """Relative error of each layer's attention output, [B, layers], when all layers get the full cache's inputs."""
    counted = jnp.ones(tokens.shape, bool)
    x, errors = _embedded(model, tokens), {name: [] for name in caches}
    models = {name: for_method(model, cache.config) for name, cache in caches.items()}
    sharing = [name for name, own in models.items() if _shares(own)]
    if sharing:
        raise ConfigError(f"Layers of {', '.join(sharing)} read other layers' caches: their errors are not their own.")
    for i, layer in enumerate(model.layers):
        following, _, exact = _read_on_layer(layer, x, full.layers[i], full.lengths, counted)
        exact = exact.astype(jnp.float32)
        for name, cache in caches.items():
            _, _, found = _read_on_layer(models[name].layers[i], x, cache.layers[i], cache.lengths, counted)
            errors[name].append(_size(found.astype(jnp.float32) - exact) / _size(exact))
        x = following
    return {name: np.stack(jax.device_get(found), axis=1) for name, found in errors.items()}


def received(model: Model, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], rows: ScoreRows) -> np.ndarray:
    """Attention that each token receives from all of a prompt's rows or from its last ones, [B, layers, K, T]."""
    scores = [read[rows][3] for read in read_layers(model, tokens, lengths, [rows])]
    return np.stack(jax.device_get(scores), axis=1)


def _size(x: Float[Array, "B T N H"]) -> Float[Array, "B"]:
    return jnp.sqrt(jnp.sum(x * x, axis=(1, 2, 3)))


@jax.jit
def best(model: Model, x: Float[Array, "B T D"], index: Int[Array, "B"]) -> Int[Array, "B"]:
    """The most likely token after the one at `index` of each sequence, from hidden states."""
    return jnp.argmax(logits_at(model, x, index), axis=-1).astype(jnp.int32)


def write_on(
    model: Model, cache: KVCache, first: Int[Array, "B"], most: int, ends: Sequence[int] = ()
) -> tuple[np.ndarray, KVCache]:
    """Greedy decoding: [B, most] tokens of which `first` is the first; after one of `ends` a sequence repeats it."""
    token, written = first, [first]
    one = jnp.ones(first.shape, jnp.int32)
    stop = jnp.asarray(tuple(ends) or (-1,))
    ended = jnp.isin(token, stop)
    while len(written) < most and not (ends and bool(ended.all())):
        x, cache = read_on(model, cache, token[:, None], one)
        token = jnp.where(ended, token, best(model, x, one - 1))
        ended |= jnp.isin(token, stop)
        written.append(token)
    written += [token] * (most - len(written))
    return np.stack(jax.device_get(written), axis=1), cache


@dataclasses.dataclass(frozen=True)
class Figures:
    """Of the token after each one read, [B, T].

    Attributes:
        kl: nats, of this distribution from the full cache's.
        agrees: both most likely tokens are the same.
        nll: minus log probability of the token that does follow, and
        nll_full: the same with the full cache.
        best: the most likely token.
    """

    kl: np.ndarray
    agrees: np.ndarray
    nll: np.ndarray
    nll_full: np.ndarray
    best: np.ndarray


@jax.jit
def _figures(model: Model, hidden, reference, targets):
    def one(token):
        x, y, target = token
        log_p, log_q = (jax.nn.log_softmax(model.logits(z[None, None])[0, 0]) for z in (y, x))
        kl = jnp.maximum(jnp.sum(jnp.exp(log_p) * (log_p - log_q)), 0)
        best = jnp.argmax(log_q)
        return kl, best == jnp.argmax(log_p), -log_q[target], -log_p[target], best

    flat = (hidden.reshape(-1, hidden.shape[-1]), reference.reshape(-1, hidden.shape[-1]), targets.reshape(-1))
    found = jax.lax.map(one, flat, batch_size=128)
    return [x.reshape(targets.shape) for x in found]


def figures(model: Model, hidden, reference, targets: Int[Array | np.ndarray, "B T"]) -> Figures:
    """Compares next-token distributions; `reference` are the full cache's hidden states."""
    return Figures(*map(np.asarray, jax.device_get(_figures(model, hidden, reference, targets))))


# ---- what it weighs ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Weight:
    """What a cache weighs, beside the bits of a bfloat16 one (16 an element).

    Attributes:
        bytes: everything held, of one sequence.
        bits_per_element: of everything held: codes, metadata, window, scores, counters.
        bits_of_tiers: without window and counters, which is what papers count.
        bits_of_codes: of the tiers without scales and minima.
    """

    bytes: int
    bits_per_element: float
    bits_of_tiers: float
    bits_of_codes: float


def weight_in(model: Model, config: CacheConfig, prompt: int, generated: int) -> Weight:
    """`weight_of`, of the ranks that follow from the model's weights where a method has these."""
    return weight_of(model.config, with_latents_of(for_method(model, config), config), prompt, generated)


@functools.lru_cache(maxsize=4096)
def weight_of(model: ModelConfig, config: CacheConfig, prompt: int, generated: int) -> Weight:
    """Of the arrays that `prefill` makes for one prompt of these tokens with room for the generated ones.

    They are counted, not made: programs of a study work in larger ones, which change no result (`read_follows`).
    """
    config = config.replace(prompt_capacity=prompt, generated_capacity=generated)
    total, layers = planned_report(model, config, prompt, generated).total, model.num_layers
    heads = model.num_kv_heads, model.head_dim
    made = (planned_layer(config.of_layer(i), Shape.of(config, i, layers), *heads, config.dtype) for i in range(layers))
    codes = sum(nbytes(tier.codes) for x in made for tier in x.tiers)
    bits = 16 / total.bytes_bfloat16
    return Weight(total.bytes_held, total.bits_per_element, total.bytes_tiers * bits, codes * bits)
