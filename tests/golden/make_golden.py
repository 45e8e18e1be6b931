"""Makes the reference checkpoints and logits in this folder with PyTorch and transformers, which the tests do without.

    python -m venv reference
    reference/bin/pip install "torch>=2.8" "transformers>=5.10,<6" "gguf>=0.17" accelerate sentencepiece protobuf
    reference/bin/python tests/golden/make_golden.py --smollm2 SmolLM2-135M-Instruct.Q4_1.gguf

The GGUF file is the one `minikv_jax.models.locate("smollm2")` returns. Without --smollm2 only the tiny models are made.
The results depend on the versions of PyTorch and transformers in the last digits only.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Ernie4_5Config,
    Ernie4_5ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SeedOssConfig,
    SeedOssForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

HERE = Path(__file__).parent

# Wide random weights: with transformers' 0.02 attention is near uniform, and a wrong rotary angle hardly shows.
TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Verse in the public domain (William Blake, 1794; Percy Bysshe Shelley, 1818), and prose, code and lists written here.
TEXT = """Tyger Tyger, burning bright,
In the forests of the night;
What immortal hand or eye,
Could frame thy fearful symmetry?

In what distant deeps or skies,
Burnt the fire of thine eyes?
On what wings dare he aspire?
What the hand, dare seize the fire?

I met a traveller from an antique land,
Who said: "Two vast and trunkless legs of stone
Stand in the desert. Near them, on the sand,
Half sunk a shattered visage lies, whose frown,
And wrinkled lip, and sneer of cold command,
Tell that its sculptor well those passions read."

A cache keeps what would be costly to work out again. A language model keeps two vectors for every token it has read,
one to be found by and one to be read, in every layer and in every head. With a long book in front of it the cache
outgrows the model itself, and most of what it holds is never looked at twice. So one may ask which parts are needed,
and how exactly. Three observations help. A few tokens are looked at by nearly all that follow. The newest tokens are
looked at more than the old ones. And where attention is spread over many tokens, small errors in each of them cancel.

def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)

def variance(values):
    center = mean(values)
    return mean([(value - center) ** 2 for value in values])

The keys are: apple 48213, river 90577, candle 31864, window 77402. To repeat: apple 48213, river 90577, candle 31864,
window 77402. Once more, in another order: candle 31864, apple 48213, window 77402, river 90577.

Tyger Tyger, burning bright,
In the forests of the night;
What immortal hand or eye,
Could frame thy fearful symmetry?

In what distant deeps or skies,
Burnt the fire of thine eyes?
On what wings dare he aspire?
What the hand, dare seize the fire?
"""


def llama3():
    """LLaMA 3.1: grouped heads, tied head, rotary scaling that bends within the test's length. Stored as bfloat16."""
    scaling = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    config = LlamaConfig(**TINY, **heads, rope_parameters=scaling, tie_word_embeddings=True, rms_norm_eps=1e-5)
    plain = LlamaConfig(**TINY, **heads, tie_word_embeddings=True, rms_norm_eps=1e-5)
    return LlamaForCausalLM(config), plain, torch.bfloat16, {}


def llama2():
    """LLaMA 2: as many key-value heads as query heads, own head. Stored as float32 in shards."""
    config = LlamaConfig(**TINY | {"hidden_size": 48, "intermediate_size": 64}, num_attention_heads=3)
    return LlamaForCausalLM(config), None, torch.float32, {"max_shard_size": "80kB"}


def mistral():
    """Mistral: a head size of its own, and a sliding window much shorter than the test. Stored as float16."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32}
    config = MistralConfig(**TINY, **heads, sliding_window=12)
    plain = MistralConfig(**TINY, **heads, sliding_window=None)
    return MistralForCausalLM(config), plain, torch.float16, {}


def qwen2():
    """Qwen2: biases on query, key and value, the keys' large as in the real ones. Stored as float16."""
    config = Qwen2Config(**TINY, num_attention_heads=4, num_key_value_heads=2, use_sliding_window=False)
    model = Qwen2ForCausalLM(config)
    for layer in model.model.layers:
        attention = layer.self_attn
        for projection, size in ((attention.q_proj, 1.0), (attention.k_proj, 4.0), (attention.v_proj, 1.0)):
            torch.nn.init.normal_(projection.bias, std=size)
    return model, None, torch.float16, {}


def qwen2_yarn():
    """Qwen2.5 with YaRN, as its model card asks for long texts: the test is three times as long as the original length.

    Stored as float16."""
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 16}
    config = Qwen2Config(**TINY, **sizes, rope_parameters=rope, use_sliding_window=False)
    plain = Qwen2Config(**TINY, **sizes, use_sliding_window=False)
    return Qwen2ForCausalLM(config), plain, torch.float16, {}


# Each for heads of 128: what Qwen2.5's and Qwen3's cards give, DeepSeek's weights, gpt-oss' borders without rounding, a
# border beyond the last channel with a factor for attention, and borders of one's own.
ROPES = {
    "qwen2.5": {"rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
    "deepseek": {"rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0,
                 "mscale_all_dim": 0.707},
    "gpt-oss": {"rope_theta": 150000.0, "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False,
                "beta_fast": 32.0, "beta_slow": 1.0},
    "short": {"rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 4, "attention_factor": 1.5},
    "narrow": {"rope_theta": 1e6, "factor": 8.0, "original_max_position_embeddings": 8192, "beta_fast": 4.0,
               "beta_slow": 2.0},
}  # fmt: skip


def make_ropes() -> None:
    """Inverse frequencies and the factor of attention for each of ROPES."""
    found = {}
    for name, rope in ROPES.items():
        config = Qwen3Config(head_dim=128, rope_parameters={"rope_type": "yarn", **rope})
        frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
        found |= {f"{name} frequencies": frequencies.numpy(), f"{name} attention": np.float64(factor)}
        found[f"{name} settings"] = np.array(json.dumps(rope))
    np.savez_compressed(HERE / "yarn.npz", **found)


def qwen3():
    """Qwen3: norms of every head's query and key, and a head size of its own. Stored as float16."""
    config = Qwen3Config(**TINY, num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True)
    model = Qwen3ForCausalLM(config)
    for layer in model.model.layers:
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    return model, None, torch.float16, {}


def phi3():
    """Phi-3-mini-4k and Phi-4: query, key and value in one matrix, gate and up in another. Stored as float16."""
    config = Phi3Config(**TINY, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    return Phi3ForCausalLM(config), None, torch.float16, {}


GRANITE = {"embedding_multiplier": 6.0, "attention_multiplier": 0.2, "residual_multiplier": 0.6, "logits_scaling": 3.0}


def granite():
    """Granite 3: four multipliers, and one matrix for both ends. Stored as float32."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    sizes = TINY | {"hidden_size": 48, "intermediate_size": 64}
    config, plain = GraniteConfig(**sizes, **heads, **GRANITE), GraniteConfig(**sizes, **heads)
    return GraniteForCausalLM(config), plain, torch.float32, {}


def seed_oss():
    """Seed-OSS: biases of query, key and value, and a head size of its own. Stored as float16."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "pad_token_id": 0}
    model = SeedOssForCausalLM(SeedOssConfig(**TINY, **heads))
    for layer in model.model.layers:
        attention = layer.self_attn
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            torch.nn.init.normal_(projection.bias, std=1.0)
    return model, None, torch.float16, {}


def ernie4_5():
    """Ernie 4.5: rotary embedding turns neighbouring channels. Stored as float16."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    return Ernie4_5ForCausalLM(Ernie4_5Config(**TINY, **heads)), None, torch.float16, {}


def qwen3_moe():
    """Qwen3-30B-A3B's architecture: 8 experts, of which a token takes 3. Stored as float16."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    experts = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "norm_topk_prob": True}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**TINY, **heads, **experts))
    for layer in model.model.layers:
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
        torch.nn.init.normal_(layer.mlp.gate.weight, std=0.2)
    return model, None, torch.float16, {}


def mixtral():
    """Mixtral: 4 experts, of which a token takes 2. Stored as float16."""
    sizes = TINY | {"intermediate_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=4, num_experts_per_tok=2))
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.gate.weight, std=0.2)
    return model, None, torch.float16, {}


def mistral3():
    """Mistral-Small-3.1 and 3.2: a Mistral beside a part for images, which text does not use. Stored as float16."""
    text = MistralConfig(
        **TINY, num_attention_heads=4, num_key_value_heads=2, sliding_window=None, tie_word_embeddings=False
    )
    image = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    image |= {"head_dim": 16, "image_size": 28, "patch_size": 14, "num_channels": 1, "model_type": "pixtral"}
    config = Mistral3Config(text_config=text, vision_config=image, tie_word_embeddings=False)
    return Mistral3ForConditionalGeneration(config), None, torch.float16, {}


@torch.no_grad()
def make_tiny(name, build) -> None:
    torch.manual_seed(20)
    model, plain, dtype, options = build()
    decoder = model.model.language_model if hasattr(model.model, "language_model") else model.model
    for layer in decoder.layers:  # fresh norms are all ones, which would hide a norm left out
        torch.nn.init.uniform_(layer.input_layernorm.weight, 0.5, 1.5)
        torch.nn.init.uniform_(layer.post_attention_layernorm.weight, 0.5, 1.5)
    torch.nn.init.uniform_(decoder.norm.weight, 0.5, 1.5)
    folder = HERE / name
    model.to(dtype).save_pretrained(folder, **options)
    # Read back, so that the reference computes in float32 with the weights as rounded for the file. (`model.float()`
    # would not do: the rotary frequencies are rounded with the weights and stay so.)
    model = type(model).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = torch.from_numpy(np.random.default_rng(3).integers(3, 128, (2, 56)))
    logits = model(tokens).logits
    if plain is not None:  # the feature under test must matter
        without = type(model)(plain).eval()
        without.load_state_dict(model.state_dict())
        change = (without(tokens).logits - logits).abs().max().item()
        assert change > 0.1, f"{name}: the feature changes the logits by {change} only"
    np.savez_compressed(HERE / f"{name}.npz", tokens=tokens.numpy().astype(np.int32), logits=logits.numpy())
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{name}: {size} bytes, logits from {logits.min():.1f} to {logits.max():.1f}")


@torch.no_grad()
def make_smollm2(path: Path) -> None:
    """The most likely next token at 512 positions, and how far it leads, with weights that transformers dequantizes."""
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    tokens = tokenizer(TEXT, add_special_tokens=False, return_tensors="pt").input_ids[:, :512]
    assert tokens.shape == (1, 512), tokens.shape
    best = model(tokens).logits[0].topk(2)
    np.savez_compressed(
        HERE / "smollm2_512.npz",
        text=np.array(tokenizer.decode(tokens[0])),
        tokens=tokens[0].numpy().astype(np.int32),
        next_token=best.indices[:, 0].numpy().astype(np.int32),
        margin=(best.values[:, 0] - best.values[:, 1]).numpy(),
    )
    margins = best.values[:, 0] - best.values[:, 1]
    right = (best.indices[:-1, 0] == tokens[0, 1:]).float().mean()
    print(f"smollm2: {right:.3f} of the text predicted, {(margins <= 1e-3).sum()} positions with a margin under 1e-3")


WORDS = (
    "Hello  it's 12345 a test",
    " two",
    "",
    "café </s> naïve\n\n\tend ",
    "<s>the <unk> 日本",
    "It'S +6789!? the theory",
)


def make_tokenizers() -> None:
    """Folders of the older kinds, and what AutoTokenizer makes of WORDS."""
    import sentencepiece

    spm, bpe = HERE / "tokenizer_model", HERE / "vocab_merges"
    for folder in (spm, bpe):
        folder.mkdir(exist_ok=True)
    (HERE / "text.txt").write_text(TEXT)
    sentencepiece.SentencePieceTrainer.train(
        input=str(HERE / "text.txt"), model_prefix=str(spm / "tokenizer"), vocab_size=400, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
    )  # fmt: skip
    (HERE / "text.txt").unlink()
    (spm / "tokenizer.vocab").unlink()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (spm / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **special}))
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.train_from_iterator([TEXT], trainer)
    trained.model.save(str(bpe))
    special = {"eos_token": "<|endoftext|>", "additional_special_tokens": ["<|im_start|>"]}
    (bpe / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer", **special}))
    for folder in (spm, bpe):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ids = [tokenizer(text).input_ids for text in WORDS]
        texts = [tokenizer.decode(x) for x in ids]
        (HERE / f"{folder.name}.json").write_text(json.dumps({"texts": WORDS, "ids": ids, "decoded": texts}))


TINY_MODELS = (
    llama3,
    llama2,
    mistral,
    qwen2,
    qwen2_yarn,
    qwen3,
    phi3,
    granite,
    seed_oss,
    ernie4_5,
    qwen3_moe,
    mixtral,
    mistral3,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", type=Path, help="the GGUF file of SmolLM2-135M-Instruct")
    parser.add_argument("--only", nargs="*", help="the tiny models to make; by default all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for build in [build for build in TINY_MODELS if not arguments.only or build.__name__ in arguments.only]:
        make_tiny(build.__name__, build)
        config = json.loads((HERE / build.__name__ / "config.json").read_text())
        print(json.dumps(config))
    make_ropes()
    make_tokenizers()
    if arguments.smollm2:
        make_smollm2(arguments.smollm2)


if __name__ == "__main__":
    main()
