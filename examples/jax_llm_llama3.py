"""A compressed cache under weights laid out as those of jax-llm-examples' Llama 3 (`Weights`, `Layer`).

    python examples/jax_llm_llama3.py

That repository is no package, so its layout is written down here and filled with small random weights; the forward pass
is this file's own. What stands under "the adapter" is all that it takes: less than forty lines, of which three know the
cache. The rest checks that the result is what `minikv_jax`'s own model gives with the same weights.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from minikv_jax import decode_step, layer, presets
from minikv_jax import prefill as prefill_ours
from minikv_jax.models.config import ModelConfig
from minikv_jax.models.llama import Llama


class Layer(NamedTuple):
    """One layer's weights; D channels, F of the MLP."""

    q: jax.Array  # [D, N, H]
    k: jax.Array  # [D, K, H]
    v: jax.Array  # [D, K, H]
    o: jax.Array  # [N, H, D]
    w_gate: jax.Array  # [D, F]
    w_up: jax.Array  # [D, F]
    w_down: jax.Array  # [F, D]
    attn_pre_gamma: jax.Array  # [D]
    attn_post_gamma: jax.Array  # [D]


class Weights(NamedTuple):
    layers: list[Layer]
    embedding: jax.Array  # [V, D]
    gamma_final: jax.Array  # [D]
    lm_head: jax.Array  # [D, V]


# ---- the adapter ---------------------------------------------------------------------------------------------------


def norm(x, gamma):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * gamma


def turned(x, positions, theta=500000.0):
    """Rotary embedding of [B, T, heads, H], channel i with channel i + H / 2."""
    frequency = theta ** -(jnp.arange(0, x.shape[-1], 2) / x.shape[-1])
    angle = positions[:, :, None, None] * frequency
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], axis=-1)


def run(weights: Weights, tokens, positions, attend):
    """Logits [B, T, V] of tokens [B, T]; `attend(i, query, key, value)` is (attention, state) of layer i."""
    x, states = weights.embedding[tokens], []
    for i, w in enumerate(weights.layers):
        h = norm(x, w.attn_pre_gamma)
        query, key, value = (jnp.einsum("btd,dnh->btnh", h, y) for y in (w.q, w.k, w.v))
        attention, state = attend(i, turned(query, positions), turned(key, positions), value)
        states.append(state)
        x = x + jnp.einsum("btnh,nhd->btd", attention, w.o)
        h = norm(x, w.attn_post_gamma)
        x = x + (jax.nn.silu(h @ w.w_gate) * (h @ w.w_up)) @ w.w_down
    return norm(x, weights.gamma_final) @ weights.lm_head, states


def prefill(weights: Weights, tokens, lengths, config):
    def attend(i, *qkv):
        place = {"layer": i, "layers": len(weights.layers)}
        return layer.prefill(*qkv, lengths, config, **place, projection=weights.layers[i].o)

    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    logits, states = run(weights, tokens, positions, attend)
    return jnp.take_along_axis(logits, (lengths - 1)[:, None, None], axis=1)[:, 0], states


def step(weights: Weights, tokens, states):
    positions = states[0].lengths[:, None]
    logits, states = run(weights, tokens[:, None], positions, lambda i, *qkv: layer.step(*qkv, states[i]))
    return logits[:, 0], states


# ---- the check -----------------------------------------------------------------------------------------------------

CONFIG = ModelConfig(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=64,
    max_position_embeddings=2048, rope_theta=500000.0, rms_norm_eps=1e-5,
)  # fmt: skip


def weights_of(model: Llama) -> Weights:
    """The model's weights in that layout."""
    heads = np.cumsum([CONFIG.num_heads, CONFIG.num_kv_heads])
    layers = []
    for x in model.layers:
        qkv = jnp.split(x.query_key_value[...].reshape(CONFIG.hidden_size, -1, CONFIG.head_dim), heads, axis=1)
        gate_up = jnp.split(x.gate_up[...], 2, axis=1)
        output = x.output[...].reshape(CONFIG.num_heads, CONFIG.head_dim, -1)
        layers.append(Layer(*qkv, output, *gate_up, x.down[...], x.attention_norm[...], x.mlp_norm[...]))
    return Weights(layers, model.embedding[...], model.norm[...], model.head[...])


def main() -> None:
    model = Llama(CONFIG, rngs=nnx.Rngs(params=0))
    weights, rng = weights_of(model), np.random.default_rng(0)
    tokens, lengths = rng.integers(0, CONFIG.vocab_size, (2, 200)), jnp.array([200, 117])
    for traced, name in enumerate(("full", "minikv_plus"), 1):
        config = presets.by_name(name).replace(prompt_capacity=200, generated_capacity=160)
        logits, states = jax.jit(prefill, static_argnums=3)(weights, jnp.asarray(tokens), lengths, config)
        ours, cache = prefill_ours(model, tokens, lengths, config)
        one, own, worst = jax.jit(step), jax.jit(decode_step), float(jnp.abs(logits - ours).max())
        for i in range(150):
            logits, states = one(weights, jnp.asarray(tokens[:, i]), states)
            ours, cache = own(model, cache, tokens[:, i])
            worst = max(worst, float(jnp.abs(logits - ours).max()))
        held = sum(state.nbytes for state in states)
        print(f"{name}: {held / 1024:.0f} KiB in {len(states)} layers; logits differ by {worst:.1e} at most")
        assert one._cache_size() == traced, "a step was traced again"
        assert worst < 1e-4, "another result than our own model's"


if __name__ == "__main__":
    main()
