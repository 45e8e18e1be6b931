"""Bases: linear maps of a head's channels in which a layer holds keys and values, and the way back.

A basis is a static value. What it learns of a prompt (`fit`) is its state, a pytree or None, which the layer carries.
A method names its bases in the order in which keys and values go through them.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minikv_jax.checks import require
from minikv_jax.codec import Codec, through
from pallas_kernels.hadamard import rotate, rotate_back, times_channels, times_unit
from pallas_kernels.rows import below


class Moments(NamedTuple):
    """Second moments of what reads keys and values, per key/value head, float32. A positive factor changes nothing.

    Attributes:
        query: sum of query^T query over a prompt's queries, which read keys.
        output: sum of W W^T over the query heads' rows W of the output projection, which read values; None where it is
            not known.
    """

    query: Float[Array, "B K H H"]
    output: Float[Array, "B K H H"] | None


class Units(NamedTuple):
    """What one in a layer's keys and values stands for: a power of two for each head, float32."""

    key: Float[Array, "B K"]
    value: Float[Array, "B K"]


@dataclasses.dataclass(frozen=True)
class Basis:
    """The identity; a basis overrides what it changes."""

    def check(self, codecs: tuple[Codec, ...]) -> None:
        """Refuses, by ConfigError, codecs that cannot hold what is in this basis."""

    def takes(self, head_size: int) -> bool:
        """Whether heads of this size can be held in it."""
        return True

    def fit(
        self,
        key: Float[Array, "B K T H"],
        value: Float[Array, "B K T H"],
        moments: Moments,
        lengths: Int[Array, "B"],
        first: int,
    ) -> Any:
        """What the basis learns of a prompt.

        Args:
            key, value: of the prompt, zeros behind each sequence's length.
            moments: of what reads them.
            lengths: true lengths.
            first: the first row that may be encoded; rows before it stay dense.
        """

    def hold(
        self, state: Any, key: Float[Array, "B K T H"], value: Float[Array, "B K T H"], lengths: Int[Array, "B"]
    ) -> tuple[Float[Array, "B K T H"], Float[Array, "B K T H"]]:
        """Keys and values of a prompt as they are held."""
        return key, value

    def read(self, state: Any, moments: Moments) -> Moments:
        """Moments of what reads keys and values as they are held, from those of what reads them as they come."""
        return moments

    def take_in(
        self,
        state: Any,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K H"],
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """New tokens' keys and values as they are held, and queries as they meet the keys held."""
        return query, key, value

    def give_back(self, state: Any, output: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
        """The attention's output for the values as they came."""
        return output


@dataclasses.dataclass(frozen=True)
class Hadamard(Basis):
    """The Hadamard rotation, which spreads outlier channels (QuaRot, arXiv 2404.00456, section 3).

    Attributes:
        keys: rotate keys, and the queries that meet them.
        values: rotate values; the output is rotated back.
    """

    keys: bool = True
    values: bool = True

    def check(self, codecs: tuple[Codec, ...]) -> None:
        require(
            not self.keys or not any(codec.balance for codec in codecs),
            "A codec balances what is rotated already, and the rotation undoes it: put a Balance before the Hadamard.",
        )
        require(
            not self.keys or not any(codec.key_drop for codec in codecs),
            "A rotation mixes the channels that key_drop would tell apart: leave key_drop at 0, or out the rotation.",
        )
        require(any(not codec.dense for codec in codecs), "Rotation needs a tier of fewer than 16 bits.")

    def takes(self, head_size: int) -> bool:
        return head_size & (head_size - 1) == 0

    def hold(self, state, key, value, lengths):
        return _rotated(key, self.keys), _rotated(value, self.values)

    def read(self, state, moments):
        def rotated(moment, wanted):
            once = _rotated(moment, wanted)
            return jnp.swapaxes(_rotated(jnp.swapaxes(once, -1, -2), wanted), -1, -2)

        query, output = moments
        return Moments(rotated(query, self.keys), None if output is None else rotated(output, self.values))

    def take_in(self, state, query, key, value):
        if self.keys and self.values:  # one product for all three: a launch costs more than its work
            heads = query.shape[2], query.shape[2] + key.shape[2]
            together = _rotated(jnp.concatenate((query, key, value), axis=2), True)
            query, key, value = jnp.split(together, heads, axis=2)
            return query, key, value
        return _rotated(query, self.keys), _rotated(key, self.keys), _rotated(value, self.values)

    def give_back(self, state, output):
        if not self.values:
            return output
        b, _, n, _ = output.shape
        return rotate_back(output, jnp.ones((b, n), jnp.float32))


def _rotated(x: Float[Array, "... H"], wanted: bool) -> Float[Array, "... H"]:
    return rotate(x).astype(x.dtype) if wanted else x


class Factors(NamedTuple):
    """By what channels of keys and of values are multiplied: powers of two, bfloat16."""

    key: Float[Array, "B K H"]
    value: Float[Array, "B K H"]


@dataclasses.dataclass(frozen=True)
class Balance(Basis):
    """Channels of keys and values scaled against what reads them, before a rotation spreads their errors over all.

    Spread evenly, the error of keys costs the sum of squared queries times that of squared keys. It is least, and the
    same however a model scales its channels, once each channel of keys is multiplied by sqrt(rms(query) / rms(key)) and
    that of queries divided by it. MiKV (arXiv 2402.18096, equation 2) has maxima in the place of root mean squares, and
    no rotation behind. Feedback (`Codec.key_feedback`) changes that: as far as it moves errors to where queries do not
    look, all that counts is how far the step, which grows with the sum of squared keys, lies above the geometric mean
    of the channels, and 1 / rms(key) is best. Feedback does a part of that, and the factors used are the geometric mean
    of both: query^1/4 / key^3/4. It was the best of five such means on two models and a copy of each in other
    coordinates (`docs/quality.md`).

    Keys of a group share their minimum, so of keys only what varies within `group` tokens counts. A pair of channels
    with a large bias turns slowly or fast with the position, and costs little or much.

    Readers of values are the output projection's rows, and there is no feedback: sqrt(rms(row) / rms(value)). Where the
    projection is not known, what an error costs is taken to scale as the channel does: 1 / rms(value).

    Factors are powers of two, so that no digit is lost to them.

    Attributes:
        group: tokens whose keys share a minimum.
    """

    group: int = 64

    def fit(self, key, value, moments, lengths, first):
        key, value = (x[:, :, first:].astype(jnp.float32) for x in (key, value))
        tokens = lengths - first
        of_query = _log2_energy(_diagonal(moments.query), tokens)
        of_key = _log2_energy(*_within_groups(key, tokens, self.group))
        of_value = _log2_energy(jnp.square(value).sum(axis=2), tokens)
        of_row = -of_value
        if moments.output is not None:
            of_row = _log2_energy(_diagonal(moments.output), jnp.full_like(tokens, _CERTAIN))
        # Energies are squares: a fourth of a logarithm's difference is the square root of a ratio of amplitudes.
        return Factors(_power_of((of_query - 3 * of_key) / 8), _power_of((of_row - of_value) / 4))

    def hold(self, state, key, value, lengths):
        key, value = (x * factor[:, :, None].astype(x.dtype) for x, factor in zip((key, value), state))
        return key, value

    def read(self, state, moments):
        def scaled(moment, factor):
            factor = factor.astype(jnp.float32)
            return moment / (factor[..., None] * factor[..., None, :])

        query, output = moments
        return Moments(scaled(query, state.key), None if output is None else scaled(output, state.value))

    def take_in(self, state, query, key, value):
        query = times_channels(query, 1 / state.key)
        return query, times_channels(key, state.key), times_channels(value, state.value)

    def give_back(self, state, output):
        return times_channels(output, 1 / state.value)


# So many tokens that the one more of `_log2_energy` is nothing beside them: weights are known, not sampled.
_CERTAIN = 1 << 20


def _diagonal(moment: Float[Array, "B K H H"]) -> Float[Array, "B K H"]:
    return jnp.diagonal(moment, axis1=-2, axis2=-1)


def _within_groups(
    key: Float[Array, "B K T H"], tokens: Int[Array, "B"], group: int
) -> tuple[Float[Array, "B K H"], Int[Array, "B"]]:
    """Sums of squares of keys less their means over each whole group of tokens, and how many tokens these are.

    Where there is no whole group, of keys as they are.
    """
    b, k, longest, h = key.shape
    count = longest // group
    whole = jnp.maximum(tokens, 0) // group
    groups = key[:, :, : count * group].reshape(b, k, count, group, h)
    squares = jnp.square(groups - groups.mean(axis=3, keepdims=True)).sum(axis=3)
    within = jnp.where(below(whole, count)[:, None, :, None], squares, 0).sum(axis=2)
    some = whole > 0
    energy = jnp.where(some[:, None, None], within, jnp.square(key).sum(axis=2))
    return energy, jnp.where(some, whole * group, tokens)


def _power_of(exponent: Float[Array, "B K H"]) -> Float[Array, "B K H"]:
    """The nearest powers of two, their geometric mean over a head about 1."""
    return jnp.exp2(jnp.round(exponent - exponent.mean(axis=-1, keepdims=True))).astype(jnp.bfloat16)


def _log2_energy(squares: Float[Array, "B K H"], tokens: Int[Array, "B"]) -> Float[Array, "B K H"]:
    """log2 of each channel's sum of squares over so many tokens and one more, which has the head's mean everywhere.

    A channel that is silent in a few tokens need not stay so, and scaled up by what they say it would drown the others.
    """
    one_more = squares.mean(axis=-1, keepdims=True) / jnp.maximum(tokens, 1).astype(jnp.float32)[:, None, None]
    return jnp.log2(jnp.maximum(squares + one_more, jnp.finfo(jnp.float32).tiny))


@dataclasses.dataclass(frozen=True)
class PowersOfTwo(Basis):
    """Units of each head in which the prompt's largest number lies from 16 to 32.

    Metadata of 8 bits has little range. In these units scales of the loudest groups and of some hundred times quieter
    ones are held to their last digit, and later tokens may be fourteen times as loud as the prompt: after a prompt of a
    few tokens they often are several times as loud.
    """

    def fit(self, key, value, moments, lengths, first):
        # Rows that are never encoded may be louder than all others.
        return Units(*(_power(x[:, :, first:]) for x in (key, value)))

    def hold(self, state, key, value, lengths):
        key, value = (x / unit[..., None, None].astype(x.dtype) for x, unit in zip((key, value), state))
        return key, value

    def take_in(self, state, query, key, value):
        query = times_unit(query, state.key)
        return query, times_unit(key, 1 / state.key), times_unit(value, 1 / state.value)

    def give_back(self, state, output):
        return times_unit(output, state.value)


def _power(x: Float[Array, "B K T H"]) -> Float[Array, "B K"]:
    largest = jnp.abs(x).max(axis=(2, 3), initial=0).astype(jnp.float32)
    exponent = jnp.clip(jnp.frexp(largest)[1] - 5, -60, 60)
    return jnp.where(largest > 0, jnp.ldexp(jnp.float32(1), exponent), 1)


@dataclasses.dataclass(frozen=True)
class Quantized(Basis):
    """A codec that a prompt's keys and values go through before any tokens are chosen.

    The tiers hold what it gives back, so that dense ones have the numbers (not the bytes) of a cache that quantises
    first and then selects codes, whose groups keep the ranges of neighbours that left.

    Attributes:
        codec: the codec; tokens at a prompt's end that fill none of its groups stay as they are.
    """

    codec: Codec

    def takes(self, head_size: int) -> bool:
        return self.codec.fits(head_size)

    def hold(self, state, key, value, lengths):
        tokens, group = key.shape[2], self.codec.token_group
        more = ((0, 0), (0, 0), (0, -tokens % group), (0, 0))
        back = through(self.codec, jnp.pad(key, more), jnp.pad(value, more))
        whole = below(lengths // group * group, tokens)[:, None, :, None]
        key, value = (jnp.where(whole, new[:, :, :tokens].astype(x.dtype), x) for x, new in zip((key, value), back))
        return key, value


def fit(
    bases: tuple[Basis, ...],
    key: Float[Array, "B K T H"],
    value: Float[Array, "B K T V"],
    moments: Moments,
    lengths: Int[Array, "B"],
    first: int,
) -> tuple[tuple[Any, ...], Float[Array, "B K T H"], Float[Array, "B K T V"], Moments]:
    """The states of all bases, a prompt's keys and values as they are held, and how these are read."""
    states = []
    for basis in bases:
        states.append(basis.fit(key, value, moments, lengths, first))
        key, value = basis.hold(states[-1], key, value, lengths)
        moments = basis.read(states[-1], moments)
    return tuple(states), key, value, moments


def take_in(bases: tuple[Basis, ...], states: tuple[Any, ...], query, key, value):
    """`Basis.take_in` of all bases."""
    for basis, state in zip(bases, states):
        query, key, value = basis.take_in(state, query, key, value)
    return query, key, value


def give_back(bases: tuple[Basis, ...], states: tuple[Any, ...], output: Float[Array, "B T N H"]):
    """`Basis.give_back` of all bases."""
    for basis, state in reversed(list(zip(bases, states))):
        output = basis.give_back(state, output)
    return output


class Scales(NamedTuple):
    """What kernels that rotate scale by: units of heads, and balances of channels, if there are any."""

    key_unit: Float[Array, "B K"]
    value_unit: Float[Array, "B K"]
    key_balance: Float[Array, "B K H"] | None
    value_balance: Float[Array, "B K H"] | None


_OF_KERNELS = ((Hadamard,), (Hadamard, PowersOfTwo), (Balance, Hadamard), (Balance, Hadamard, PowersOfTwo))


def kernel_scales(bases: tuple[Basis, ...], states: tuple[Any, ...], batch: int, heads: int) -> Scales | None:
    """What kernels need to do all of it: where both are rotated, after a balance at most and before units at most."""
    new = [(type(basis), state) for basis, state in zip(bases, states) if type(basis) is not Quantized]
    if tuple(kind for kind, _ in new) not in _OF_KERNELS or Hadamard() not in bases:
        return None
    learnt: dict[type, Any] = dict(new)
    ones = jnp.ones((batch, heads), jnp.float32)
    return Scales(*learnt.get(PowersOfTwo, (ones, ones)), *learnt.get(Balance, (None, None)))
