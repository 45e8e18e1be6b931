"""Drafts from the prompt itself, verified several at once on a compressed cache: the same tokens, sooner.

    python examples/speculate.py [TEXT] [--method minikv_plus] [--tokens 128] [--drafts 8]

Answers about a text often repeat it. Prompt lookup (github.com/apoorvumang/prompt-lookup-decoding) drafts what followed
the last few tokens when they were met before; one `extend` reads the drafts and gives the logits after each of them
(`all_logits`), and what the model would not have written is taken back (`rollback`). There are no more drafts than can
be read before the method encodes or gives up a token (`draft_limit`), so that what is taken back leaves no trace.
"""

import argparse
import functools
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from minikv_jax import draft_limit, extend, generate, load, prefill, presets, program, rollback

TEXT = Path(__file__).parent / "texts" / "pride_and_prejudice.txt"


def drafted(ids: Sequence[int], most: int, longest: int = 3) -> list[int]:
    """What followed the last few of the tokens where they were met last; [] if they are new."""
    for size in range(longest, 0, -1):
        last = list(ids[-size:])
        for start in range(len(ids) - size - 1, -1, -1):
            if list(ids[start : start + size]) == last:
                return list(ids[start + size : start + size + most])
    return []


@functools.partial(jax.jit, donate_argnames="cache")
def verify(params, cache, tokens, count):
    """Reads the last token and `count` - 1 drafts of one sequence [1, T]; keeps those the model would have written.

    Returns:
        The model's own tokens [T] after each one read, how many of them are new, the cache, and its next draft_limit.
    """
    logits, cache = extend(params, cache, tokens, count, all_logits=True)
    own = logits[0].argmax(-1).astype(jnp.int32)
    right = (own[:-1] == tokens[0, 1:]) & (jnp.arange(1, tokens.shape[1]) < count[0])
    kept = 1 + jnp.cumprod(right).sum()
    cache = rollback(cache, count - kept)
    return own, kept, cache, draft_limit(cache)[0]


def speculate(params, ids: Sequence[int], config, new_tokens: int, drafts: int) -> tuple[list[int], int]:
    """The greedy answer of `new_tokens` tokens, and in how many calls of the model it was written after its first."""
    prompt = np.asarray([ids])
    logits, cache = prefill(params, prompt, np.asarray([len(ids)]), config)
    written, limit, calls = [int(logits[0].argmax())], int(draft_limit(cache)[0]), 0
    while len(written) < new_tokens:
        most = min(drafts, limit - 1, new_tokens - len(written) - 1)
        guess = drafted([*ids, *written], most) if most > 0 else []
        tokens = np.zeros((1, drafts + 1 if guess else 1), np.int32)
        tokens[0, : len(guess) + 1] = written[-1], *guess
        own, kept, cache, limit = verify(params, cache, tokens, np.asarray([len(guess) + 1]))
        written += np.asarray(own)[: int(kept)].tolist()
        limit, calls = int(limit), calls + 1
    return written, calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", type=Path, default=TEXT)
    parser.add_argument("--method", default="minikv_plus")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--drafts", type=int, default=8)
    asked = parser.parse_args()
    model, tokenizer = load("smollm2")
    passage = asked.text.read_text(encoding="utf-8").strip()[:1500]
    ids = tokenizer(f"{passage}\n\n{passage}\n\n{passage[:200]}")["input_ids"]  # an answer that quotes
    (config,) = presets.parse(asked.method).values()
    config = config.replace(generated_capacity=asked.tokens + asked.drafts)
    prompt, lengths = np.asarray([ids]), np.asarray([len(ids)])

    def timed(answer):
        answer()  # compiles
        start = time.perf_counter()
        return answer(), time.perf_counter() - start

    def plain():
        return np.asarray(generate(model, prompt, lengths, config, asked.tokens)[0])[0].tolist()

    jax.block_until_ready(prefill(model, prompt, lengths, config))
    _, reading = timed(lambda: jax.block_until_ready(prefill(model, prompt, lengths, config)))
    without, seconds = timed(plain)
    (written, calls), sooner = timed(lambda: speculate(model, ids, config, asked.tokens, asked.drafts))
    print(tokenizer.decode(written))
    print(
        f"{asked.method}, {len(ids)} tokens read: {asked.tokens} tokens in {calls} calls, {sooner - reading:.2f} s; "
        f"one by one in {seconds - reading:.2f} s, {(seconds - reading) / (sooner - reading):.2f} times as long; "
        f"{'the same tokens' if written == without else 'other tokens'}."
    )


if __name__ == "__main__":
    program.run(main)
