"""One kernel on small shapes: `compute-sanitizer --tool racecheck python tests/sanitized.py two_pass:triton`.

Prints a line a call that ran; test_sanitizer.py counts them.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import draws
import jax
import jax.numpy as jnp
import test_packed_append as append
import test_packed_decode as decode

from pallas_kernels.packed_append.api import packed_append, packed_write
from pallas_kernels.packed_decode.api import Part, decode_attention, packed_decode_attention
from pallas_kernels.two_pass_attention.api import two_pass_attention

RNG = draws.rng()


def two_pass(implementation):
    lengths = jnp.asarray([200, 133], jnp.int32)
    ragged = {"query_lengths": lengths, "key_value_lengths": lengths}
    for h in (64, 128):
        query, key, value = (jnp.asarray(RNG.standard_normal((2, 200, n, h)), jnp.bfloat16) for n in (4, 2, 2))
        for options in ({}, ragged | {"score_rows": 64}):
            yield partial(two_pass_attention, query, key, value, implementation=implementation, **options)
        if implementation == "triton":
            yield partial(two_pass_attention, query, key, value, implementation="triton", sliding_window=50, **ragged)


def packed_decode(implementation):
    formats = ("2-bit", "3 and 2 bits, fp8") if implementation == "triton" else ("2-bit",)
    for name in formats:
        keys, values = decode.segment(RNG, 2, 2, 3, 128, decode.FORMATS[name])
        query = jnp.asarray(RNG.standard_normal((2, 1, 8, 128)), jnp.bfloat16)
        lengths = jnp.asarray([384, 100])
        yield partial(packed_decode_attention, query, keys, values, lengths, implementation=implementation)
    if implementation == "triton":
        window = jnp.asarray(RNG.standard_normal((2, 2, 128, 128)), jnp.bfloat16)
        parts = [Part(query, keys, values, lengths), Part(query, window, window, jnp.asarray([5, 128]))]
        yield partial(decode_attention, parts)


def appending(implementation):
    # A chain of channels takes racecheck minutes: the last one is small.
    for name, heads, h in (("2-bit", 2, 128), ("3 and 2 bits, fp8, clipped", 2, 128), ("by feedback", 1, 64)):
        codec = append.CODECS[name]
        new, accept, rows, filled, packed, length = append.draw_append(RNG, codec, h=h, heads=heads, dtype=jnp.bfloat16)
        arguments = (*new, accept, *rows, filled, packed.keys, packed.values, length)
        options = append.options(packed)
        yield partial(packed_append, *arguments, options=options, implementation=implementation)
    packed = append.segment(RNG, append.CODECS["KIVI's groups"], 3, 2, 3, 64)
    zero, when = jnp.zeros(3, jnp.int32), jnp.asarray([True, False, True])
    key = append.Run(append.numbers(RNG, 3, 2, 128, 64), zero, zero, when, 128)
    value = append.Run(append.numbers(RNG, 3, 2, 129, 64), zero, zero, when, 1)
    yield partial(packed_write, key, value, packed.keys, packed.values, implementation=implementation)


CALLS = {"two_pass": two_pass, "packed_decode": packed_decode, "packed_append": appending}

if __name__ == "__main__":
    op, implementation = sys.argv[1].split(":")
    for call in CALLS[op](implementation):
        jax.block_until_ready(jax.jit(lambda call=call: call())())
        print("ran", flush=True)
