"""What `decode_step` compiles to: the cache is updated where it lies and read as it is stored."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from models import CONFIG

from minikv_jax import decode_step, empty_cache, presets
from minikv_jax.models.llama import Llama

# Long enough that XLA's path on a CPU cannot unpack a whole layer as one chunk.
PROMPT = 1 << 16
WIDE = CONFIG.replace(head_dim=64, num_layers=2, max_position_embeddings=1 << 20)


def compiled(config, donated: str | None = "cache", shape=WIDE) -> jax.stages.Compiled:
    """The compiled step for one sequence. Nothing is allocated."""
    model = jax.eval_shape(lambda: Llama(shape, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(params=0)))
    config = config.replace(prompt_capacity=PROMPT)
    cache = jax.eval_shape(lambda model: empty_cache(model, config, 1), model)
    token = jax.ShapeDtypeStruct((1,), jnp.int32)
    return jax.jit(decode_step, donate_argnames=donated).lower(model, cache, token).compile()


def materialised(text: str):
    """(opcode, dtype, numbers) of every instruction whose result is an array of its own: those outside of fusions."""
    for computation in re.split(r"\n(?=\S)", text):
        if re.match(r"%?(fused|wrapped|parallel)", computation):
            continue
        for dtype, shape, opcode in re.findall(r"= (\w+)\[([\d,]*)\]\S* ([\w-]+)\(", computation):
            yield opcode, dtype, math.prod(int(n) for n in shape.split(",") if n)


def copied(text: str, least: int) -> list:
    return [x for x in materialised(text) if x[0] in ("copy", "transpose", "copy-start") and x[2] >= least]


def check(config, rows: int):
    """No copy of a layer's keys or values as stored, and no image of them in floats; `rows` are those of one layer."""
    numbers = rows * WIDE.num_kv_heads * WIDE.head_dim
    bits = 16 if config.method.codec.dense else config.method.codec.key_bits
    stored = numbers if bits == 16 else numbers * bits // 8
    text = compiled(config).as_text()
    assert not copied(text, stored)
    floats = ("f32", "bf16", "f16")
    held = ("parameter", "get-tuple-element", "bitcast", "custom-call", "conditional", "while", "optimization-barrier")
    updated = ("dynamic-update-slice", "scatter", "fusion") if bits == 16 else ()
    images = [x for x in materialised(text) if x[1] in floats and x[2] >= numbers and x[0] not in held + updated]
    assert not images


@pytest.mark.parametrize("config", [presets.full(), presets.minikv()], ids=lambda config: config.name)
def test_the_cache_is_neither_copied_nor_unpacked(config):
    check(config, rows=PROMPT if config.method.codec.dense else PROMPT // 2)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="XLA then hid the copies inside fusions")
def test_a_cache_that_is_not_donated_is_copied():
    assert copied(compiled(presets.full(), donated=None).as_text(), PROMPT * WIDE.num_kv_heads * WIDE.head_dim)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["full", "minikv", "minikv_pyramid", "kivi", "h2o", "mikv"])
def test_the_cache_is_neither_copied_nor_unpacked_on_a_gpu(method):
    check(
        presets.METHODS[method](),
        rows={"full": PROMPT, "h2o": PROMPT // 5, "mikv": PROMPT // 5}.get(method, PROMPT // 3),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["h2o", "mikv"])
def test_logits_for_scores_are_there_for_one_layer_at_a_time(method):
    config, logits = presets.METHODS[method](), 4 * (PROMPT // 5) * WIDE.num_heads
    few, many = (
        compiled(config, shape=WIDE.replace(num_layers=n)).memory_analysis().temp_size_in_bytes for n in (2, 8)
    )
    assert logits < few and many < few + logits
