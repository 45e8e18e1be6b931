"""Configurations from config.json, in the spellings of transformers 4 and 5, and from GGUF metadata."""

import json
import logging
from pathlib import Path

import draws
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
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "sliding_window": 4096}
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


@pytest.mark.parametrize("kind", ["longrope", "su"])
def test_other_rope_scaling_is_refused(kind):
    with pytest.raises(UnsupportedModelError, match=f"{kind}.*supported.*'linear', 'llama3', 'yarn', 'dynamic'"):
        ModelConfig.from_hf(LLAMA | {"rope_scaling": {"type": kind, "factor": 4.0}})


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
DEFAULT = {"rope_type": "default", "rope_theta": 1e6}
LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.promise("A setting of config.json that changes the result is used or refused, never ignored")
@pytest.mark.parametrize(
    ("entries", "message"),
    [
        # As model cards say, in a file that transformers 5 wrote.
        ({"rope_parameters": DEFAULT, "rope_scaling": YARN, "rope_theta": None}, "write rope_theta into rope_scaling"),
        ({"rope_parameters": YARN, "rope_scaling": {"rope_type": "default"}}, "in two ways, rope_scaling .* and"),
        ({"rope_parameters": LINEAR, "rope_scaling": {"rope_type": "default"}}, "in two ways, rope_scaling .* and"),
        ({"rope_parameters": LINEAR, "rope_scaling": LINEAR | {"factor": 4.0}}, "in two ways"),
        ({"rope_scaling": LINEAR, "rope_condense_ratio": 8}, "in two ways.*rope_condense_ratio 8"),
        ({"rope_scaling": {"factor": 4.0}}, "rope_scaling has factor 4.0 but no rope_type"),
        (
            {"rope_scaling": LINEAR | {"type": "default"}},
            "kind as 'linear' in rope_type and 'default' in type",
        ),
        ({"rope_parameters": DEFAULT}, "rope_theta as 1000000.0 in rope_parameters and 500000.0 in its top level"),
        (
            {"rope_parameters": DEFAULT, "rope_scaling": LINEAR, "rope_theta": None},
            "write rope_theta into rope_scaling",
        ),
        (
            {"rope_scaling": LLAMA3_ROPE, "original_max_position_embeddings": 4096},
            "original_max_position_embeddings as 8192 in rope_scaling and 4096 in its top level",
        ),
        ({"rope_scaling": LINEAR | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"per_layer_config": {"0": {"hidden_size": 5}}}, "per_layer_config"),
        ({"text_config": {"hidden_size": 5}}, "text_config"),
        ({"layer_types": ["sliding_attention"] * 32}, "32 of 32 layers a sliding window.*gives it to 0"),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(entries, message):
    with pytest.raises(MiniKVError, match=message):
        ModelConfig.from_hf(LLAMA | entries)


def test_settings_given_twice_alike_are_accepted():
    plain = ModelConfig.from_hf(LLAMA | {"rope_scaling": LINEAR})
    for entries in (
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": LINEAR},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "rope_scaling": LINEAR},
        {"rope_parameters": LINEAR | {"rope_theta": 500000.0}, "rope_scaling": LINEAR | {"type": "linear"}},
        {"rope_parameters": LINEAR, "rope_scaling": {}, "rope_condense_ratio": 2},
        {"rope_parameters": {"rope_type": "default"}, "rope_condense_ratio": 2},
    ):
        assert ModelConfig.from_hf(LLAMA | entries) == plain


VICUNA = {"max_position_embeddings": 4096, "max_sequence_length": 16384, "rope_scaling": LINEAR | {"factor": 4.0}}


@pytest.mark.parametrize(
    ("entries", "longest"),
    [
        # Vicuna-7B-v1.5-16k, LongChat-7B-v1.5-32k and LongChat-7B-16k.
        (VICUNA, 16384),
        ({"max_position_embeddings": 4096, "rope_scaling": LINEAR | {"factor": 8.0}}, 32768),
        ({"max_position_embeddings": 2048, "rope_condense_ratio": 8}, 16384),
        # A file that says which of the two lengths it states, and one whose two statements differ.
        ({"max_position_embeddings": 8192, "rope_scaling": LINEAR | {"original_max_position_embeddings": 4096}}, 8192),
        ({"max_position_embeddings": 4096, "max_sequence_length": 6000, "rope_scaling": LINEAR}, 6000),
        ({"max_position_embeddings": 131072, "rope_scaling": LLAMA3_ROPE}, 131072),
        ({"max_position_embeddings": 4096, "max_sequence_length": 16384}, 4096),
        # Qwen2.5 and Qwen3, as their cards say, and a file that states the stretched length.
        ({"max_position_embeddings": 32768, "rope_scaling": YARN}, 131072),
        ({"max_position_embeddings": 40960, "rope_scaling": YARN}, 131072),
        ({"max_position_embeddings": 131072, "rope_scaling": YARN}, 131072),
    ],
)
def test_rope_scaling_stretches_the_longest_context(entries, longest):
    assert ModelConfig.from_hf(LLAMA | entries).max_position_embeddings == longest


def one_of(rng, *choices):
    return choices[rng.integers(len(choices))]


def drawn_entries(rng) -> dict:
    """Settings of rotary embeddings, windows and heads, in any spelling and in several places."""

    def group():
        theta = one_of(rng, {}, {}, {"rope_theta": 1e4}, {"rope_theta": 5e5})
        linear = one_of(rng, {"rope_type": "linear"}, {"type": "linear"}, {"rope_type": "dynamic"})
        kind = one_of(rng, {"rope_type": "default"}, linear, YARN, LLAMA3_ROPE, {})
        original = one_of(rng, {}, {}, {"original_max_position_embeddings": 8192})
        factor = {"factor": 2.0} if {"linear", "dynamic"} & set(kind.values()) or rng.random() < 0.1 else {}
        return one_of(rng, None, {}, kind | theta | factor | original, kind | theta | factor)

    entries = {
        "rope_theta": one_of(rng, 1e4, 5e5),
        "rope_parameters": group(),
        "rope_scaling": group(),
        "original_max_position_embeddings": one_of(rng, 8192, 4096),
        "num_key_value_heads": one_of(rng, None, 2, 4),
        "head_dim": one_of(rng, None, 32, 64),
        "sliding_window": one_of(rng, None, 7),
        "use_sliding_window": one_of(rng, True, False),
        "max_window_layers": one_of(rng, 0, 1, 2, 9),
        "layer_types": one_of(rng, *([kind] * 2 for kind in ("sliding_attention", "full_attention"))),
    }
    often = {"rope_parameters", "rope_scaling", "rope_theta", "use_sliding_window"}
    return {key: value for key, value in entries.items() if rng.random() < (0.6 if key in often else 0.3)}


def as_transformers_reads(architecture: str, entries: dict) -> dict:
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    kinds = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
    config = kinds[architecture].from_dict(json.loads(json.dumps(entries)))
    config.standardize_rope_params()  # as its rotary embeddings do
    rope = config.rope_parameters
    names = dict.fromkeys(("linear", "dynamic", "yarn"), ("factor",))
    names["llama3"] = ("factor", "low_freq_factor", "high_freq_factor")
    scaling = tuple(rope[name] for name in names.get(rope["rope_type"], ()))
    if rope["rope_type"] in ("llama3", "yarn"):
        scaling += (rope["original_max_position_embeddings"],)
    layers = getattr(config, "layer_types", None)
    if architecture == "mistral":
        layers = ["sliding_attention" if config.sliding_window else "full_attention"] * 2
    windows = [config.sliding_window if kind == "sliding_attention" else None for kind in layers or ["full_attention"]]
    return {
        "scaling": (rope["rope_type"], *scaling),
        "theta": rope["rope_theta"],
        "windows": {None} if architecture == "llama" else set(windows),
        "heads": (config.num_key_value_heads, getattr(config, "head_dim", None) or 64 // 4),
    }


@pytest.mark.promise("config.json is read as transformers reads it, or refused")
def test_settings_in_every_spelling_are_read_as_transformers_reads_them_or_refused(figure, caplog):
    caplog.set_level(logging.CRITICAL, "transformers")
    rng, accepted = draws.rng(), 0
    sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 16384, "num_key_value_heads": 4}
    for _ in range(600):
        architecture = one_of(rng, "llama", "mistral", "qwen2", "qwen3")
        entries = sizes | {"model_type": architecture} | drawn_entries(rng)
        try:
            ours = ModelConfig.from_hf(entries)
        except MiniKVError:
            continue
        accepted += 1
        scaling = ours.rope_scaling
        values = () if scaling is None else (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor)
        values += () if scaling is None else (scaling.original_max_position_embeddings,)
        found = {
            "scaling": ("default" if scaling is None else scaling.kind, *(v for v in values if v is not None)),
            "theta": ours.rope_theta,
            "windows": {ours.sliding_window},
            "heads": (ours.num_kv_heads, ours.head_dim),
        }
        # transformers 5 has no meaning for null here, 4 has these.
        if entries.get("num_key_value_heads", 4) is None and architecture == "mistral":
            entries["num_key_value_heads"] = 4
        if entries.get("head_dim", 16) is None and architecture == "qwen3":
            entries["head_dim"] = 16
        assert found == as_transformers_reads(architecture, entries), entries
    assert accepted > 100
    figure(f"600 drawn files, {accepted} accepted, each read alike")


PHI3 = LLAMA | {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}
GRANITE = LLAMA | {"architectures": ["GraniteForCausalLM"], "model_type": "granite"}
SEED_OSS = LLAMA | {"architectures": ["SeedOssForCausalLM"], "model_type": "seed_oss"}
ERNIE = LLAMA | {"architectures": ["Ernie4_5ForCausalLM"], "model_type": "ernie4_5"}
MISTRAL3 = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "model_type": "mistral3",
    "text_config": MISTRAL | {"architectures": None, "sliding_window": None},
    "vision_config": {"model_type": "pixtral"},
}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (PHI3 | {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}}, "'su' is not supported"),
        (PHI3 | {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn' is not supported"),  # means LongRoPE there
        (PHI3 | {"partial_rotary_factor": 0.75}, "partial_rotary_factor is 0.75"),
        (GRANITE | {"attention_bias": True}, "attention_bias is True"),
        (SEED_OSS | {"attention_out_bias": True}, "attention_out_bias is True"),
        (ERNIE | {"use_bias": True}, "use_bias is True"),
        (MISTRAL3 | {"text_config": {"model_type": "ministral3"}}, "wraps a language model of type 'ministral3'"),
        (MISTRAL3 | {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        (MISTRAL3 | {"architectures": ["LlavaForConditionalGeneration"]}, "of type 'mistral3' .*Llava"),
        # These have LLaMA's tensor names, and another computation.
        *((LLAMA | {"model_type": kind, "architectures": None}, f"type '{kind}'.*supported") for kind in
          ("smollm3", "ministral3", "granitemoe", "ernie4_5_moe", "olmo2", "exaone4", "gpt_oss", "qwen3_next")),
    ],
)  # fmt: skip
def test_other_models_of_known_names_are_refused_by_name(entries, message):
    with pytest.raises(UnsupportedModelError, match=message):
        ModelConfig.from_hf(entries)


def test_families_differ_where_config_json_is_silent():
    silent = {k: v for k, v in LLAMA.items() if k not in ("rope_theta", "attention_bias", "rms_norm_eps", "head_dim")}
    ernie, seed, phi, granite = (
        ModelConfig.from_hf(silent | {"model_type": kind, "architectures": None})
        for kind in ("ernie4_5", "seed_oss", "phi3", "granite")
    )
    assert (ernie.rope_theta, phi.rope_theta) == (5e5, 1e4)
    assert (phi.rms_norm_eps, granite.rms_norm_eps, ernie.rms_norm_eps) == (1e-5, 1e-6, 1e-5)
    assert (seed.query_key_value_bias, ModelConfig.from_hf(SEED_OSS).query_key_value_bias) == (True, False)
    assert ernie.tie_word_embeddings
    assert not granite.tie_word_embeddings


def test_a_wrapped_language_model_is_read_as_itself():
    inside = ModelConfig.from_hf(MISTRAL3)
    assert inside.replace(tie_word_embeddings=False) == ModelConfig.from_hf(MISTRAL3["text_config"])
    assert ModelConfig.from_hf(MISTRAL3 | {"text_config": MISTRAL3["text_config"] | {"tie_word_embeddings": False}})


@pytest.mark.parametrize("name", ["llama3", "llama2", "mistral", "qwen2", "qwen3"])
def test_files_written_by_transformers(name):
    config = ModelConfig.from_hf(json.loads((GOLDEN / name / "config.json").read_text()))
    assert config.architecture == {"llama2": "llama", "llama3": "llama"}.get(name, name)
    assert config.query_key_value_bias == (name == "qwen2")
    assert config.sliding_window == (12 if name == "mistral" else None)
    assert (config.rope_scaling is not None) == (name == "llama3")
    assert config.tie_word_embeddings == (name in ("llama3", "qwen3"))
    assert config.query_key_norm == (name == "qwen3")


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
        (QWEN2 | {"use_sliding_window": True, "layer_types": ["full_attention"] * 32}, None),
        (MISTRAL | {"layer_types": ["sliding_attention"] * 32}, 4096),
        (LLAMA | {"layer_types": ["full_attention"] * 32}, None),
        (LLAMA | {"sliding_window": 4096}, None),
    ],
)
def test_sliding_window(entries, window):
    assert ModelConfig.from_hf(entries).sliding_window == window


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (QWEN2 | {"use_sliding_window": True, "layer_types": []}, "layer_types must be a list of 32 entries"),
        (QWEN2 | {"use_sliding_window": True, "layer_types": ["chunked_attention"] * 32}, "layer_types must be"),
        (QWEN2 | {"layer_types": ["sliding_attention"] * 32}, "no sliding window is in use"),
        (MISTRAL | {"layer_types": ["sliding_attention", "full_attention"] * 16}, "16 of 32 .*class gives it to 32"),
        (MISTRAL | {"sliding_window": None, "layer_types": ["sliding_attention"] * 32}, "class gives it to 0"),
    ],
)
def test_layer_types_that_do_not_fit_are_refused(entries, message):
    with pytest.raises(MiniKVError, match=message):
        ModelConfig.from_hf(entries)


def test_what_transformers_accepts_is_accepted():
    plain = ModelConfig.from_hf(LLAMA)
    assert ModelConfig.from_hf(LLAMA | {"hidden_act": "swish"}) == plain
    none = ModelConfig.from_hf(LLAMA | {"eos_token_id": -1, "bos_token_id": -1})
    assert (none.eos_token_ids, none.bos_token_id) == ((), None)
    assert ModelConfig.from_hf(LLAMA | {"eos_token_id": [-1, 5]}).eos_token_ids == (5,)
    silent = {key: value for key, value in LLAMA.items() if key not in ("eos_token_id", "bos_token_id")}
    assert ModelConfig.from_hf(silent).eos_token_ids == (2,)
    assert ModelConfig.from_hf(silent | {"eos_token_id": None}).eos_token_ids == ()
    # These classes have no such switch.
    assert ModelConfig.from_hf(QWEN2 | {"attention_bias": True}) == ModelConfig.from_hf(QWEN2)


def test_long_values_are_cut_in_messages():
    for entries in ({"model_type": "x" * 5000}, {"vocab_size": ["y" * 5000]}, {"hidden_act": {"a": [1] * 5000}}):
        with pytest.raises(MiniKVError) as caught:
            ModelConfig.from_hf(LLAMA | entries)
        assert len(str(caught.value)) < 400
        assert "\n" not in str(caught.value)


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
        ({"rope_scaling": {"type": 3}}, "rope_scaling: type must be text, got 3"),
        ({"vocab_size": 10**30}, "vocab_size must be an integer"),
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
    assert ModelConfig.from_gguf(GGUF | linear).max_position_embeddings == 8192
    stretched = GGUF | linear | {"llama.rope.scaling.original_context_length": 4096}
    assert ModelConfig.from_gguf(stretched).max_position_embeddings == 16384
    yarn = linear | {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.original_context_length": 4096}
    config = ModelConfig.from_gguf(GGUF | yarn)
    assert config.rope_scaling == RopeScaling("yarn", 4.0, original_max_position_embeddings=4096)
    assert config.max_position_embeddings == 16384
    fast = ModelConfig.from_gguf(GGUF | yarn | {"llama.rope.scaling.yarn_beta_fast": 16.0})
    assert fast.rope_scaling.beta_fast == 16
    assert ModelConfig.from_gguf(GGUF | {"llama.logit_scale": 0.0, "llama.rope.scaling.attn_factor": 1.0})
    qwen = {key.replace("llama.", "qwen2."): value for key, value in GGUF.items()} | {"general.architecture": "qwen2"}
    assert ModelConfig.from_gguf(qwen).query_key_value_bias
    qwen3 = {key.replace("qwen2.", "qwen3."): value for key, value in qwen.items()} | {"general.architecture": "qwen3"}
    assert ModelConfig.from_gguf(qwen3).query_key_norm


def test_qwen3():
    config = ModelConfig.from_hf(QWEN3)
    assert (config.query_key_norm, config.query_key_value_bias, config.sliding_window) == (True, False, None)
    silent = {key: value for key, value in QWEN3.items() if key not in ("eos_token_id", "bos_token_id")}
    silent |= {"num_attention_heads": 64, "hidden_size": 5120}  # as Qwen3-32B: 64 heads of 128 beside 5,120 channels
    assert ModelConfig.from_hf(silent).head_dim == 128
    assert ModelConfig.from_hf(silent).eos_token_ids == ()
    with pytest.raises(UnsupportedModelError, match=r"attention_bias is True.*output projection"):
        ModelConfig.from_hf(QWEN3 | {"attention_bias": True})
    with pytest.raises(UnsupportedModelError, match="28 of 32 layers"):
        ModelConfig.from_hf(QWEN3 | {"use_sliding_window": True, "max_window_layers": 28})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "gemma"}, "gemma"),
        ({"llama.expert_count": 8}, "has no 'expert_used_count'"),
        (
            {"llama.expert_count": 8, "llama.expert_used_count": 2, "llama.expert_shared_count": 1},
            "expert_shared_count",
        ),
        ({"llama.rope.dimension_count": 32}, "rope.dimension_count is 32"),
        ({"llama.rope.scaling.type": "longrope"}, "longrope.*'yarn'"),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.yarn_ext_factor": 0.5,
            },
            "yarn_ext_factor is 0.5",
        ),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier"),
        ({"llama.block_count": None}, "has no 'block_count'"),
        ({"llama.attention.head_count_kv": [3, 3]}, "must be an integer"),
        ({"general.architecture": 3}, "general.architecture must be text"),
        ({"tokenizer.ggml.tokens": 3}, "tokens must be a list of text"),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, "'none', but its factor is 4"),
        ({"llama.rope.scaling.factor": 2.0, "llama.rope.scale_linear": 4.0}, "factor as 2.0 in .* and 4.0 in"),
        ({"llama.attention.scale": 0.5}, "attention.scale is 0.5, which changes the computation"),
        ({"llama.logit_scale": 16.0}, "logit_scale is 16.0"),
        ({"llama.rope.scaling.attn_factor": 1.2}, "attn_factor is 1.2"),
        ({"llama.final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ],
)
def test_gguf_refusals(change, message):
    with pytest.raises(MiniKVError, match=message):
        ModelConfig.from_gguf(GGUF | change)


def test_rope_scaling_kind_is_checked():
    with pytest.raises(UnsupportedModelError, match="'ntk'"):
        RopeScaling("ntk", 2.0)
