"""Continuous batching in sixty lines: a few slots, sequences that come and go, one compiled step for all of them.

    python examples/serve_loop.py

Prompts wait in a queue. A free slot takes the next one: its prompt is read by itself (`prefill`, in buckets of lengths
so that few programs are compiled) and its cache put into the slot (`insert`). All slots then decode together, several
steps a dispatch. A sequence that has ended is given no more tokens (-1), so its cache stays as it is until the slot is
freed (`reset`); the others never notice.
"""

import argparse
import functools
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from minikv_jax import CacheConfig, bucket, decode_step, empty_cache, insert, load, prefill, presets, program, reset
from minikv_jax.sampling import GREEDY, sample

STEPS = 8  # decoded between two looks at the queue


@functools.partial(jax.jit, static_argnames="ends", donate_argnames="cache")
def decode(params, cache, token, ends: tuple[int, ...]):
    """STEPS more tokens of every slot [STEPS, B], greedily: -1 after one of `ends`, and where a slot has no room."""

    def step(state, _):
        cache, token = state
        logits, cache = decode_step(params, cache, token)
        new = sample(logits, jax.random.key(0), GREEDY)
        return (cache, jnp.where(jnp.isin(new, jnp.asarray(ends, jnp.int32)), -1, new)), new

    (cache, token), tokens = jax.lax.scan(step, (cache, token), length=STEPS)
    return tokens, token, cache


def serve(params, prompts: Iterable[Sequence[int]], config: CacheConfig, slots: int, ends: Sequence[int]
          ) -> Iterator[tuple[int, list[int]]]:  # fmt: skip
    """Yields (number of the prompt, its answer) as sequences end, each after at most `generated_capacity` tokens."""
    put, clear = jax.jit(insert, donate_argnums=0), jax.jit(reset, donate_argnums=0)
    cache, token, ends = empty_cache(params, config, slots), jnp.full((slots,), -1), tuple(ends)
    queue, running = enumerate(prompts), {}
    while True:
        for slot in set(range(slots)) - set(running):
            number, prompt = next(queue, (None, ()))
            if number is None:
                break
            tokens = bucket(np.asarray([prompt]), limit=config.prompt_capacity)
            logits, prefix = prefill(params, tokens, np.asarray([len(prompt)]), config)
            cache, first = put(cache, slot, prefix), int(logits[0].argmax())
            token, running[slot] = token.at[slot].set(-1 if first in ends else first), (number, [first])
        if not running:
            return
        new, token, cache = decode(params, cache, token, ends)
        for slot, (number, answer) in list(running.items()):
            answer.extend(np.asarray(new)[:, slot].tolist())
            written = answer[: config.generated_capacity]
            last = next((i for i, t in enumerate(written) if t in ends or t < 0), config.generated_capacity - 1)
            if last < len(answer):
                yield number, answer[: last + 1]
                cache = clear(cache, slot)
                del running[slot]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    model, tokenizer = load("smollm2")
    questions = ["Name three colours.", "What is the capital of France?", "Is water wet?", "Count to five."]
    chats = [tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
             for q in questions]  # fmt: skip
    method = presets.minikv().replace(prompt_capacity=256, generated_capacity=40, dtype="bfloat16")
    ids = [tokenizer(chat, add_special_tokens=False)["input_ids"] for chat in chats]
    for number, answer in serve(model, ids, method, slots=2, ends=model.config.eos_token_ids):
        print(f"{questions[number]} {tokenizer.decode(answer, skip_special_tokens=True)}")


if __name__ == "__main__":
    program.run(main)
