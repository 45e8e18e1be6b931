"""Every family decodes as it reads, through the full cache as transformers does, and through the default preset."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import METHODS

from minikv_jax import decode_step, prefill
from minikv_jax.models import load_model
from minikv_jax.models.families import FAMILIES

GOLDEN = Path(__file__).parent / "golden"
# What transformers was run with. A window of 12 tokens, as the golden Mistral has, no cache can hold.
MODELS = ["llama3", "llama2", "qwen2", "qwen2_yarn", "qwen3"]
PROMPT, STEPS = 32, 24
step = jax.jit(decode_step, donate_argnames="cache")


def decoded(model, method, tokens) -> np.ndarray:
    """Logits after the prompt and after each later token, [B, steps + 1, V]."""
    prompt, later = tokens[:, :PROMPT], tokens[:, PROMPT:]
    config = method.replace(generated_capacity=STEPS)
    logits, cache = prefill(model, jnp.asarray(prompt), jnp.full(len(prompt), PROMPT, jnp.int32), config)
    rows = [logits]
    for i in range(later.shape[1]):
        logits, cache = step(model, cache, jnp.asarray(later[:, i]))
        rows.append(logits)
    return np.stack(rows, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_decoding_matches_transformers(name):
    golden, model = np.load(GOLDEN / f"{name}.npz"), load_model(GOLDEN / name, jnp.float32)
    found = decoded(model, METHODS["full"], golden["tokens"])
    np.testing.assert_allclose(found, golden["logits"][:, PROMPT - 1 :], rtol=0, atol=1e-4)


# One of each kind of layer: those of other families are computed alike.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_the_default_preset_decodes(name):
    tokens = np.load(GOLDEN / f"{name}.npz")["tokens"]
    found = decoded(load_model(GOLDEN / name, jnp.float32), METHODS["minikv_plus"], tokens)
    assert found.shape == (2, STEPS + 1, 128)
    assert np.isfinite(found).all()


def test_every_family_has_a_golden_model():
    made = {model.config.architecture for model in map(load_model, (GOLDEN / name for name in MODELS))}
    assert made | {"mistral"} == set(FAMILIES)
