"""Which layers of a model need more bits, and which hardly need a text at all: `minikv calibrate`.

Layers differ by two orders of magnitude in what two bits do to predictions. Those that look a single token up, often
one or two of a model, lose most of the right answers; others lose nothing when half of a prompt goes. So each layer's
cache is exchanged on its own for a finer and for a smaller one, and what that changes is measured where it
matters: on answers about records, and on texts. KVTuner (arXiv 2502.04420) searches bits per layer in this spirit,
DuoAttention (arXiv 2410.10819) tells retrieving from streaming heads.

Attention over a prompt is exact, so a layer's caches do not depend on the other layers': all are made once, and an
exchange costs reading the follow-ups through the layers from there on.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from minikv_jax import allocate, presets
from minikv_jax.cache import LayerCache, Shape
from minikv_jax.codec import Codec
from minikv_jax.compress import compress_in_pieces
from minikv_jax.config import Allocation, CacheConfig
from minikv_jax.errors import ConfigError
from minikv_jax.evals.engine import figures, fitted, read_layers
from minikv_jax.evals.records import CODES, counts, question, record, rng_of
from minikv_jax.evals.task import Lab, padded
from minikv_jax.evals.texts import passages
from minikv_jax.layer import read_tokens
from minikv_jax.model import Layer, Model
from minikv_jax.prefill import checked

_LINES = (10, 20, 50, 100, 200, 400, 800)
_QUESTIONS = 8


class LayerChoice(NamedTuple):
    """
    Attributes:
        gain: of each layer, how much of the loss goes away when it alone is precise.
        harm: of each layer, how much comes on top when it alone is brief.
        precise, brief: the layers chosen.
        loss: with both, where 1 is that of the cache without.
    """

    gain: list[float]
    harm: list[float]
    precise: tuple[int, ...]
    brief: tuple[int, ...]
    loss: float


@dataclasses.dataclass(frozen=True)
class _Reading:
    """Prompts of one kind, what follows each, and which of its predictions count."""

    prompts: list[Sequence[int]]
    follows: Int[np.ndarray, "B F"]
    lengths: Int[np.ndarray, "B"]
    counted: np.ndarray


def calibrate(
    lab: Lab, config: CacheConfig, precise: int, brief: int, progress: Callable[[int, int], None] | None = None
) -> LayerChoice:
    """Finds the layers that are worth more bits, and those that lose little by fewer tokens.

    The loss is the mean KL from the full cache's predictions, of answers about records and of texts, each divided by
    what it is when no layer is precise or brief.

    Args:
        lab: model, tokenizer, and settings: `limit` records and as many texts of `lengths[0]` tokens.
        config: a method some of whose layers have a codec of their own, which is that of precise layers, and some an
            allocation, which is that of brief ones.
        precise, brief: numbers of layers to choose; none is both.
        progress: called with (finished, all) exchanges.

    Raises:
        ConfigError: more layers than there are, or a method without the two.
    """
    layers = lab.model.config.num_layers
    if None in _exchanged(config):
        raise ConfigError("Calibration needs a method with a precise codec and a brief allocation, as minikv_plus has.")
    if min(precise, brief) < 0 or precise + brief > layers:
        raise ConfigError(f"{precise} precise and {brief} brief layers of {layers}: give fewer.")
    if lab.settings.new_tokens < 2:
        raise ConfigError("Calibration needs at least 2 tokens after a text: give more --new-tokens.")
    walks = [_Walk.of(lab, config, reading) for reading in (_records(lab), _texts(lab))]
    finished = 0

    def loss(chosen: dict[int, str]) -> float:
        nonlocal finished
        found = float(np.mean([walk.loss(lab.model, chosen) for walk in walks]))
        finished += 1
        if progress is not None:
            progress(finished, 2 * layers + 1)
        return found

    gain = [1 - loss({i: "precise"}) for i in range(layers)]
    harm = [loss({i: "brief"}) - 1 for i in range(layers)]
    first = sorted(range(layers), key=lambda i: -gain[i])[:precise]
    last = sorted((i for i in range(layers) if i not in first), key=lambda i: harm[i])[:brief]
    chosen = dict.fromkeys(first, "precise") | dict.fromkeys(last, "brief")
    return LayerChoice(gain, harm, tuple(sorted(first)), tuple(sorted(last)), loss(chosen))


def _exchanged(config: CacheConfig) -> tuple[Codec | None, Allocation | None]:
    """The codec and the allocation that some layers have instead of the method's."""
    plain, own = config.method, [method for _, method in config.layers]
    finer = (method.codec for method in own if method.codec != plain.codec)
    shorter = (method.allocation for method in own if method.allocation != plain.allocation)
    return next(finer, None), next(shorter, None)


def _records(lab: Lab) -> _Reading:
    """Records, and questions about them one after the other with their right answers."""
    lines = counts(lab, CODES, _LINES)
    if not lines:
        raise ConfigError(f"No record fits into {max(lab.settings.lengths)} tokens: give a longer --length.")
    prompts, follows, answers = [], [], []
    end = lab.ids(".\n")
    for i in range(lab.settings.limit):
        drawn = record(rng_of(lab, "calibrate", i), CODES, lines[-1], min(_QUESTIONS, lines[-1]))
        tokens, places = [], []
        for asked in drawn.questions:
            follow = question(lab, CODES, *asked)
            ((start, stop),) = follow.answers
            places += range(len(tokens) + start - 1, len(tokens) + stop - 1)
            tokens += [*follow.tokens, *end]
        prompts.append(lab.first_ids(drawn.text))
        follows.append(tokens)
        answers.append(places)
    rows, lengths = padded(follows)
    counted = np.zeros(rows.shape, bool)
    for row, places in zip(counted, answers):
        row[places] = True
    return _Reading(prompts, rows, lengths, counted)


def _texts(lab: Lab) -> _Reading:
    length, more = max(lab.settings.lengths), lab.settings.new_tokens
    found = [ids for _, ids in passages(lab, length + more)]
    rows, lengths = padded([ids[length:] for ids in found])
    return _Reading([ids[:length] for ids in found], rows, lengths, np.arange(more) < lengths[:, None] - 1)


@dataclasses.dataclass
class _Walk:
    """A reading with each layer's caches, the hidden states before each layer under the plain ones, and the base KL."""

    reading: _Reading
    lengths: Int[Array, "B"]
    kinds: dict[str, CacheConfig]
    caches: list[dict[str, LayerCache]]
    before: list[Float[Array, "B F D"]]
    full: Float[Array, "B F D"]
    base: float

    @classmethod
    def of(cls, lab: Lab, config: CacheConfig, reading: _Reading) -> "_Walk":
        plain, (finer, shorter) = config.replace(layers=()), _exchanged(config)
        kinds = {
            "plain": plain,
            "precise": plain.replace(codec=finer),
            "brief": plain.replace(allocation=shorter),
            "full": presets.full(),
        }
        room = reading.follows.shape[1]
        tokens, lengths = fitted(lab.model, reading.prompts, room, lab.prompt_step)
        tokens, lengths = jnp.asarray(tokens), jnp.asarray(lengths)
        changes = {"generated_capacity": room, "dtype": "bfloat16"}
        kinds = {name: checked(lab.model, tokens.shape[1], kind.replace(**changes)) for name, kind in kinds.items()}
        layers, caches = lab.model.config.num_layers, []
        for i, read in enumerate(read_layers(lab.model, tokens, lengths, ["all"])):
            _, *attended = read["all"]
            caches.append({})
            for name, kind in kinds.items():
                budget = allocate.budgets(kind, i, layers, lengths, tokens.shape[1])
                shape = Shape.of(kind, i, layers)
                caches[i][name] = compress_in_pieces(*attended, lengths, budget, kind.method, shape, kind.dtype)
        walk = cls(reading, lengths, kinds, caches, [], jnp.zeros(()), 1.0)
        walk.full = walk.through(lab.model, dict.fromkeys(range(layers), "full"))
        for layer in caches:
            del layer["full"]
        walk.base = walk.loss(lab.model, {}, keep=True)
        if not 0 < walk.base < math.inf:
            raise ConfigError(
                f"The method changes predictions by a KL of {walk.base}: there is nothing to calibrate, or the model's "
                "predictions are no numbers."
            )
        return walk

    def through(self, model: Model, chosen: dict[int, str], keep: bool = False) -> Float[Array, "B F D"]:
        """Hidden states after all layers, where those in `chosen` have that kind of cache and the others are plain."""
        layers = len(self.caches)
        first = min(chosen, default=0) if self.before else 0
        x = self.before[first] if self.before else model.embed(jnp.asarray(self.reading.follows))
        counts = jnp.asarray(self.reading.lengths)
        for i in range(first, layers):
            if keep:
                self.before.append(x)
            kind = chosen.get(i, "plain")
            x = _through(model.layers[i], x, self.caches[i][kind], self.lengths, counts)
        return x

    def loss(self, model: Model, chosen: dict[int, str], keep: bool = False) -> float:
        """KL of the predictions that count, over that of the plain caches."""
        hidden = self.through(model, chosen, keep)
        targets = np.roll(self.reading.follows, -1, axis=1)
        return float(figures(model, hidden, self.full, targets).kl[self.reading.counted].mean()) / self.base


@jax.jit
def _through(layer: Layer, x, cache: LayerCache, position, counts) -> Float[Array, "B F D"]:
    """The layer over tokens that go on from its cache, read at once."""
    tokens = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    query, key, value = layer.before_attention(x, position[:, None] + tokens)
    counted = tokens < counts[:, None]
    _, attention = read_tokens(cache, query, key, value, position, counts, counted)
    return layer.after_attention(x, attention)
