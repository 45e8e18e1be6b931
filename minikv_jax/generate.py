"""Writing answers to prompts, or onto a cache: all at once, or one token at a time.

The last token that is written has not been read: the cache that comes back does not hold it. It is the first token of
what is read next, `jnp.concatenate([written[:, -1:], more], axis=1)`; so is an end token, which its row repeats.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from minikv_jax import inputs
from minikv_jax.cache import KVCache, in_both, with_lent, without_lent
from minikv_jax.config import CacheConfig
from minikv_jax.decode import decode_loop, decode_step, is_end, next_token
from minikv_jax.errors import ConfigError
from minikv_jax.extend import extend
from minikv_jax.model import Params
from minikv_jax.prefill import prefill
from minikv_jax.sampling import GREEDY, Sampling, Seen, Written, sample, seen_in, with_log_probs


@functools.partial(jax.jit, static_argnames=("ends", "top"), donate_argnames="cache")
def _next(params: Params, cache: KVCache, lent: KVCache | None, before, ends, key, step, sampling: Sampling, top):
    token, ended, _ = before
    # What has ended asks for no token, so its sequence stays as it is.
    logits, cache = decode_step(params, with_lent(cache, lent), jnp.where(ended, -1, token))
    token, seen, written = next_token(logits, cache, before, jax.random.fold_in(key, step), sampling, top)
    return written, (token, ended | is_end(token, ends, sampling), seen), step + 1, without_lent(cache, lent)


def stream(
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    config_or_cache: CacheConfig | KVCache,
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    eos_token_ids: Sequence[int] = (),
    seed: int = 0,
    log_probs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[Int[Array, "B"] | Written, KVCache]]:
    """Yields the new tokens [B] one step at a time, with the cache that led to them: what `generate` returns.

    The yielded cache does not hold the token beside it, and is given away to the next step: read what you need before
    asking for the next token. With `eos_token_ids` a sequence that has ended repeats its last token, its cache stays as
    it is, and there are no more steps when all have ended. `progress` is that of `prefill`; a cache goes on without it.

    Raises:
        PromptError, ConfigError: as `generate`.
    """
    key, ends = _checked(max_new_tokens, eos_token_ids, seed, sampling, log_probs)
    # The arguments are checked at once, not when the first token is asked for.
    first = _read(params, tokens, lengths, config_or_cache, max_new_tokens, progress)
    begun = _first(tokens, lengths, first, key, sampling, log_probs)
    return _stream(params, begun, max_new_tokens, sampling, ends, key, log_probs)


def _stream(params, begun: "_Begun", max_new_tokens: int, sampling: Sampling, ends: tuple[int, ...], key, top):
    cache, lent = begun.cache, begun.lent
    yield begun.written, with_lent(cache, lent)
    before = begun.token, is_end(begun.token, ends, sampling), begun.seen
    step, may_end = jnp.ones((), jnp.int32), ends or sampling.stop_tokens is not None
    for _ in range(1, max_new_tokens):
        if may_end and bool(jax.device_get(before[1].all())):
            return
        written, before, step, cache = _next(params, cache, lent, before, ends, key, step, sampling, top)
        yield written, with_lent(cache, lent)


def generate(
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    config_or_cache: CacheConfig | KVCache,
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    eos_token_ids: Sequence[int] = (),
    seed: int = 0,
    log_probs: int | None = None,
) -> tuple[Int[Array, "B max_new_tokens"] | Written, KVCache]:
    """Reads prompts, or more onto a cache, and writes up to `max_new_tokens` tokens each, all steps in one dispatch.

    Args:
        params: the model.
        tokens: [B, T] prompts, or what follows in the cache, padded on the right.
        lengths: [B] true lengths; onto a cache 0 too: such a sequence is left as it is.
        config_or_cache: the method and its capacities, for prompts; or a cache to go on from (`extend`), from wherever:
            another `generate`, a fork, slots. It stays the caller's and as it is; under `jit` it may be donated.
        max_new_tokens: at most `generated_capacity` + 1, or what a cache has room for, for the last token is not read.
        sampling: greedy by default.
        eos_token_ids: a sequence ends with one of these; the rest of its row repeats it, and its cache stays as it was
            when that came.
        seed: of the random draws of sequences that have none of their own (`Sampling.seed`), from 0 to 2**32 - 1.
        log_probs: None, or how many of the most likely tokens to give with each one written, 0 and more: a `Written`
            takes the tokens' place.

    Returns:
        The new tokens [B, max_new_tokens], and the cache after all but the last of them (see the module). A sequence
        without tokens, or whose logits are NaN, has -1 from there on, which is no token: its weights, or what it was
        given, are broken. A traced sequence without room for its tokens has -1 from where its room ends.

    Raises:
        PromptError, ConfigError: as `prefill` and `extend`; more new tokens than there is room for; a seed out of
            range.
    """
    key, ends = _checked(max_new_tokens, eos_token_ids, seed, sampling, log_probs)
    first = _read(params, tokens, lengths, config_or_cache, max_new_tokens)
    begun = _first(tokens, lengths, first, key, sampling, log_probs)
    of_cache = begun.lent, begun.seen
    written, cache = decode_loop(params, begun.cache, begun.written, key, sampling, max_new_tokens, ends, *of_cache)
    return written, with_lent(cache, begun.lent)


class _Begun(NamedTuple):
    """The first token [B] and what is written of it, the cache before it with what is lent to it, and what was seen."""

    token: Int[Array, "B"]
    written: Array | Written
    cache: KVCache
    lent: KVCache | None
    seen: Seen | None


def _first(tokens, lengths, first, key, sampling: Sampling, top: int | None) -> _Begun:
    """What `_read` returned, and the token drawn from its logits."""
    logits, cache, lent = first
    seen = seen_in(sampling, tokens, lengths, logits.shape[1])
    token = sample(logits, key, sampling, cache.lengths, seen)
    seen = None if seen is None else seen.with_token(token)
    return _Begun(token, with_log_probs(logits, token, top), cache, lent, seen)


def _read(
    params, tokens, lengths, config_or_cache: CacheConfig | KVCache, max_new_tokens: int, progress=None
) -> tuple[Array, KVCache, KVCache | None]:
    """Logits after the tokens, the cache without what is lent to it, and what is lent (`cache.with_lent`).

    Raises:
        PromptError, ConfigError: as `generate`.
    """
    if isinstance(config_or_cache, KVCache):
        inputs.check_room(lengths, max_new_tokens, config_or_cache)
        logits, cache = extend(params, config_or_cache, tokens, lengths)
        # Of arrays that nothing was written to there is no copy to give away.
        lent = in_both(cache, config_or_cache)
        return logits, without_lent(cache, lent), lent
    if isinstance(config_or_cache, CacheConfig) and max_new_tokens > config_or_cache.generated_capacity + 1:
        raise ConfigError(
            f"max_new_tokens={max_new_tokens} must be from 1 to generated_capacity + 1 = "
            f"{config_or_cache.generated_capacity + 1}: change one of them."
        )
    return *prefill(params, tokens, lengths, config_or_cache, progress=progress), None


def _checked(
    max_new_tokens: int, eos_token_ids: Sequence[int], seed, sampling: Sampling, log_probs: int | None
) -> tuple[Array, tuple[int, ...]]:
    """The key of the draws, and the end tokens.

    Raises:
        ConfigError: no new tokens, an end token that is no whole number, a bad seed, no number of log-probabilities.
    """
    inputs.count(max_new_tokens, "max_new_tokens")
    if log_probs is not None:
        inputs.count(log_probs, "log_probs", least=0)
    ends = tuple(inputs.count(x, "eos_token_ids", least=0) for x in eos_token_ids)
    # A sequence whose answer is no token has ended too.
    return inputs.key_of(seed), (*ends, -1) if ends or sampling.stop_tokens is not None else ()
