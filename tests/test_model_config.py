"""Configurations from config.json, in the spellings of transformers 4 and 5, and from GGUF metadata."""

import json
from pathlib import Path

import pytest

from minikv_jax.errors import CheckpointError, MiniKVError, UnsupportedModelError
from minikv_jax.models import ModelConfig, RopeScaling

GOLDEN = Path(__file__).parent / "golden"

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 4096}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "sliding_window": 4096}
LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
GGUF = {
    "general.architecture": "llama",
    "llama.embedding_length": 576,
    "llama.feed_forward_length": 1536,
    "llama.block_count": 30,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
    "llama.context_length": 8192,
    "llama.rope.freq_base": 100000.0,
    "llama.vocab_size": 49152,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}


def test_llama_of_transformers_4():
    config = ModelConfig.from_hf(LLAMA | {"rope_scaling": LLAMA3_ROPE, "tie_word_embeddings": False})
    assert config == ModelConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rope_theta=500000.0,
        rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
        rms_norm_eps=1e-5,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        query_key_value_bias=False,
        sliding_window=None,
        bos_token_id=128000,
        eos_token_ids=(128001, 128008, 128009),
        architecture="llama",
    )
    assert hash(config) == hash(ModelConfig.from_hf(LLAMA | {"rope_scaling": LLAMA3_ROPE}))


def test_rope_of_transformers_5_equals_that_of_4():
    old = ModelConfig.from_hf(LLAMA | {"rope_scaling": LLAMA3_ROPE})
    entries = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
    assert ModelConfig.from_hf(entries | {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 500000.0}}) == old
    plain = ModelConfig.from_hf(entries | {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}})
    assert plain == ModelConfig.from_hf(LLAMA)


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_linear_rope_scaling(key):
    config = ModelConfig.from_hf(LLAMA | {"rope_scaling": {key: "linear", "factor": 2}})
    assert config.rope_scaling == RopeScaling("linear", 2.0)


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope", "su"])
def test_other_rope_scaling_is_refused(kind):
    with pytest.raises(UnsupportedModelError, match=f"{kind}.*supported.*'linear', 'llama3'"):
        ModelConfig.from_hf(LLAMA | {"rope_scaling": {"type": kind, "factor": 4.0}})


@pytest.mark.parametrize("name", ["llama3", "llama2", "mistral", "qwen2"])
def test_files_written_by_transformers(name):
    config = ModelConfig.from_hf(json.loads((GOLDEN / name / "config.json").read_text()))
    assert config.architecture == {"llama2": "llama", "llama3": "llama"}.get(name, name)
    assert config.query_key_value_bias == (name == "qwen2")
    assert config.sliding_window == (12 if name == "mistral" else None)
    assert (config.rope_scaling is not None) == (name == "llama3")
    assert config.tie_word_embeddings == (name == "llama3")


@pytest.mark.parametrize(
    ("entries", "window"),
    [
        (MISTRAL, 4096),
        (MISTRAL | {"sliding_window": None}, None),
        ({key: value for key, value in MISTRAL.items() if key != "sliding_window"}, 4096),
        (QWEN2, None),
        (QWEN2 | {"use_sliding_window": False, "max_window_layers": 0}, None),
        (QWEN2 | {"use_sliding_window": True, "max_window_layers": 0}, 4096),
        (QWEN2 | {"use_sliding_window": True, "max_window_layers": 32}, None),
        (QWEN2 | {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 32}, 4096),
        (LLAMA | {"sliding_window": 4096}, None),
    ],
)
def test_sliding_window(entries, window):
    assert ModelConfig.from_hf(entries).sliding_window == window


def test_sliding_window_in_some_layers_is_refused():
    with pytest.raises(UnsupportedModelError, match="28 of 32 layers"):
        ModelConfig.from_hf(QWEN2 | {"use_sliding_window": True, "max_window_layers": 28})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma2"}, "gemma2.*supported.*llama"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "output projection"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "convert the checkpoint"),
        ({"num_key_value_heads": 5}, "multiple of num_kv_heads"),
        ({"hidden_size": 0}, "hidden size 0"),
        ({"vocab_size": -1}, "vocab_size must be a positive integer"),
        ({"head_dim": 127}, "even"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ({"hidden_size": 100, "head_dim": None}, "does not divide"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differ between layers"),
        ({"rope_scaling": LLAMA3_ROPE | {"factor": -1.0}}, "factor must be a positive number"),
        ({"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 1.0}}, "must exceed"),
    ],
)
def test_what_cannot_run_is_refused(change, message):
    with pytest.raises(UnsupportedModelError, match=message):
        ModelConfig.from_hf(LLAMA | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "has no 'hidden_size'"),
        ({"hidden_size": "4096"}, "hidden_size must be an integer, got '4096'"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be an integer"),
        ({"rope_theta": float("nan")}, "rope_theta must be a finite number"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
        ({"rope_scaling": {"type": "linear"}}, "has no 'factor'"),
        ({"tie_word_embeddings": 1}, "true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id"),
    ],
)
def test_damaged_entries_are_named(change, message):
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_hf(LLAMA | change)


def test_unknown_model_without_type():
    with pytest.raises(UnsupportedModelError, match="type None"):
        ModelConfig.from_hf({})


def test_old_file_with_class_name_only():
    entries = {key: value for key, value in LLAMA.items() if key != "model_type"}
    assert ModelConfig.from_hf(entries).architecture == "llama"


def test_gguf():
    config = ModelConfig.from_gguf(GGUF)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (30, 9, 3, 64)
    assert config.rms_norm_eps == 1e-5  # not its float32 rounding
    assert config.eos_token_ids == (2,)
    assert config.rope_theta == 1e5
    assert config.rope_scaling is None


def test_gguf_options():
    assert ModelConfig.from_gguf(GGUF | {"tokenizer.ggml.eot_token_id": 5}).eos_token_ids == (2, 5)
    assert ModelConfig.from_gguf(GGUF | {"llama.attention.key_length": 32}).head_dim == 32
    assert ModelConfig.from_gguf(GGUF | {"llama.attention.sliding_window": 512}).sliding_window == 512
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert ModelConfig.from_gguf(GGUF | linear).rope_scaling == RopeScaling("linear", 4.0)
    assert ModelConfig.from_gguf(GGUF | {"llama.rope.scale_linear": 2.0}).rope_scaling == RopeScaling("linear", 2.0)
    qwen = {key.replace("llama.", "qwen2."): value for key, value in GGUF.items()} | {"general.architecture": "qwen2"}
    assert ModelConfig.from_gguf(qwen).query_key_value_bias


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "gemma"}, "gemma"),
        ({"llama.expert_count": 8}, "Mixture-of-experts"),
        ({"llama.rope.dimension_count": 32}, "rope.dimension_count is 32"),
        ({"llama.rope.scaling.type": "yarn"}, "yarn"),
        ({"llama.block_count": None}, "has no 'block_count'"),
        ({"llama.attention.head_count_kv": [3, 3]}, "must be an integer"),
    ],
)
def test_gguf_refusals(change, message):
    with pytest.raises(MiniKVError, match=message):
        ModelConfig.from_gguf(GGUF | change)


def test_rope_scaling_kind_is_checked():
    with pytest.raises(UnsupportedModelError, match="'ntk'"):
        RopeScaling("ntk", 2.0)
