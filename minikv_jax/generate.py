"""Writing answers to prompts: all at once, or one token at a time."""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
from jaxtyping import Array, Int

from minikv_jax.cache import KVCache
from minikv_jax.config import CacheConfig
from minikv_jax.decode import decode_loop, decode_step
from minikv_jax.errors import ConfigError
from minikv_jax.models.llama import Params
from minikv_jax.prefill import prefill
from minikv_jax.sampling import GREEDY, Sampling, sample


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
    return decode_loop(params, cache, token, key, sampling, max_new_tokens, tuple(eos_token_ids))


def _require_room(config: CacheConfig, max_new_tokens: int) -> None:
    if not 1 <= max_new_tokens <= config.generated_capacity + 1:
        raise ConfigError(
            f"max_new_tokens={max_new_tokens} must be from 1 to generated_capacity + 1 = "
            f"{config.generated_capacity + 1}: change one of them."
        )
