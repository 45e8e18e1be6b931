"""Mixtures of experts against a loop over tokens and their experts, and what is refused."""

import json
import shutil

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_families import GOLDEN
from test_model_config import LLAMA

from minikv_jax.errors import CheckpointError, UnsupportedModelError
from minikv_jax.models import ModelConfig, open_checkpoint
from minikv_jax.models.experts import Experts
from minikv_jax.models.mixture import Mixture

apply = jax.jit(lambda mixture, h: mixture(h))


def one_by_one(mixture: Mixture, h: np.ndarray) -> np.ndarray:
    """Each token through each of its experts, in float64."""
    router, gate_up, down = (np.asarray(x[...], np.float64) for x in (mixture.router, mixture.gate_up, mixture.down))
    out = np.zeros(h.shape)
    for at in np.ndindex(h.shape[:2]):
        x = h[at].astype(np.float64)
        probability = np.exp(x @ router - (x @ router).max())
        probability /= probability.sum()
        chosen = np.argsort(-probability)[: mixture.settings.chosen]
        total = probability[chosen].sum() if mixture.settings.renormalised else 1
        for e in chosen:
            gate, up = np.split(x @ gate_up[e], 2)
            out[at] += probability[e] / total * ((gate / (1 + np.exp(-gate)) * up) @ down[e])
    return out


@pytest.mark.promise("Experts give every token what it chose, however many choose the same")
@pytest.mark.parametrize(("tokens", "renormalised"), [(2, False), (40, True)])  # gathered, and grouped
def test_experts_are_those_of_a_loop(tokens, renormalised, figure):
    mixture = Mixture(Experts(8, 3, 16, renormalised), 32, param_dtype=jnp.float32, rngs=nnx.Rngs(params=0))
    h = draws.array(draws.rng().normal(size=(2, tokens // 2, 32)), "float32")
    expected = one_by_one(mixture, np.asarray(h))
    found = apply(mixture, h)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(mixture(h), found, atol=1e-5)
    figure(f"{tokens} tokens, 3 of 8 experts each: {np.abs(found - expected).max():.0e}")


def test_no_token_is_dropped_where_all_choose_the_same():
    mixture = Mixture(Experts(8, 1, 16, True), 32, param_dtype=jnp.float32, rngs=nnx.Rngs(params=0))
    h = jnp.broadcast_to(draws.array(draws.rng().normal(size=(1, 1, 32)), "float32"), (1, 64, 32))
    found = np.asarray(apply(mixture, h))
    np.testing.assert_allclose(found, np.broadcast_to(one_by_one(mixture, np.asarray(h[:, :1])), h.shape), atol=1e-4)


def test_a_step_has_no_loop_over_experts():
    def program(count: int, tokens: int) -> int:
        mixture = Mixture(Experts(count, 2, 16, True), 32, param_dtype=jnp.float32, rngs=nnx.Rngs(params=0))
        return len(jax.make_jaxpr(lambda h: mixture(h))(jnp.ones((1, tokens, 32))).eqns)

    assert program(64, 1) == program(4, 1)
    assert program(64, 200) == program(4, 200)


MOE = LLAMA | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 8}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\], .*layers without experts"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"num_experts_per_tok": 9}, "cannot choose 9 of 8 experts"),
        ({"moe_intermediate_size": 0}, "expert size must be a positive integer, got 0"),
    ],
)
def test_other_mixtures_are_refused_by_name(changes, message):
    assert ModelConfig.from_hf(MOE).experts == Experts(8, 8, 768, False)
    with pytest.raises(UnsupportedModelError, match=message):
        ModelConfig.from_hf(MOE | changes)


def test_two_numbers_of_experts_are_refused():
    with pytest.raises(CheckpointError, match="number of experts as 8 in num_experts and 4 in num_local_experts"):
        ModelConfig.from_hf(MOE | {"num_local_experts": 4})


def test_experts_that_do_not_fit_are_named(tmp_path):
    folder = shutil.copytree(GOLDEN / "mixtral", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    for changes, message in (
        ({"num_local_experts": 5}, r"missing: 'model\.layers\.0\.block_sparse_moe\.experts\.4\.w1"),
        ({"num_local_experts": 3}, r"gate\.weight' has shape \(4, 64\), the configuration wants \(3, 64\)"),
        ({"intermediate_size": 31}, r"has shape \(32, 64\), the configuration wants \(31, 64\) for an expert"),
        ({"num_local_experts": 10**12}, "missing"),
    ):
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(folder)
