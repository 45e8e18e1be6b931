"""The models compute what transformers computes: see golden/make_golden.py for how the references were made."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from models import slow

from minikv_jax.models import load_model, load_tokenizer, locate
from minikv_jax.prefill import forward

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return locate("smollm2")


# The others are computed as these, and decoded by the slow tests of families.
ALIKE = slow("phi3", "seed_oss", "ernie4_5", "mixtral")


@pytest.mark.parametrize(
    "name", ["llama3", "llama2", "mistral", "qwen2", "qwen2_yarn", "qwen3", "granite", "qwen3_moe", *ALIKE]
)
def test_logits_match_transformers(name):
    golden = np.load(GOLDEN / f"{name}.npz")
    model = load_model(GOLDEN / name, jnp.float32)
    logits = forward(model, jnp.asarray(golden["tokens"]))
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-4)


def test_the_language_model_of_a_wrapped_one_is_taken_and_what_is_left_out_is_said():
    with pytest.warns(UserWarning, match="only the language model is loaded; .* tensors of other parts .*are left out"):
        model = load_model(GOLDEN / "mistral3", jnp.float32)
    assert model.config.architecture == "mistral"
    golden = np.load(GOLDEN / "mistral3.npz")
    np.testing.assert_allclose(forward(model, jnp.asarray(golden["tokens"])), golden["logits"], rtol=0, atol=1e-4)


def test_logits_of_padded_prompts_match_transformers():
    golden = np.load(GOLDEN / "mistral.npz")
    model = load_model(GOLDEN / "mistral", jnp.float32)
    lengths = np.array([40, 17], np.int32)
    tokens = np.where(np.arange(56) < lengths[:, None], golden["tokens"], 0)
    logits = forward(model, jnp.asarray(tokens), jnp.asarray(lengths))
    for i, length in enumerate(lengths):
        np.testing.assert_allclose(logits[i, :length], golden["logits"][i, :length], rtol=0, atol=1e-4)


def test_smollm2_predicts_what_transformers_predicts(smollm2):
    golden = np.load(GOLDEN / "smollm2_512.npz")
    model = load_model(smollm2, jnp.float32)
    logits = forward(model, jnp.asarray(golden["tokens"])[None])
    clear = golden["margin"] > 1e-3
    assert clear.sum() > 500
    np.testing.assert_array_equal(jnp.argmax(logits[0], -1)[clear], golden["next_token"][clear])


def test_smollm2_tokenizer_matches_transformers(smollm2):
    golden = np.load(GOLDEN / "smollm2_512.npz")
    assert load_tokenizer(smollm2)(str(golden["text"])).input_ids == golden["tokens"].tolist()
