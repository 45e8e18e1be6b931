"""Writing answers to prompts: all at once, or one token at a time."""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from minikv_jax import inputs
from minikv_jax.cache import KVCache
from minikv_jax.config import CacheConfig
from minikv_jax.decode import decode_loop, decode_step, is_end
from minikv_jax.errors import ConfigError
from minikv_jax.model import Params
from minikv_jax.prefill import prefill
from minikv_jax.sampling import GREEDY, Sampling, sample


@functools.partial(jax.jit, static_argnames="ends", donate_argnames="cache")
def _next(params: Params, cache: KVCache, token, ended, ends, key, step, sampling: Sampling):
    # What has ended asks for no token, so its sequence stays as it is.
    logits, cache = decode_step(params, cache, jnp.where(ended, -1, token))
    token = jnp.where(ended, token, sample(logits, jax.random.fold_in(key, step), sampling))
    return token, ended | is_end(token, ends), step + 1, cache


def stream(
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    cache_config: CacheConfig,
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    eos_token_ids: Sequence[int] = (),
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[Int[Array, "B"], KVCache]]:
    """Yields the new tokens [B] one step at a time, with the cache that led to them.

    The yielded cache is given away to the next step: read what you need before asking for the next token. With
    `eos_token_ids` a sequence that has ended repeats its last token, its cache stays as it is, and there are no more
    steps when all have ended. A sequence whose logits are NaN yields -1, as `generate`.

    Raises:
        PromptError, ConfigError: as `generate`.
    """
    key, ends = _checked(cache_config, max_new_tokens, eos_token_ids, seed)
    # The arguments are checked at once, not when the first token is asked for.
    first = prefill(params, tokens, lengths, cache_config, progress=progress)
    return _stream(params, *first, max_new_tokens, sampling, ends, key)


def _stream(params, logits, cache: KVCache, max_new_tokens: int, sampling: Sampling, ends: tuple[int, ...], key):
    token = sample(logits, key, sampling)
    yield token, cache
    ended, step = is_end(token, ends), jnp.ones((), jnp.int32)
    for _ in range(1, max_new_tokens):
        if ends and bool(jax.device_get(ended.all())):
            return
        token, ended, step, cache = _next(params, cache, token, ended, ends, key, step, sampling)
        yield token, cache


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
        eos_token_ids: a sequence ends with one of these; the rest of its row repeats it, and its cache stays as it was
            when that came.
        seed: of the random draws, from 0 to 2**32 - 1.

    Returns:
        The new tokens [B, max_new_tokens], and the cache after them. A sequence whose logits are NaN has -1 from there
        on, which is no token: its weights, or what it was given, are broken.

    Raises:
        PromptError, ConfigError: as `prefill`; more new tokens than the cache has room for; a seed out of range.
    """
    key, ends = _checked(cache_config, max_new_tokens, eos_token_ids, seed)
    logits, cache = prefill(params, tokens, lengths, cache_config)
    token = sample(logits, key, sampling)
    return decode_loop(params, cache, token, key, sampling, max_new_tokens, ends)


def _checked(config: CacheConfig, max_new_tokens: int, eos_token_ids: Sequence[int], seed) -> tuple[Array, tuple]:
    """The key of the draws and the end tokens.

    Raises:
        ConfigError: more new tokens than there is room for, none, an end token that is no whole number, a bad seed.
    """
    if inputs.count(max_new_tokens, "max_new_tokens") > config.generated_capacity + 1:
        raise ConfigError(
            f"max_new_tokens={max_new_tokens} must be from 1 to generated_capacity + 1 = "
            f"{config.generated_capacity + 1}: change one of them."
        )
    return inputs.key_of(seed), tuple(inputs.count(x, "eos_token_ids", least=0) for x in eos_token_ids)
