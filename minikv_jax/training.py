"""CSKV's fine-tune (arXiv 2409.10593): products of low rank learn to give a layer's keys and values, layer by layer.

Only A and B are trained, by the mean squared errors of x A B beside x W, x being what the unchanged model gives; no
layer's loss depends on another's product, so each is updated while the model reads on.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from minikv_jax.checks import check_types, require
from minikv_jax.codec import Codec, each_token, through
from minikv_jax.errors import ConfigError, MiniKVError, shortened
from minikv_jax.latent import CSKV
from minikv_jax.models.latent import Seen, Start, products_of
from minikv_jax.models.llama import Llama, LlamaLayer
from minikv_jax.models.trained import Products, path_of, read_arrays, write_arrays, write_products
from minikv_jax.reading import Chunks, embed, read_layer

_SAVED_EVERY = 25  # steps


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to train. Defaults are the paper's where it has one (learning rate, length, one text at a time).

    Attributes:
        keys, values: ranks as shares of K H.
        start: "svd" of the weights, "asvd" (ASVD's scales of what enters them), or "pca": principal directions of the
            keys and values themselves, which is the best that products of this rank can do for the texts seen.
        bits: of latents; below 16 they go through the codec while they are trained.
        group_size: channels of a latent that share a scale, with fewer bits.
        steps: texts read.
        length: tokens of a text.
        samples: texts that "asvd" and "pca" look at.
        rate: of AdamW.
        seed: of the order of texts.
    """

    keys: float = 0.5
    values: float = 0.5
    start: Start = "svd"
    bits: int = 16
    group_size: int = 16
    steps: int = 1000
    length: int = 1024
    samples: int = 256
    rate: float = 5e-5
    seed: int = 0

    def __post_init__(self):
        check_types(self)
        for name, texts in (("steps", self.steps), ("samples", self.samples)):
            require(texts >= 0, f"{name}={texts}: give a number of texts.")
        require(self.length >= 2, f"length={self.length}: give at least 2 tokens.")
        require(self.rate > 0, f"rate={self.rate}: give a number above 0.")
        CSKV(self.keys, self.values)

    @property
    def codec(self) -> Codec:
        """Of latents."""
        return each_token(self.bits, self.group_size)


class Progress(NamedTuple):
    """Products being trained, of keys and of values of each layer, and what AdamW keeps of each."""

    products: list[Products]
    optimiser: list[Any]


def chunks(ids: Sequence[Sequence[int]], length: int, seed: int) -> Int[np.ndarray, "texts length"]:
    """Whole chunks of texts' tokens, in a drawn order.

    Raises:
        ConfigError: no text has as many tokens.
    """
    whole = [x[i : i + length] for x in ids for i in range(0, len(x) - length + 1, length)]
    if not whole:
        raise ConfigError(f"No text has {length} tokens: add longer ones, or give a smaller --length.")
    return np.random.default_rng(seed).permutation(np.array(whole, np.int32))


def train(
    model: Llama,
    texts: Int[np.ndarray, "texts length"],
    plan: Plan,
    name: str,
    folder: Path,
    progress: Callable[[int, int, float], None] | None = None,
) -> Path:
    """Trains products for a model and writes them beside it; what a broken run has written is gone on from.

    Args:
        model: as it was loaded; its weights stay as they are.
        texts: token ids, read in turn, again from the first one where they end.
        plan: what to train.
        name: of the weights, for `cskv:weights=NAME`.
        folder: where they are written, the model's own.
        progress: called with steps done, steps to do, and the last loss, the mean squared errors over all layers.

    Returns:
        The written file.

    Raises:
        ConfigError: the folder holds a run of this name with another plan.
    """
    optimiser = _optimiser(plan.rate)
    state = _begun(model, texts, plan, optimiser)
    running = path_of(folder, name).with_suffix(".training.safetensors")
    done, state = _resumed(running, plan, state)
    for i in range(done, plan.steps):
        text = jnp.asarray(texts[i % len(texts)][None])
        state, loss = _step(model, state, text, plan)
        if (i + 1) % _SAVED_EVERY == 0 or i + 1 == plan.steps:
            _save(running, plan, i + 1, state)
        if progress is not None:
            progress(i + 1, plan.steps, float(loss))
    about = {"plan": json.dumps(dataclasses.asdict(plan))}
    return write_products(folder, name, state.products, about)


def _optimiser(rate: float):
    try:
        import optax
    except ImportError:
        raise MiniKVError("Training needs optax: pip install 'minikv-jax[train]'.") from None
    return optax.adamw(rate)


def _begun(model: Llama, texts, plan: Plan, optimiser) -> Progress:
    seen = None if plan.start == "svd" else observe(model, texts[: plan.samples])
    made = products_of(model, plan.keys, plan.values, plan.start, seen)
    products: list[Products] = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), made)
    return Progress(products, [optimiser.init(pair) for pair in products])


def observe(model: Llama, texts: Int[np.ndarray, "texts length"]) -> list[Seen]:
    """What enters each layer's attention on these texts, and what comes of it."""
    if len(texts) == 0:
        raise ConfigError("There is no text to look at: give samples=1 or more.")
    count, sums = texts.size, None
    for text in texts:
        new = [_observed(layer, x) for layer, x in _through(model, jnp.asarray(text[None]))]
        sums = new if sums is None else jax.tree.map(jnp.add, sums, new)
    return jax.tree.map(lambda x: np.asarray(x, np.float64) / count, sums)


@jax.jit
def _observed(layer: LlamaLayer, x: Float[Array, "B T D"]) -> Seen:
    """Sums over tokens."""
    normed = layer.normed(x)
    key, value = _weights(layer)
    moments = ((normed[0] @ w).astype(jnp.float32) for w in (key, value))
    return Seen(jnp.abs(normed).sum(axis=(0, 1)), *(y.T @ y for y in moments))


def _weights(layer: LlamaLayer) -> tuple[Float[Array, "D KH"], Float[Array, "D KH"]]:
    config = layer.config
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    whole = layer.query_key_value[...]
    return whole[:, queries : queries + keys], whole[:, queries + keys :]


def _through(model: Llama, text: Int[Array, "1 T"]):
    """Each layer and what it reads."""
    rows, lengths = Chunks(text.shape[1], text.shape[1]), jnp.full((1,), text.shape[1], jnp.int32)
    x = embed(model, text, rows)
    for layer in model.layers:
        yield layer, x
        x, *_ = read_layer(layer, x, lengths, rows, score_rows=0, sliding_window=model.config.sliding_window)


def _step(model: Llama, state: Progress, text: Int[Array, "1 T"], plan: Plan) -> tuple[Progress, Float[Array, ""]]:
    products, kept, losses = [], [], []
    for (layer, x), product, optimiser in zip(_through(model, text), *state):
        product, optimiser, loss = _fitted(layer, x, product, optimiser, plan)
        products.append(product)
        kept.append(optimiser)
        losses.append(loss)
    return Progress(products, kept), jnp.stack(losses).sum()


@functools.partial(jax.jit, static_argnames="plan")
def _fitted(layer: LlamaLayer, x, product: Products, state, plan: Plan):
    """The layer's products after one step, the optimiser's state, and the loss before the step."""
    import optax

    loss, gradients = jax.value_and_grad(layer_loss)(product, layer, x, plan.codec)
    updates, state = _optimiser(plan.rate).update(gradients, state, product)
    return optax.apply_updates(product, updates), state, loss


def layer_loss(product: Products, layer: LlamaLayer, x: Float[Array, "B T D"], codec: Codec) -> Float[Array, ""]:
    """MSE of keys before rotary embedding plus MSE of values, as rebuilt from latents that went through the codec.

    Gradients pass the codec as if it changed nothing.
    """
    normed = layer.normed(x).astype(jnp.float32)
    latents = [normed @ one.down for one in product]
    if not codec.dense:
        coded = through(codec, *(jax.lax.stop_gradient(y)[:, None] for y in latents))
        latents = [y + jax.lax.stop_gradient(z[:, 0] - y) for y, z in zip(latents, coded)]
    wanted = (normed @ w.astype(jnp.float32) for w in _weights(layer))
    errors = [jnp.mean(jnp.square(y @ one.up - goal)) for y, one, goal in zip(latents, product, wanted)]
    return errors[0] + errors[1]


# ---- a run that goes on --------------------------------------------------------------------------------------------


def _save(path: Path, plan: Plan, done: int, state: Progress) -> None:
    leaves = {f"{i:05d}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(state))}
    write_arrays(path, leaves, {"plan": json.dumps(dataclasses.asdict(plan)), "done": str(done)})


def _resumed(path: Path, plan: Plan, begun: Progress) -> tuple[int, Progress]:
    """Steps done and the state after them, of a run that was broken off; none and the beginning where there is none."""
    if not path.is_file():
        return 0, begun
    leaves, about = read_arrays(path)
    # More steps of the same run are no other plan.
    if json.loads(about["plan"]) | {"steps": plan.steps} != dataclasses.asdict(plan):
        raise ConfigError(
            f"{path} is of another plan, {shortened(about['plan'], 300)}: name other weights, or remove that file."
        )
    return int(about["done"]), jax.tree.unflatten(jax.tree.structure(begun), map(jnp.asarray, leaves.values()))
