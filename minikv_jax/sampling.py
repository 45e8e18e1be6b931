"""How the next token is drawn from logits: each sequence in its own way, all in one program.

What of a `Sampling` is in use is static, its values are arrays: other values need no compilation, and what is not in
use costs nothing.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from minikv_jax.errors import ConfigError, shortened
from minikv_jax.inputs import is_concrete


class _Rule(NamedTuple):
    """What a field takes. Where it is `unused`, it is as if there were none."""

    dtype: type
    unused: float | tuple | None
    fits: Callable[[Any], Any]
    wanted: str
    axes: str = "B"


_RULES = {
    "temperature": _Rule(np.float32, 0.0, lambda x: (x >= 0) & (x < np.inf), "finite numbers of at least 0"),
    "top_k": _Rule(np.int32, 0, lambda x: x >= 0, "whole numbers of at least 0"),
    "top_p": _Rule(np.float32, 1.0, lambda x: (x > 0) & (x <= 1), "numbers above 0 and at most 1"),
    "min_p": _Rule(np.float32, 0.0, lambda x: (x >= 0) & (x <= 1), "numbers from 0 to 1"),
    "repetition_penalty": _Rule(np.float32, 1.0, lambda x: (x > 0) & (x < np.inf), "finite numbers above 0"),
    "presence_penalty": _Rule(np.float32, 0.0, lambda x: abs(x) < np.inf, "finite numbers"),
    "seed": _Rule(np.uint32, None, lambda x: x >= 0, "whole numbers from 0 to 2**32 - 1"),
    "stop_tokens": _Rule(np.int32, None, lambda x: x >= -1, "token ids, and -1 for none", "n"),
    "logit_mask": _Rule(np.bool_, None, lambda x: x | True, "True or False for every token of the vocabulary", "V"),
}


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. A value is one number for all sequences, or an array [B] of one for each.

    In this order: the mask, the penalties, the temperature, top_k, top_p, min_p. The default of a field means that it
    is not in use; an array is in use whatever it holds, and may hold the default for some sequences.

    Attributes:
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_p: draw only among the most likely tokens that together have this probability.
        top_k: draw only among so many most likely tokens, and those as likely as the last of them; 0: among all.
        min_p: draw only among tokens at least this share as likely as the likeliest.
        repetition_penalty: positive logits of tokens that this call has read or written are divided by it, negative
            ones multiplied (CTRL, arXiv 1909.05858, section 4.1).
        presence_penalty: what is subtracted from logits of tokens that this call has written.
        seed: from 0 to 2**32 - 1. A seeded sequence's draws depend on it and on positions alone: they are the same by
            itself and in any batch, at once and in pieces. None: the draws are those of the call's own seed.
        stop_tokens: [n], or [B, n] with -1 where a sequence has fewer: more tokens that end a sequence.
        logit_mask: bool [V] or [B, V], true for tokens that may be drawn.

    Raises:
        ConfigError: concrete values out of range. A traced one gives its sequence the token -1.
    """

    temperature: Any = 0.0
    top_p: Any = 1.0
    top_k: Any = 0
    min_p: Any = 0.0
    repetition_penalty: Any = 1.0
    presence_penalty: Any = 0.0
    seed: Any = None
    stop_tokens: Any = None
    logit_mask: Any = None

    def __post_init__(self):
        for name, rule in _RULES.items():
            _check(name, vars(self)[name], rule)

    def tree_flatten(self):
        values = ((vars(self)[name], rule) for name, rule in _RULES.items())
        return tuple(None if _is_unused(x, rule) else _as_array(x, rule) for x, rule in values), None

    @classmethod
    def tree_unflatten(cls, _, values):
        new = object.__new__(cls)
        for (name, rule), value in zip(_RULES.items(), values, strict=True):
            object.__setattr__(new, name, rule.unused if value is None else value)
        return new

    @property
    def in_use(self) -> tuple[str, ...]:
        """Names of the fields that are."""
        return tuple(name for name, x in zip(_RULES, self.tree_flatten()[0]) if x is not None)


def _is_unused(value: Any, rule: _Rule) -> bool:
    return value is None or (isinstance(value, int | float) and value == rule.unused)


def _as_array(value: Any, rule: _Rule) -> Any:
    """The value in the field's dtype; traced ones, and what else JAX puts into pytrees, as they are."""
    if isinstance(value, jax.Array):
        return value.astype(rule.dtype) if is_concrete(value) and value.dtype != rule.dtype else value
    numbers = isinstance(value, int | float | list | tuple | np.ndarray | np.generic)
    return np.asarray(value, rule.dtype) if numbers else value


def _check(name: str, value: Any, rule: _Rule) -> None:
    if value is None and rule.unused is None:
        return
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    kinds = {np.bool_: (np.bool_,), np.float32: (np.integer, np.floating)}.get(rule.dtype, (np.integer,))
    axes = array.ndim - (rule.axes != "B")
    fits = any(jnp.issubdtype(array.dtype, kind) for kind in kinds) and axes in (0, 1)
    if fits and is_concrete(array):
        array = np.asarray(jax.device_get(array))
        whole = np.iinfo(rule.dtype).max if np.issubdtype(rule.dtype, np.integer) else np.inf
        fits = bool(np.all(rule.fits(array) & (array <= whole)))
    if not fits:
        shapes = "one or [B]" if rule.axes == "B" else f"[{rule.axes}] or [B, {rule.axes}]"
        given = " ".join(shortened(value).split())
        raise ConfigError(f"{name}={given}: give {rule.wanted}, {shapes}.")


GREEDY = Sampling()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seen:
    """Which tokens a call has met, for penalties: those it `read` or wrote, and those it has `written`."""

    read: Bool[Array, "B V"]
    written: Bool[Array, "B V"]

    def with_token(self, token: Int[Array, "B"]) -> "Seen":
        """With one more token written of each sequence; -1 is none."""
        new = token[:, None] == jnp.arange(self.read.shape[1])
        return Seen(self.read | new, self.written | new)


def seen_in(sampling: Sampling, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], vocabulary: int) -> Seen | None:
    """The tokens that were read before the first is drawn; None where no penalty is in use."""
    if not {"repetition_penalty", "presence_penalty"} & set(sampling.in_use):
        return None
    tokens, lengths = jnp.asarray(tokens), jnp.asarray(lengths)
    ids = jnp.where(jnp.arange(tokens.shape[1])[None] < lengths[:, None], tokens, vocabulary)
    nothing = jnp.zeros((tokens.shape[0], vocabulary), bool)
    return Seen(nothing.at[jnp.arange(tokens.shape[0])[:, None], ids].set(True, mode="drop"), nothing)


class Written(NamedTuple):
    """Tokens and how likely they were, by the model's own logits: before masks, penalties and temperature.

    Attributes:
        tokens: int32 [B, N], or [B] of one step.
        log_probs: float32 [B, N], natural logarithms; NaN where no token was drawn.
        top_tokens: int32 [B, N, n], the most likely ones, likeliest first; -1 where no token was drawn.
        top_log_probs: float32 [B, N, n].
    """

    tokens: Int[Array, "B *N"]
    log_probs: Float[Array, "B *N"]
    top_tokens: Int[Array, "B *N n"]
    top_log_probs: Float[Array, "B *N n"]


def with_log_probs(logits: Float[Array, "B V"], token: Int[Array, "B"], top: int | None) -> Array | Written:
    """The tokens that were drawn from logits, and unless `top` is None their log-probabilities and those of the top."""
    if top is None:
        return token
    every = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(every, token[:, None], axis=-1, mode="clip")[:, 0]
    values, ids = jax.lax.top_k(every, top)
    drawn = (token >= 0) & ~jnp.isnan(chosen)
    ids = jnp.where(drawn[:, None], ids, -1).astype(jnp.int32)
    return Written(token, jnp.where(drawn, chosen, jnp.nan), ids, jnp.where(drawn[:, None], values, jnp.nan))


def is_stop(token: Int[Array, "B"], sampling: Sampling) -> Bool[Array, "B"]:
    """Whether each token is one of its sequence's `stop_tokens`."""
    stops = jnp.atleast_2d(sampling.stop_tokens)
    if stops.shape[0] not in (1, token.shape[0]):
        raise ConfigError(
            f"stop_tokens has shape {stops.shape}, there are {token.shape[0]} sequences: give [n] or [B, n]."
        )
    return ((token[:, None] == stops) & (stops >= 0)).any(axis=1)


def sample(
    logits: Float[Array, "B V"],
    key: Array,
    sampling: Sampling,
    positions: Int[Array, "B"] | None = None,
    seen: Seen | None = None,
) -> Int[Array, "B"]:
    """Token ids drawn from next-token logits, int32.

    Args:
        logits: of the next token.
        key: of the draws of sequences without a seed of their own.
        sampling: how they are drawn.
        positions: of the tokens to be drawn (`cache.lengths` after the step), for `seed`.
        seen: for penalties (`seen_in`).

    Returns:
        The tokens; -1, which is no token, where any of a row's logits is NaN or its sampling is out of range, and where
        a mask allows none.

    Raises:
        ConfigError: an array of another number of sequences or tokens; seeds without positions, penalties without seen.
    """
    values = {name: x for name, x in zip(_RULES, sampling.tree_flatten()[0]) if x is not None}
    used = values.keys()
    if not used - {"stop_tokens", "top_k", "top_p", "min_p", "seed"}:
        best = jnp.argmax(logits, axis=-1, keepdims=True)  # of NaN and numbers it is NaN
        chosen = jnp.take_along_axis(logits, best, axis=-1, mode="promise_in_bounds")
        return jnp.where(jnp.isnan(chosen), -1, best)[:, 0].astype(jnp.int32)
    rows = {name: _by_row(name, x, logits) for name, x in values.items() if name != "stop_tokens"}
    broken = jnp.isnan(logits).any(axis=-1)
    for name in rows:
        broken |= ~jnp.reshape(_RULES[name].fits(rows[name]), (len(logits), -1)).all(axis=1)
    if "logit_mask" in rows:
        logits = jnp.where(rows["logit_mask"], logits, -jnp.inf)
        broken |= jnp.isneginf(logits).all(axis=-1)
    logits = _penalised(logits, rows, seen)
    token = jnp.argmax(logits, axis=-1)
    if "temperature" in rows:
        cold = rows["temperature"] == 0
        logits = _cut(logits / jnp.where(cold, 1, rows["temperature"]), rows)
        token = jnp.where(cold[:, 0], token, _drawn(logits, key, rows.get("seed"), positions))
    return jnp.where(broken, -1, token).astype(jnp.int32)


def _by_row(name: str, value: Array, logits: Float[Array, "B V"]) -> Array:
    """[B, 1] of a number for each sequence, [B, V] of a mask."""
    value, (b, v) = jnp.asarray(value), logits.shape
    allowed = ((v,), (b, v)) if name == "logit_mask" else ((), (b,))
    if value.shape not in allowed:
        raise ConfigError(f"{name} has shape {value.shape}: for these logits give one of {allowed}.")
    return jnp.broadcast_to(
        value if name == "logit_mask" else value.reshape(-1, 1), (b, v if name == "logit_mask" else 1)
    )


def _penalised(logits: Float[Array, "B V"], rows: dict[str, Array], seen: Seen | None) -> Float[Array, "B V"]:
    if not rows.keys() & {"repetition_penalty", "presence_penalty"}:
        return logits
    if seen is None:
        raise ConfigError("Penalties need to know which tokens there were: give sample `seen`, as `seen_in` makes it.")
    if "repetition_penalty" in rows:
        penalty = rows["repetition_penalty"]
        weaker = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = jnp.where(seen.read, weaker, logits)
    if "presence_penalty" in rows:
        logits = jnp.where(seen.written, logits - rows["presence_penalty"], logits)
    return logits


def _cut(logits: Float[Array, "B V"], rows: dict[str, Array]) -> Float[Array, "B V"]:
    """The logits with -inf for tokens that are not among the likely ones."""
    v = logits.shape[1]
    if rows.keys() & {"top_k", "top_p"}:
        best_first = jnp.sort(logits, axis=-1, descending=True)
        if "top_k" in rows:
            last = jnp.where(rows["top_k"] > 0, jnp.minimum(rows["top_k"], v), v) - 1
            least = jnp.take_along_axis(best_first, last, axis=-1, mode="clip")
            best_first, logits = (jnp.where(x >= least, x, -jnp.inf) for x in (best_first, logits))
        if "top_p" in rows:
            before = jnp.cumsum(jax.nn.softmax(best_first, axis=-1), axis=-1) - jax.nn.softmax(best_first, axis=-1)
            least = jnp.min(jnp.where(before < rows["top_p"], best_first, jnp.inf), axis=-1, keepdims=True)
            logits = jnp.where(logits >= least, logits, -jnp.inf)
    if "min_p" in rows:
        least = logits.max(axis=-1, keepdims=True) + jnp.log(rows["min_p"])
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return logits


def _drawn(logits: Float[Array, "B V"], key: Array, seed: Array | None, positions) -> Int[Array, "B"]:
    if seed is None:
        return jax.random.categorical(key, logits, axis=-1)
    if positions is None:
        raise ConfigError("Seeds of sequences need positions: give sample those of the tokens to be drawn.")

    def one(row, seed, position):
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), position), row)

    return jax.vmap(one)(logits, seed[:, 0].astype(jnp.uint32), positions)
