"""Rotary frequencies: YaRN's against transformers', and what settings are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_model_config import QWEN3

from minikv_jax.errors import UnsupportedModelError
from minikv_jax.models import RopeScaling
from minikv_jax.models.hf_config import fields
from minikv_jax.models.rope import inverse_frequencies

YARN = np.load(Path(__file__).parent / "golden" / "yarn.npz")


def read(rope: dict, **entries) -> dict:
    """What a Qwen3's config.json gives."""
    return fields(QWEN3 | {"rope_theta": None, "rope_parameters": rope} | entries)


@pytest.mark.parametrize("name", [key.removesuffix(" settings") for key in YARN if key.endswith(" settings")])
def test_yarn_is_that_of_transformers(name):
    settings = json.loads(str(YARN[f"{name} settings"]))
    found = read({"rope_type": "yarn", **settings})
    scaling = found["rope_scaling"]
    frequencies = inverse_frequencies(128, found["rope_theta"], scaling)
    np.testing.assert_allclose(frequencies, YARN[f"{name} frequencies"], rtol=1e-5)
    assert scaling.magnitude == pytest.approx(float(YARN[f"{name} attention"]), rel=1e-12)
    stretched = settings["factor"] * settings["original_max_position_embeddings"]
    assert found["max_position_embeddings"] == max(131072, stretched)


def test_dynamic_changes_nothing_within_the_original_length_where_models_end():
    dynamic = {"rope_type": "dynamic", "factor": 6.0, "rope_theta": 5e5}
    found = read(dynamic, max_position_embeddings=32768)
    assert found["rope_scaling"] == RopeScaling("dynamic", 6.0)
    assert found["max_position_embeddings"] == 32768
    np.testing.assert_array_equal(
        inverse_frequencies(128, 5e5, found["rope_scaling"]), inverse_frequencies(128, 5e5, None)
    )
    assert read(dynamic | {"original_max_position_embeddings": 4096})["max_position_embeddings"] == 4096
    assert found["rope_scaling"].magnitude == 1


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "llama_4_scaling_beta": 0.1}, "llama_4_scaling_beta is 0.1"),
        ({"rope_type": "yarn", "factor": 4.0, "attn_factor": 0.8782}, "attn_factor is 0.8782, which transformers"),
        ({"rope_type": "dynamic", "factor": 4.0, "alpha": 1000.0}, r"alpha is 1000\.0, which is not"),
        ({"rope_type": "yarn", "factor": 4.0, "beta_fast": 1.0, "beta_slow": 2.0}, r"beta_fast \(1\.0\) must be"),
        ({"rope_type": "yarn", "factor": -4.0}, "factor must be a positive number, got -4.0"),
        ({"rope_type": "yarn", "factor": 4.0, "attention_factor": -1.0}, "attention_factor must be a positive number"),
    ],
)  # fmt: skip
def test_settings_that_mean_something_else_are_refused_by_name(rope, message):
    with pytest.raises(UnsupportedModelError, match=message):
        read(rope)


def test_a_factor_of_one_or_less_leaves_attention_as_it_is():
    assert RopeScaling("yarn", 0.5, original_max_position_embeddings=4096).magnitude == 1
    with pytest.raises(UnsupportedModelError, match="original_max_position_embeddings must be a positive number"):
        RopeScaling("yarn", 4.0)
