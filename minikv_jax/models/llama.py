"""Decoders of LLaMA's kind in Flax NNX; `families.py` lists the models.

The modules hold parameters and say what a layer does before and after attention. Attention itself, and the cache it
reads, belong to `prefill.py` and `decode.py`, so one model serves every method.

Weights lie [in, out]. Decoding one token is a row vector times each weight, which then streams through memory in
order; that is what a CPU can do at full bandwidth, and a GPU does not mind.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from minikv_jax.models.config import ModelConfig
from minikv_jax.models.mixture import Mixture
from minikv_jax.models.rope import inverse_frequencies


def rms_norm(x: Float[Array, "*rows D"], weight: Float[Array, "D"], epsilon: float) -> Float[Array, "*rows D"]:
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return wide.astype(x.dtype) * weight.reshape((1,) * (x.ndim - 1) + (-1,))


def rotary(
    x: Float[Array, "B T heads H"], positions: Int[Array, "#B T"], frequencies: np.ndarray, magnitude: float = 1.0
) -> Float[Array, "B T heads H"]:
    """Rotary embedding, times `magnitude`; channel i pairs with channel i + H / 2 (Hugging Face's order)."""
    angle = positions[..., None].astype(jnp.float32) * frequencies[None, None]
    cos, sin = (f(angle)[:, :, None, :] * magnitude for f in (jnp.cos, jnp.sin))
    # (a, b) -> (a cos - b sin, b cos + a sin). As a reversal of halves, not their concatenation, XLA makes one piece of
    # work of it with what else is done to the same product's rows.
    x32 = x.astype(jnp.float32)
    halves = x32.reshape(*x.shape[:-1], 2, -1)
    swapped = jnp.flip(halves, axis=-2).reshape(x.shape)
    turned = x32 * jnp.concatenate([cos, cos], axis=-1) + swapped * jnp.concatenate([-sin, sin], axis=-1)
    return turned.astype(x.dtype)


class LlamaLayer(nnx.Module):
    """One decoder layer's parameters, and its arithmetic on either side of attention."""

    def __init__(self, config: ModelConfig, *, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.config = config
        d, f, h = config.hidden_size, config.intermediate_size, config.head_dim
        n, k = config.num_heads, config.num_kv_heads

        def matrix(rows: int, columns: int) -> nnx.Param:
            return nnx.Param(jax.random.normal(rngs.params(), (rows, columns), param_dtype) * rows**-0.5)

        self.attention_norm = nnx.Param(jnp.ones((d,), param_dtype))
        # What meets the same rows lies side by side in one matrix: [query, key, value], [gate, up]. Beside reading it
        # a product of few rows costs about 3 us of starting on an H100.
        self.query_key_value = matrix(d, (n + 2 * k) * h)
        if config.query_key_value_bias:
            self.query_key_value_bias = nnx.Param(jnp.zeros(((n + 2 * k) * h,), param_dtype))
        if config.query_key_norm:
            self.query_norm = nnx.Param(jnp.ones((h,), param_dtype))
            self.key_norm = nnx.Param(jnp.ones((h,), param_dtype))
        self.output = matrix(n * h, d)
        self.mlp_norm = nnx.Param(jnp.ones((d,), param_dtype))
        if config.experts is None:
            self.gate_up, self.down = matrix(d, 2 * f), matrix(f, d)
        else:
            self.experts = Mixture(config.experts, d, param_dtype=param_dtype, rngs=rngs)

    def projection(self) -> Float[Array, "N H D"]:
        """What each head's attention is multiplied by."""
        return self.output[...].reshape(self.config.num_heads, self.config.head_dim, -1)

    def before_attention(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Query, key and value of every token, query and key with rotary embedding."""
        n, k = self.config.num_heads, self.config.num_kv_heads
        query, key, value = jnp.split(self.heads(self.normed(x)), (n, n + k), axis=2)
        return self.queries(query, positions), self.keys(key, positions), value

    def normed(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What queries, keys and values are products of."""
        return rms_norm(x, self.attention_norm[...], self.config.rms_norm_eps)

    def heads(self, x: Float[Array, "B T D"]) -> Float[Array, "B T heads H"]:
        """Queries, keys and values of every head, as products give them."""
        y = x @ self.query_key_value[...]
        if self.config.query_key_value_bias:
            y = y + self.query_key_value_bias[...][None, None]
        return y.reshape(*y.shape[:2], -1, self.config.head_dim)

    def queries(self, query: Float[Array, "B T N H"], positions: Int[Array, "#B T"]) -> Float[Array, "B T N H"]:
        """Queries as they meet keys: of one length where the model norms them, with rotary embedding."""
        if self.config.query_key_norm:
            query = rms_norm(query, self.query_norm[...], self.config.rms_norm_eps)
        return self._rotated(query, positions)

    def keys(self, key: Float[Array, "B T K H"], positions: Int[Array, "#B T"]) -> Float[Array, "B T K H"]:
        """Likewise keys."""
        if self.config.query_key_norm:
            key = rms_norm(key, self.key_norm[...], self.config.rms_norm_eps)
        return self._rotated(key, positions)

    def _rotated(self, x: Float[Array, "B T heads H"], positions: Int[Array, "#B T"]) -> Float[Array, "B T heads H"]:
        config = self.config
        frequencies = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        magnitude = 1.0 if config.rope_scaling is None else config.rope_scaling.magnitude
        return rotary(x, positions, frequencies, magnitude)

    def after_attention(self, x: Float[Array, "B T D"], attention: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        """The layer's result: both residual connections and the gated MLP or the experts."""
        x = x + attention.reshape(*attention.shape[:2], -1) @ self.output[...]
        h = rms_norm(x, self.mlp_norm[...], self.config.rms_norm_eps)
        if self.config.experts is not None:
            return x + self.experts(h)
        gate, up = jnp.split(h @ self.gate_up[...], 2, axis=-1)
        return x + (jax.nn.silu(gate) * up) @ self.down[...]


class Llama(nnx.Module):
    """A decoder-only transformer. `nnx.split(model)` gives the pytree that the pure functions take, as does the model.

    Args:
        config: sizes and features.
        param_dtype: of the parameters, and of the arithmetic outside norms, rotary embedding and softmax.
        rngs: `nnx.Rngs(params=seed)` for random weights.

    Attributes:
        home: folder that the weights came from, where trained latents lie (`models.latent`); None: there is none.
    """

    def __init__(self, config: ModelConfig, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.home: str | None = None
        v, d = config.vocab_size, config.hidden_size
        if not config.tie_word_embeddings:
            self.embedding = nnx.Param(jax.random.normal(rngs.params(), (v, d), param_dtype))
        # A tied model has this one matrix for both ends; [D, V] is the order its large product wants.
        self.head = nnx.Param(jax.random.normal(rngs.params(), (d, v), param_dtype) * d**-0.5)
        self.norm = nnx.Param(jnp.ones((d,), param_dtype))
        self.layers = nnx.List(
            [LlamaLayer(config, param_dtype=param_dtype, rngs=rngs) for _ in range(config.num_layers)]
        )

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        if self.config.tie_word_embeddings:
            return jnp.moveaxis(self.head[...].at[:, tokens].get(mode="clip"), 0, -1)
        return self.embedding[...].at[tokens].get(mode="clip")

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        h = rms_norm(x, self.norm[...], self.config.rms_norm_eps)
        return jnp.matmul(h, self.head[...], preferred_element_type=jnp.float32)
