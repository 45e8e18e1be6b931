"""CSKV's fine-tune: what it minimises, that it goes on where it was, and what is read back."""

import dataclasses

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import MODEL, TWO_LAYERS, tokens
from reference.quantiser import roundtrip_per_token

from minikv_jax import CheckpointError, ConfigError, prefill, presets, training
from minikv_jax.codec import Codec, each_token
from minikv_jax.latent import CSKV
from minikv_jax.models import trained
from minikv_jax.models.latent import Product, Products, key_value_weights, products_of
from minikv_jax.models.made import made

PLAN = training.Plan(keys=0.5, values=0.5, steps=4, length=16, samples=3, rate=1e-3)


def texts(rows=5):
    return np.asarray(tokens(rows, PLAN.length))


def drawn():
    """Products of rank 16 for the tiny model, and hidden states."""
    rng = draws.rng()
    pair = [Product(*(draws.array(rng.normal(size=s), "float32") for s in ((32, 16), (16, 32)))) for _ in range(2)]
    return Products(*pair), draws.array(rng.normal(size=(1, 16, 32)), "float32")


@pytest.mark.slow
@pytest.mark.parametrize("bits", [16, 4])
def test_the_loss_is_the_error_of_keys_and_values(bits):
    product, x = drawn()
    codec, layer = each_token(bits, 8), MODEL.layers[0]
    normed = np.asarray(layer.normed(x)[0], np.float64)
    loss, gradients = jax.value_and_grad(training.layer_loss)(product, layer, x, codec)
    expected = 0.0
    for one, gradient, weights in zip(product, gradients, key_value_weights(layer)):
        down, up = (np.asarray(y, np.float64) for y in one)
        latents = normed @ down if bits == 16 else roundtrip_per_token(normed @ down, bits, 8)
        error = latents @ up - normed @ weights
        expected += np.mean(error**2)
        # The gradient of A passes the codec as if it changed nothing; that of B sees what it gives.
        of_down, of_up = normed.T @ error @ up.T, latents.T @ error
        for found, wanted in zip(gradient, (of_down, of_up)):
            np.testing.assert_allclose(
                found, 2 * wanted / error.size, rtol=0.02, atol=0.02 * np.abs(wanted).max() / 256
            )
    assert float(loss) == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_principal_directions_are_the_best_start():
    read, layer = texts(), MODEL.layers[0]
    seen, x = training.observe(MODEL, read), MODEL.embed(jnp.asarray(read))

    def loss(start):
        (pair,) = products_of(MODEL, 0.5, 0.5, start, seen)
        return float(training.layer_loss(jax.tree.map(jnp.float32, pair), layer, x, Codec()))

    assert loss("pca") < min(loss("svd"), loss("asvd"))
    normed = np.asarray(layer.normed(x), np.float64)
    np.testing.assert_allclose(seen[0].loudness, np.abs(normed).mean(axis=(0, 1)), rtol=1e-4)
    keys = normed @ key_value_weights(layer)[0]
    np.testing.assert_allclose(seen[0].key, np.einsum("bti,btj->ij", keys, keys) / read.size, rtol=1e-3, atol=1e-4)


def test_a_broken_run_goes_on_and_is_loaded_by_name(tmp_path, monkeypatch):
    read, losses = texts(1), []  # one text alone, so that its loss falls
    monkeypatch.setattr(training, "_SAVED_EVERY", 2)

    def run(plan, folder, stop=None):
        folder.mkdir(exist_ok=True)

        def progress(done, steps, loss):
            losses.append(loss)
            if done == stop:
                raise KeyboardInterrupt

        return training.train(TWO_LAYERS, read, plan, "mine", folder, progress)

    whole = run(PLAN, tmp_path / "whole")
    assert losses[0] > losses[-1] and len(losses) == 4
    with pytest.raises(KeyboardInterrupt):
        run(PLAN, tmp_path / "broken", stop=3)
    assert not trained.path_of(tmp_path / "broken", "mine").exists()
    losses.clear()
    went_on = run(PLAN, tmp_path / "broken")
    assert len(losses) == 2  # what step 3 did was not saved
    for name, x in trained.read_arrays(whole)[0].items():
        np.testing.assert_allclose(trained.read_arrays(went_on)[0][name], x, rtol=1e-4, atol=1e-6)
    with pytest.raises(ConfigError, match="another plan"):
        run(dataclasses.replace(PLAN, rate=1e-4), tmp_path / "broken")

    model = with_home(TWO_LAYERS, tmp_path / "whole")
    config = presets.cskv(0.5, 0.5, weights="mine", window=4)
    logits, _ = prefill(made(model, config.weights), tokens(1, 16), [16], config)
    assert np.isfinite(np.asarray(logits)).all()
    for wrong, named in ((CSKV(0.5, 1.0, "mine"), "other densities"), (CSKV(0.5, 0.5, "other"), "minikv train cskv")):
        with pytest.raises(CheckpointError, match=named):
            made(model, wrong)
    whole.write_bytes(b"no safetensors")
    with pytest.raises(CheckpointError, match="Cannot read"):
        made(model, config.weights)
    with pytest.raises(CheckpointError, match="came from none"):
        made(TWO_LAYERS, config.weights)


def with_home(model, folder):
    copy = nnx.clone(model)
    copy.home = str(folder)
    return copy


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: training.Plan(start="random"), "start='random'"),
        (lambda: training.Plan(keys=0.0), "keys=0.0"),
        (lambda: training.Plan(length=1), "length=1"),
        (lambda: training.Plan(rate=0.0), "rate=0.0"),
        (lambda: training.chunks([[1, 2]], 16, 0), "No text has 16 tokens"),
        (lambda: training.observe(MODEL, texts()[:0]), "no text to look at"),
        (lambda: presets.cskv(weights="../mine"), "not a path"),
    ],
)
def test_what_cannot_be_trained_is_named(make, named):
    with pytest.raises(ConfigError, match=named):
        make()


def test_chunks_are_whole_and_in_a_drawn_order():
    rows = [list(range(40)), list(range(100, 110)), list(range(200, 216))]
    found = training.chunks(rows, 16, 3)
    assert sorted(map(tuple, found)) == [tuple(range(i, i + 16)) for i in (0, 16, 200)]
    np.testing.assert_array_equal(found, training.chunks(rows, 16, 3))
