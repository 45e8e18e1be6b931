"""Google's Tunix on a compressed cache: its Llama3 and Qwen3 and its jitted Sampler, unchanged, by one short adapter.

    pip install --no-deps -r .ci/tunix.txt
    python examples/tunix_llama.py

`compress_cache(model, config)` is the adapter, and all that a program of one's own takes from here. It replaces one
method of the model's attention layers, `block`, and gives the model `init_cache`. Tunix pads prompts on the left, so
`attend` turns rows for `layer.prefill`, which takes them padded on the right, and turns its output back.

The rest of this file shows that it is right, on tiny models with random weights: prompts of four lengths and 300 new
tokens each, while the window of 128 tokens is encoded at least twice. It prints what was measured beside each bound,
and its exit code is 1 where one is missed.

What to know: Tunix hides a generated token that is the padding token from later ones; this cache does not, so
forbid that token or end with it; for the same reason prompts must not hold it inside. A batch of prompts of one token
each looks like a step and is none: give them a beginning token. And the adapter is for one device: it leaves out Tunix'
sharding constraints.
"""

import argparse
import collections
import dataclasses
import inspect
import itertools
import sys
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tunix.generate import sampler as tunix_sampler
from tunix.models.llama3 import model as llama3
from tunix.models.qwen3 import model as qwen3

from minikv_jax import CacheConfig, decode_step, layer, prefill, presets, program
from minikv_jax.models.config import ModelConfig
from minikv_jax.models.llama import Llama, LlamaLayer

# ---- the adapter ---------------------------------------------------------------------------------------------------


def compress_cache(model: nnx.Module, config: CacheConfig) -> nnx.Module:
    """Lets a Tunix model keep keys and values as `config` says, which names both capacities. Returns the model."""
    kind = type(model.layers[0].attn)
    rope = staticmethod(sys.modules[kind.__module__].apply_rope)
    compressed = type(kind.__name__, (kind,), {"block": block, "block_without_cache": kind.block, "rope": rope})
    for i, decoder in enumerate(model.layers):
        decoder.attn.config_and_place = config, i, len(model.layers)
        decoder.attn.__class__ = compressed
    model.__class__ = type(type(model).__name__, (type(model),), {"init_cache": init_cache})
    return model


def init_cache(self, batch_size: int, cache_size: int, dtype: jnp.dtype) -> dict:
    """The states that the Sampler starts with: without room until a prompt is there. Their size is the config's."""
    heads = self.config.num_kv_heads, self.config.head_dim
    places = [decoder.attn.config_and_place for decoder in self.layers]
    return {f"layer_{i}": layer.empty(batch_size, *heads, c, dtype, layer=i, layers=n) for c, i, n in places}


def block(self, x, segment_pos, cache, attn_mask, *others, **named):
    """What Tunix' method of this name does, by `attend`; without a cache, as in training, that method itself."""
    if cache is None:
        return self.block_without_cache(x, segment_pos, cache, attn_mask, *others, **named)
    query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
    # The `others` are Qwen3's segment ids, which its attention reads in flash attention alone.
    if hasattr(self, "q_norm"):  # Qwen3
        query, key = self.q_norm(query), self.k_norm(key)
    query, key = (self.rope(y, segment_pos, head_dim=self.head_dim) for y in (query, key))
    config, i, layers = self.config_and_place
    new = attn_mask.shape[-1] - x.shape[1]
    if x.shape[1] > 1 and new > config.generated_capacity:
        raise ValueError(
            f"Behind prompts of {x.shape[1]} tokens the Sampler's cache has room for {new}, more than "
            f"generated_capacity={config.generated_capacity}: raise that, or lower the Sampler's cache_size."
        )
    out, cache = attend(query, key, value, segment_pos, cache, config, i, layers, self.o_proj.w[...])
    return cache, self.o_proj(out)


def attend(query, key, value, segment_pos, state, config: CacheConfig, i: int, layers: int, projection):
    """One new token of every sequence, or prompts [B, T, heads, H] padded on the left: (attention, state)."""
    if query.shape[1] == 1:
        return layer.step(query, key, value, state)
    lengths = segment_pos[:, -1] + 1
    padding = query.shape[1] - lengths
    rows = (_rolled(x, -padding) for x in (query, key, value))
    out, state = layer.prefill(*rows, lengths, config, layer=i, layers=layers, projection=projection)
    return _rolled(out, padding), state


def _rolled(x, by):
    """The rows of each sequence moved on by its number, around the end."""
    return jax.vmap(lambda rows, n: jnp.roll(rows, n, axis=0))(x, by)


ADAPTER = compress_cache, init_cache, block, attend, _rolled

# ---- what shows that it is right -----------------------------------------------------------------------------------

LENGTHS = 61, 200, 333, 384
NEW = 300
PROMPT = max(LENGTHS)
PADDING = 0
# Tunix' Llama3 gives its Sampler the embedding's size as that of the vocabulary: they must be the same to see logits.
WIDTH = VOCABULARY = 256
# Tunix' rotary embedding has this theta, whatever its configuration says.
THETA = 1_000_000
OURS = ModelConfig(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    intermediate_size=512,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    rope_theta=THETA,
    rms_norm_eps=1e-5,
)


class Row(NamedTuple):
    """One line of the table, which passes if `least` <= `measured` <= `most`."""

    what: str
    measured: float
    least: float = 0
    most: float = np.inf

    @property
    def passes(self) -> bool:  # NaN does not
        return bool(self.least <= self.measured <= self.most)

    def __str__(self) -> str:
        bound = f"from {self.least:g}" if self.most == np.inf else f"to {self.most:g}"
        return f"{self.measured:10.3g} {bound:>9}  {self.what}{'' if self.passes else '  MISSED'}"


class Numbers:
    """A tokenizer whose text is token ids; no token ends a sequence."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def pad_id(self) -> int:
        return PADDING

    def bos_id(self) -> None:
        return None

    def eos_id(self) -> int:
        return -1


def tunix_model(module, ours: Llama) -> nnx.Module:
    """The Llama3 or Qwen3 of a Tunix module, with the weights of our model."""
    c = ours.config
    config = module.ModelConfig(
        num_layers=c.num_layers,
        vocab_size=c.vocab_size,
        embed_dim=c.hidden_size,
        hidden_dim=c.intermediate_size,
        num_heads=c.num_heads,
        head_dim=c.head_dim,
        num_kv_heads=c.num_kv_heads,
        rope_theta=THETA,
        norm_eps=c.rms_norm_eps,
    )
    model = (module.Llama3 if module is llama3 else module.Qwen3)(config, rngs=nnx.Rngs(0))
    model.embedder.input_embedding[...] = ours.embedding[...]
    model.lm_head.w[...], model.final_norm.w[...] = ours.head[...], ours.norm[...]
    for theirs, mine in zip(model.layers, ours.layers):
        attention, mlp = theirs.attn, theirs.mlp
        heads = mine.query_key_value[...].reshape(c.hidden_size, -1, c.head_dim)
        parts = jnp.split(heads, (c.num_heads, c.num_heads + c.num_kv_heads), axis=1)
        attention.q_proj.w[...], attention.k_proj.w[...], attention.v_proj.w[...] = parts
        attention.o_proj.w[...] = mine.output[...].reshape(c.num_heads, c.head_dim, c.hidden_size)
        mlp.gate_proj.kernel[...], mlp.up_proj.kernel[...] = jnp.split(mine.gate_up[...], 2, axis=1)
        mlp.down_proj.kernel[...] = mine.down[...]
        theirs.input_layernorm.w[...] = mine.attention_norm[...]
        theirs.post_attention_layernorm.w[...] = mine.mlp_norm[...]
    if module is qwen3:
        model.num_embed = VOCABULARY  # what the Sampler sizes its logits by; Tunix' Qwen3 lacks it
    return model


def random_prompts(seed: int, lengths: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, VOCABULARY, n) for n in lengths]


class Answers(NamedTuple):
    """New tokens [B, NEW] and the logits [B, NEW, V] that each was chosen by."""

    tokens: np.ndarray
    logits: np.ndarray


def sampler_of(model: nnx.Module) -> tunix_sampler.Sampler:
    c = OURS
    size = tunix_sampler.CacheConfig(PROMPT + NEW, c.num_layers, c.num_kv_heads, c.head_dim)
    return tunix_sampler.Sampler(model, Numbers(), size)


def sample(sampler: tunix_sampler.Sampler, prompts: list[np.ndarray]) -> Answers:
    """Tunix' greedy answers."""
    texts = [sampler.tokenizer.decode(prompt) for prompt in prompts]
    out = sampler(
        texts,
        max_generation_steps=NEW,
        max_prompt_length=PROMPT,
        return_logits=True,
        forbidden_tokens=[PADDING],
    )
    return Answers(np.stack(out.tokens), np.stack(out.logits))


def our_logits(model: Llama, prompts: list[np.ndarray], tokens: np.ndarray, config: CacheConfig) -> np.ndarray:
    """Logits [B, NEW, V] of our model, given the same prompts and new tokens."""
    padded, lengths = right_padded(prompts)
    first, cache = prefill(model, padded, lengths, config)

    @jax.jit
    def rest(cache, tokens):
        return jax.lax.scan(lambda c, token: decode_step(model, c, token)[::-1], cache, tokens)[1]

    return np.stack([first, *rest(cache, jnp.asarray(tokens[:, :-1].T))], axis=1)


def right_padded(prompts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    return np.stack([np.pad(prompt, (0, PROMPT - len(prompt))) for prompt in prompts]), lengths


def divergence(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL of next-token distributions, [B, NEW]."""
    one, other = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (one.astype(float), other.astype(float)))
    return (np.exp(one) * (one - other)).sum(-1)


class GivenLayer(LlamaLayer):
    """Our layer with queries, keys and values [B, positions, heads, H] that are given, whatever x is."""

    def before_attention(self, x, positions):
        rows = positions[:, :, None, None]
        return tuple(jnp.take_along_axis(y[...], rows, axis=1) for y in (self.query, self.key, self.value))


def model_of_given_layers(config: ModelConfig, batch: int) -> Llama:
    """Our model of GivenLayers with random rows."""
    model, rngs = Llama(config, rngs=nnx.Rngs(params=1)), nnx.Rngs(params=2)
    for own in model.layers:
        own.__class__ = GivenLayer
        for name, heads in ("query", config.num_heads), ("key", config.num_kv_heads), ("value", config.num_kv_heads):
            rows = jax.random.normal(rngs.params(), (batch, PROMPT + NEW, heads, config.head_dim))
            setattr(own, name, nnx.Param(rows))
    return model


def check_codes(config: CacheConfig) -> Iterator[Row]:
    """The codes of our own model's cache and those of `attend`, both given the same queries, keys and values."""
    model = model_of_given_layers(dataclasses.replace(OURS, num_layers=2), len(LENGTHS))
    lengths = jnp.array(LENGTHS, jnp.int32)
    padding = PROMPT - lengths
    _, cache = prefill(model, jnp.ones((len(LENGTHS), PROMPT), jnp.int32), lengths, config)

    @jax.jit
    def prompts(model):
        segment_pos = jnp.maximum(jnp.arange(PROMPT) - padding[:, None], 0)
        states = []
        for i, own in enumerate(model.layers):
            rows = (_rolled(x[...][:, :PROMPT], padding) for x in (own.query, own.key, own.value))
            states.append(attend(*rows, segment_pos, None, config, i, len(model.layers), own.projection())[1])
        return states

    @jax.jit
    def step(model, cache, states, position):
        """One more token in both, and whether it had codes written."""
        _, cache = decode_step(model, cache, jnp.ones_like(position))
        new = []
        for i, own in enumerate(model.layers):
            rows = own.before_attention(None, position[:, None])
            place = config, i, len(model.layers), own.projection()
            new.append(attend(*rows, position[:, None], states[i], *place)[1])
        written = [(x != y).reshape(len(x), -1).any(1) for x, y in zip(codes(states), codes(new))]
        return cache, new, jnp.stack(written).any(0)

    states, flushes = prompts(model), 0
    total = sum(x.nbytes for x in codes(states))
    what = f"minikv_plus and our own layers: bytes of codes that differ, of {total:,},"
    yield Row(f"{what} after the prompts", differing(cache, states), most=0)
    for n in range(NEW):
        cache, states, written = step(model, cache, states, lengths + n)
        flushes += np.asarray(written)
    yield Row(f"{what} after {NEW} more tokens", differing(cache, states), most=0)
    yield Row("minikv_plus: times that a window was encoded, of the sequence with fewest", flushes.min(), least=2)


def codes(tree) -> list[jax.Array]:
    """The packed codes in a cache, or in layers of one: all its arrays of bytes."""
    return [x for x in jax.tree.leaves(tree) if x.dtype == jnp.uint8]


def differing(cache, states) -> int:
    """Bytes of codes that differ between the layers of a cache and the states of as many layers."""
    return sum(int((x != y).sum()) for x, y in zip(codes(cache.layers), codes(states), strict=True))


def share_of_tunix(model: nnx.Module) -> float:
    """Bytes of the model's cache, as a share of those of Tunix' own for as many tokens."""
    states = model.init_cache(len(LENGTHS), PROMPT + NEW, jnp.float32).values()
    c, rows = OURS, len(LENGTHS) * (PROMPT + NEW)
    return sum(state.nbytes for state in states) / (2 * c.num_layers * rows * c.num_kv_heads * c.head_dim * 4)


def check_full(name: str, module, ours: Llama) -> Iterator[Row]:
    """The method `full`, beside Tunix' own cache."""
    name = f"{name}, full and Tunix' own cache"
    prompts = random_prompts(0, LENGTHS)
    own = sample(sampler_of(tunix_model(module, ours)), prompts)
    full = sample(sampler_of(compress_cache(tunix_model(module, ours), method("full"))), prompts)
    yield Row(f"{name}: tokens that differ, of {own.tokens.size:,}", (own.tokens != full.tokens).sum(), most=0)
    yield Row(f"{name}: largest difference of logits", abs(own.logits - full.logits).max(), most=1e-5)


def check_compressed(name: str, module, ours: Llama) -> Iterator[Row]:
    """The method `minikv_plus`; for Llama3 beside our own model on the same kind of cache."""
    name, config = f"{name}, minikv_plus", method("minikv_plus")
    model = compress_cache(tunix_model(module, ours), config)
    yield Row(f"{name}: bytes of the cache, as a share of Tunix' own", share_of_tunix(model), most=0.5)
    sampler, prompts = sampler_of(model), random_prompts(0, LENGTHS)
    with mock.patch.object(sys.modules[__name__], "attend", wraps=attend) as traced:
        sample(sampler, random_prompts(1, LENGTHS[::-1]))
        answers = sample(sampler, prompts)
    shapes = collections.Counter(call.args[0].shape for call in traced.call_args_list)
    traces = max(shapes.values()) / ours.config.num_layers
    yield Row(f"{name}: traces a shape, for two batches of prompts", traces, most=1)
    yield Row(f"{name}: logits that are not finite", (~np.isfinite(answers.logits)).sum(), most=0)
    if module is llama3:
        mine = our_logits(ours, prompts, answers.tokens, config)
        yield Row(f"{name} and our own Llama: largest KL", divergence(mine, answers.logits).max(), most=1e-4)
        yield Row(f"{name} and our own Llama: tokens that differ", differing_tokens(mine, answers), most=0)


def differing_tokens(mine: np.ndarray, answers: Answers) -> int:
    """Tokens that our logits would not have chosen; prints how close each of these choices was."""
    mine = np.where(np.arange(VOCABULARY) == PADDING, -np.inf, mine)
    chosen = mine.argmax(-1)
    differ = np.argwhere(chosen != answers.tokens)
    for b, n in differ:
        token, logits = answers.tokens[b, n], mine[b, n]
        margin = logits.max() - logits[token]
        print(f"Sequence {b}, new token {n}: {token}; our own Llama's {chosen[b, n]} is ahead by {margin:.2g}")
    return len(differ)


def method(name: str) -> CacheConfig:
    return getattr(presets, name)().replace(prompt_capacity=PROMPT, generated_capacity=NEW)


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    ours = Llama(OURS, rngs=nnx.Rngs(params=0))
    lines = sum(len(inspect.getsource(part).splitlines()) for part in ADAPTER)
    rows = itertools.chain(
        [Row("lines of the adapter", lines, most=60)],
        check_full("Llama3", llama3, ours),
        check_compressed("Llama3", llama3, ours),
        check_codes(method("minikv_plus")),
        check_full("Qwen3", qwen3, ours),
        check_compressed("Qwen3", qwen3, ours),
    )
    passed = True
    print("  measured   allowed")
    for row in rows:
        passed &= row.passes
        print(row, flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    program.run(main)
