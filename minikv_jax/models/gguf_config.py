"""Reads the key-value metadata of a GGUF file."""

from collections.abc import Mapping
from typing import Any

from minikv_jax.errors import CheckpointError, UnsupportedModelError, shortened
from minikv_jax.models.entries import Entries, agreed, default_head_dim
from minikv_jax.models.experts import Experts
from minikv_jax.models.families import BY_GGUF, FAMILIES, Family
from minikv_jax.models.rope import RopeScaling

# Settings of a GGUF file that change the computation, and the values with which they do nothing.
_NEUTRAL: dict[str, tuple[float, ...]] = {
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "attention.scale": (0,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.temperature_scale": (0,),
    "attention.shared_kv_layers": (0,),
    "attention.sliding_window_pattern": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.yarn_attn_factor": (0, 1),
    "rope.scaling.yarn_log_multiplier": (0,),
}


def fields(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ModelConfig` that a GGUF file's metadata give; its `from_gguf` says what is raised."""
    whole = Entries(metadata, "GGUF metadata")
    name = whole.optional_text("general.architecture")
    if name not in BY_GGUF:
        raise UnsupportedModelError(
            f"GGUF architecture {shortened(name)} is not supported; supported: "
            f"{', '.join(repr(x) + (' (also Mistral)' if x == 'llama' else '') for x in BY_GGUF)}."
        )
    prefix = f"{name}."
    architecture = BY_GGUF[name]
    if name == "llama" and whole.integer("llama.expert_count", 0):
        architecture = "mixtral"
    family = FAMILIES[architecture]
    own = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    entries = Entries(own, f"GGUF metadata ({prefix}*)")
    hidden_size = entries.integer("embedding_length")
    num_heads = entries.integer("attention.head_count")
    head_dim = entries.integer("attention.key_length", default_head_dim(hidden_size, num_heads))
    _refuse_features(entries, prefix, head_dim, family)
    rope_scaling, longest = _rope(entries)
    ends = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")  # of a text, of a turn in a chat
    return {
        "vocab_size": entries.integer("vocab_size", whole.optional_count("tokenizer.ggml.tokens")),
        "hidden_size": hidden_size,
        "intermediate_size": entries.integer("feed_forward_length"),
        "num_layers": entries.integer("block_count"),
        "num_heads": num_heads,
        "num_kv_heads": entries.integer("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "rope_theta": entries.number("rope.freq_base", 10000.0),
        "rope_scaling": rope_scaling,
        # Stored as float32: 1e-5 comes back as 9.99999974e-06.
        "rms_norm_eps": float(f"{entries.number('attention.layer_norm_rms_epsilon'):.4g}"),
        "max_position_embeddings": longest,
        "tie_word_embeddings": True,
        "sliding_window": entries.optional_integer("attention.sliding_window") or None,
        "bos_token_id": whole.optional_integer("tokenizer.ggml.bos_token_id"),
        "eos_token_ids": tuple(dict.fromkeys(i for key in ends for i in whole.token_ids(key))),
        "architecture": architecture,
        **family.fields,
        "experts": None if family.experts is None else _experts(entries),
    }


def _experts(entries: Entries) -> Experts:
    """llama.cpp always divides the chosen experts' probabilities by their sum, for the architectures known here."""
    size = entries.integer("expert_feed_forward_length", 0) or entries.integer("feed_forward_length")
    return Experts(entries.integer("expert_count"), entries.integer("expert_used_count"), size, renormalised=True)


def multipliers(metadata: Mapping[str, Any]) -> dict[str, float]:
    """Those of `folding.MULTIPLIERS` that a supported model's metadata give; llama.cpp takes 0 for "not set"."""
    name = Entries(metadata, "GGUF metadata").optional_text("general.architecture") or ""
    entries = Entries(metadata, "GGUF metadata")
    given = {
        role: entries.number(f"{name}.{key}", 0.0) for role, (_, key) in FAMILIES[BY_GGUF[name]].multipliers.items()
    }
    return {role: value for role, value in given.items() if value}


def _refuse_features(entries: Entries, prefix: str, head_dim: int, family: Family) -> None:
    """Refuses settings that change the computation in ways the model does not have."""
    if family.experts is None and entries.integer("expert_count", 0):
        raise UnsupportedModelError(f"Experts are not supported in {prefix[:-1]!r} models; expected expert_count 0.")
    for key in ("expert_shared_count", "leading_dense_block_count"):
        if entries.integer(key, 0):
            raise UnsupportedModelError(f"{prefix}{key} is {entries.get(key)}, which is not implemented; supported: 0.")
    for key in ("attention.value_length", "rope.dimension_count"):
        if entries.integer(key, head_dim) != head_dim:
            raise UnsupportedModelError(
                f"{prefix}{key} is {entries.get(key)}, but only models where it equals the head size ({head_dim}) "
                "are supported."
            )
    # How much YaRN does between its two kinds of channels: all of it, or where it is another scaling nothing.
    share = 1 if entries.optional_text("rope.scaling.type") == "yarn" else 0
    folded = [key for _, key in family.multipliers.values()]
    for key, neutral in {**_NEUTRAL, "rope.scaling.yarn_ext_factor": (-1, share)}.items():
        if key in folded:
            continue
        if entries.number(key, neutral[0]) not in neutral:
            raise UnsupportedModelError(
                f"{prefix}{key} is {entries.get(key)}, which changes the computation in a way that is not implemented; "
                f"supported: {' or '.join(map(str, neutral))}."
            )


def _rope(entries: Entries) -> tuple[RopeScaling | None, int]:
    """Scaling, and the longest context."""
    longest = entries.integer("context_length")
    given = {key: entries.optional_number(key) for key in ("rope.scaling.factor", "rope.scale_linear")}
    # llama.cpp takes 0 for "not set".
    factor = agreed(entries.source, "the factor", {key: value or None for key, value in given.items()}) or 1.0
    kind = entries.optional_text("rope.scaling.type") or ("none" if factor == 1 else "linear")
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedModelError(
            f"GGUF rope scaling of type {shortened(kind)} is not supported; supported: 'none', 'linear', 'yarn', and "
            "llama3 factors stored as the tensor rope_freqs.weight."
        )
    if kind == "none" and factor != 1:
        raise CheckpointError(f"{entries.source}: rope.scaling.type is 'none', but its factor is {factor:g}.")
    if kind == "none":
        return None, longest
    original = entries.optional_integer("rope.scaling.original_context_length")
    stretched = max(longest, int(factor * (original or 0)))
    if kind == "linear":
        return RopeScaling("linear", factor), stretched
    original = original or longest
    fast, slow = (entries.number(f"rope.scaling.yarn_{beta}", 0.0) for beta in ("beta_fast", "beta_slow"))
    scaling = RopeScaling(
        "yarn",
        factor,
        original_max_position_embeddings=original,
        beta_fast=fast if fast > 0 else 32.0,  # llama.cpp takes others for "not set"
        beta_slow=slow if slow > 0 else 1.0,
    )
    return scaling, max(longest, int(factor * original))
