"""Every family decodes as it reads, through the full cache as transformers does, and through the default preset."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import METHODS
from safetensors.numpy import load_file
from test_weights import BIASES, LAYER, NORMS, permute, write_gguf

from minikv_jax import decode_step, prefill
from minikv_jax.models import load_model, open_checkpoint
from minikv_jax.models.families import FAMILIES

GOLDEN = Path(__file__).parent / "golden"
# What transformers was run with. A window of 12 tokens, as the golden Mistral has, no cache can hold.
MODELS = ["llama3", "llama2", "qwen2", "qwen2_yarn", "qwen3", "phi3", "granite", "seed_oss", "ernie4_5"]
MODELS += ["qwen3_moe", "mixtral"]
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
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "qwen3_moe"])
def test_the_default_preset_decodes(name):
    tokens = np.load(GOLDEN / f"{name}.npz")["tokens"]
    found = decoded(load_model(GOLDEN / name, jnp.float32), METHODS["minikv_plus"], tokens)
    assert found.shape == (2, STEPS + 1, 128)
    assert np.isfinite(found).all()


def test_every_family_has_a_golden_model():
    made = {model.config.architecture for model in map(load_model, (GOLDEN / name for name in MODELS))}
    assert made | {"mistral"} == set(FAMILIES)


# What llama.cpp's converter calls a family's tensors where not as LLaMA's, and what it writes beside the sizes.
GGUF_NAMES = LAYER | BIASES | NORMS | {"self_attn.qkv_proj.weight": "attn_qkv.weight"}
GGUF_NAMES |= {"mlp.gate_up_proj.weight": "ffn_up.weight", "embed_tokens.weight": "token_embd.weight"}
GGUF_NAMES |= {"norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
GGUF_NAMES |= {"mlp.gate.weight": "ffn_gate_inp.weight", "block_sparse_moe.gate.weight": "ffn_gate_inp.weight"}
EXPERTS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
OWN_NAMES = {"seed_oss": {"post_attention_layernorm.weight": "post_attention_norm.weight"}}
FLOAT32, UINT32 = 6, 4
OWN_ENTRIES = {
    "granite": {
        "granite.embedding_scale": (6.0, FLOAT32),
        "granite.attention.scale": (0.2, FLOAT32),
        "granite.residual_scale": (0.6, FLOAT32),
        "granite.logit_scale": (3.0, FLOAT32),
    },
    "qwen3_moe": {
        "qwen3moe.expert_count": (8, UINT32),
        "qwen3moe.expert_used_count": (3, UINT32),
        "qwen3moe.expert_feed_forward_length": (16, UINT32),
    },
    "mixtral": {"llama.expert_count": (4, UINT32), "llama.expert_used_count": (2, UINT32)},
}


def as_gguf(folder: Path, path: Path) -> Path:
    """What llama.cpp's converter makes of a golden folder."""
    config, tensors = json.loads((folder / "config.json").read_text()), {}
    kind, heads = config["model_type"], {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    names, experts = GGUF_NAMES | OWN_NAMES.get(kind, {}), {}
    for name, weight in load_file(folder / "model.safetensors").items():  # sorted: experts by their numbers
        number, _, rest = name.removeprefix("model.layers.").partition(".")
        inside = number.isdigit()
        part = rest if inside else name.removeprefix("model.")
        projection = part.split(".")[1] if inside else ""
        if ".experts." in part:
            *_, matrix, _ = part.split(".")
            experts.setdefault(f"blk.{number}.ffn_{EXPERTS[matrix]}_exps.weight", []).append(weight)
            continue
        if kind in ("granite", "mixtral") and projection in heads:
            weight = permute(weight, config[heads[projection]])
        tensors[f"blk.{number}.{names[part]}" if inside else names[part]] = weight
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    tensors |= {name: np.stack(matrices) for name, matrices in experts.items()}
    config["model_type"] = {"qwen3_moe": "qwen3moe", "mixtral": "llama"}.get(kind, kind)
    config["intermediate_size"] = config.get("moe_intermediate_size", config["intermediate_size"])
    return write_gguf(path, config, tensors, extra=OWN_ENTRIES.get(kind))


@pytest.mark.parametrize("name", ["qwen3", "phi3", "granite", "seed_oss", "ernie4_5", "qwen3_moe", "mixtral"])
def test_a_gguf_file_is_the_model_of_the_folder(tmp_path, name):
    folder = open_checkpoint(GOLDEN / name)
    file = open_checkpoint(as_gguf(GOLDEN / name, tmp_path / "m.gguf"))
    # Of a mixture only the experts' size is in GGUF; nothing reads the other.
    assert file.config.replace(intermediate_size=folder.config.intermediate_size) == folder.config
    ours, theirs = dict(folder.tensors()), dict(file.tensors())
    assert ours.keys() == theirs.keys()
    for key, weight in ours.items():
        np.testing.assert_allclose(theirs[key], weight, rtol=1e-6, err_msg=key)  # multipliers are float32 in GGUF
