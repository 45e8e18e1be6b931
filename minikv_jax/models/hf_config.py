"""Reads a config.json, as transformers 4 or 5 writes it."""

from collections.abc import Callable, Mapping
from typing import Any

from minikv_jax.errors import CheckpointError, UnsupportedModelError, shortened
from minikv_jax.models.entries import Entries, agreed, default_head_dim
from minikv_jax.models.families import FAMILIES, WRAPPERS, Family, Wrapper
from minikv_jax.models.rope import RopeScaling, yarn_magnitude
from minikv_jax.models.wording import listed


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ModelConfig` that a config.json gives; its `from_hf` says what is raised."""
    config = language_model(config)
    architecture = _architecture(config)
    family = FAMILIES[architecture]
    entries = Entries({**family.defaults, **config}, "config.json")
    _refuse_features(entries, family)
    hidden_size = entries.integer("hidden_size")
    num_layers = entries.integer("num_hidden_layers")
    num_heads = entries.integer("num_attention_heads")
    rope_theta, rope_scaling, longest = _rope(entries, family)
    return {
        "vocab_size": entries.integer("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": entries.integer("intermediate_size"),
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": entries.integer("num_key_value_heads", num_heads),
        "head_dim": entries.integer("head_dim", default_head_dim(hidden_size, num_heads)),
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
        "rms_norm_eps": entries.number("rms_norm_eps", 1e-6),
        "max_position_embeddings": longest,
        "tie_word_embeddings": entries.boolean("tie_word_embeddings", False),
        "sliding_window": _sliding_window(entries, family, num_layers),
        "bos_token_id": next(iter(entries.token_ids("bos_token_id")), None),
        "eos_token_ids": entries.token_ids("eos_token_id"),
        "architecture": architecture,
        **family.fields,
        **_biases(entries, family),
        "experts": None if family.experts is None else family.experts(entries),
    }


def _biases(entries: Entries, family: Family) -> dict[str, bool]:
    switch = family.bias_switch
    return {} if switch is None else {"query_key_value_bias": entries.boolean(switch, False)}


def multipliers(config: Mapping[str, Any]) -> dict[str, float]:
    """Those of `folding.MULTIPLIERS` that a supported model's config.json gives."""
    family = FAMILIES[_architecture(language_model(config))]
    entries = Entries({**family.defaults, **config}, "config.json")
    return {name: entries.number(key) for name, (key, _) in family.multipliers.items()}


def language_model(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that describes the language model: all of it, or of a wrapped one its `text_config`."""
    wrapper = wrapper_of(config)
    if wrapper is None:
        return config
    text = Entries(config, "config.json").optional_object("text_config") or {}
    given = text.get("model_type", wrapper.language_model)
    if given != wrapper.language_model:
        raise UnsupportedModelError(
            f"config.json wraps a language model of type {shortened(given)} in {wrapper.hf_class}; supported: "
            f"{wrapper.language_model}."
        )
    # Whether the two ends are one matrix, their tensors say.
    outer = {"tie_word_embeddings": True, "quantization_config": config.get("quantization_config")}
    return {**outer, **text, "model_type": given, "architectures": None}


def wrapper_of(config: Mapping[str, Any]) -> Wrapper | None:
    """What the language model is wrapped in, if it is."""
    kind, classes = config.get("model_type"), config.get("architectures")
    wrapper = WRAPPERS.get(kind) if isinstance(kind, str) else None
    return wrapper if wrapper is not None and classes in (None, [wrapper.hf_class]) else None


def _architecture(config: Mapping[str, Any]) -> str:
    """The model type, from `model_type` or, in old files, from the class name alone."""
    model_type, classes = config.get("model_type"), config.get("architectures")
    given = classes[0] if isinstance(classes, list) and classes else None
    if model_type is None:
        model_type = {family.hf_class: name for name, family in FAMILIES.items()}.get(str(given))
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"config.json describes a model of type {shortened(config.get('model_type'))} (architectures: "
            f"{shortened(classes)}); supported: {', '.join((*FAMILIES, *WRAPPERS))}."
        )
    expected = FAMILIES[model_type].hf_class
    if given is not None and given != expected:
        raise UnsupportedModelError(
            f"config.json names the class {shortened(given)}, which is not a plain language model; supported for "
            f"{model_type!r}: {expected}."
        )
    return model_type


def _refuse_features(entries: Entries, family: Family) -> None:
    """Refuses switches that change the computation in ways the model does not have."""
    needs = {
        "mlp_bias": (False, "biases in the feed-forward part are not implemented"),
        "partial_rotary_factor": (1.0, "rotating only a part of each head is not implemented"),
        "quantization_config": (None, "convert the checkpoint to plain bfloat16 or float16 safetensors first"),
        "per_layer_config": (None, "layers of different sizes are not implemented"),
        "text_config": (None, "only plain language models are; save the language model by itself"),
        # transformers has two names for one function.
        "hidden_act": ("swish" if entries.get("hidden_act") == "swish" else "silu", "others are not implemented"),
        **family.needs,
    }
    for key, (supported, reason) in needs.items():
        given = entries.get(key)
        if given is not None and given != supported:
            raise UnsupportedModelError(
                f"config.json: {key} is {shortened(given)}, but only {supported!r} is supported ({reason})."
            )


def _rope(entries: Entries, family: Family) -> tuple[float, RopeScaling | None, int]:
    """Base, scaling, and the longest context.

    transformers 4 keeps the first two in `rope_theta` and `rope_scaling`, 5 in `rope_parameters`. Where a file has both
    groups, the whole of `rope_scaling` counts, as in transformers, and what the other says may not differ.
    """
    groups = {
        key: Entries(group, f"config.json: {key}")
        for key in ("rope_scaling", "rope_parameters")
        if (group := entries.optional_object(key))
    }
    places = {**groups, "its top level": entries}

    def stated[T](key: str, read: Callable[[Entries, str], T | None]) -> T | None:
        return agreed(entries.source, key, {place: read(group, key) for place, group in places.items()})

    original = stated("original_max_position_embeddings", Entries.optional_integer)
    longest = entries.integer("max_position_embeddings")
    scaling = _rope_scaling(entries, groups, original or longest, family.rope_scalings)
    theta = stated("rope_theta", Entries.optional_number)
    counted = [group for key, group in places.items() if key != "rope_parameters" or "rope_scaling" not in groups]
    if theta not in (None, family.rope_theta) and all(group.get("rope_theta") is None for group in counted):
        raise CheckpointError(
            f"config.json: rope_scaling replaces all of rope_parameters, and with it rope_theta {theta:g}; write "
            "rope_theta into rope_scaling too."
        )
    if scaling is not None and scaling.kind == "linear":
        # The stated length is that of the pretraining. FastChat's models state the stretched one too.
        stretched = int(scaling.factor * (original or longest))
        longest = min(stretched, entries.integer("max_sequence_length", stretched))
    if scaling is not None and scaling.kind == "yarn":
        longest = max(longest, int(scaling.factor * (original or longest)))
    if scaling is not None and scaling.kind == "dynamic":
        longest = min(longest, original or longest)
    return family.rope_theta if theta is None else theta, scaling, longest


def _rope_scaling(
    entries: Entries, groups: Mapping[str, Entries], original: int, scalings: tuple[str, ...]
) -> RopeScaling | None:
    stated = {key: _scaling_of(group, original, scalings) for key, group in groups.items()}
    if stated.get("rope_parameters", ...) is None:
        del stated["rope_parameters"]  # transformers 5 writes its default out, which says nothing
    condensed = entries.number("rope_condense_ratio", 1.0)  # LongChat's name of linear scaling
    if condensed != 1:
        stated["rope_condense_ratio"] = RopeScaling("linear", condensed)
    if len(set(stated.values())) > 1:
        said = " and ".join(f"{key} {shortened(entries.get(key))}" for key in stated)
        raise CheckpointError(f"config.json scales rotary embeddings in two ways, {said}; keep the right one.")
    return next(iter(stated.values()), None)


def _scaling_of(rope: Entries, original: int, scalings: tuple[str, ...]) -> RopeScaling | None:
    """What one group says; None is no scaling."""
    if any(isinstance(value, dict) for value in rope.values.values()):
        raise UnsupportedModelError(
            f"{rope.source}: rotary parameters that differ between layers ({listed(rope.values)}) are not supported."
        )
    if rope.optional_number("partial_rotary_factor") not in (None, 1.0):
        raise UnsupportedModelError(
            f"{rope.source}: partial_rotary_factor is {shortened(rope.get('partial_rotary_factor'))}, but only 1.0 is "
            "supported."
        )
    kind = agreed(rope.source, "the kind", {key: rope.optional_text(key) for key in ("rope_type", "type")})
    if kind in (None, "default"):
        if rope.number("factor", 1.0) != 1:
            raise CheckpointError(
                f"{rope.source} has factor {shortened(rope.get('factor'))} but no rope_type that uses it."
            )
        return None
    readers = {"linear": _linear, "llama3": _llama3, "yarn": _yarn, "dynamic": _dynamic}
    if kind not in readers or kind not in scalings:
        raise UnsupportedModelError(
            f"Rope scaling of type {shortened(kind)} is not supported; supported for this model: 'default'"
            f"{''.join(f', {known!r}' for known in scalings)}."
        )
    return readers[kind](rope, original)


def _linear(rope: Entries, original: int) -> RopeScaling:
    return RopeScaling("linear", rope.number("factor"))


def _llama3(rope: Entries, original: int) -> RopeScaling:
    factors = [rope.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor")]
    return RopeScaling("llama3", *factors, original_max_position_embeddings=original)


_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"}


def _dynamic(rope: Entries, original: int) -> RopeScaling:
    _refuse_other_keys(rope, _ROPE_KEYS)
    return RopeScaling("dynamic", rope.number("factor"))


def _yarn(rope: Entries, original: int) -> RopeScaling:
    weights = ("mscale", "mscale_all_dim")
    if (given := rope.get("attn_factor")) is not None:  # as R1-0528-Qwen3-8B has it
        raise UnsupportedModelError(
            f"{rope.source}: attn_factor is {shortened(given)}, which transformers ignores and others multiply the "
            "usual attention factor by. Remove it, or write the product as attention_factor."
        )
    _refuse_other_keys(rope, {*_ROPE_KEYS, "attention_factor", "beta_fast", "beta_slow", "truncate", *weights})
    factor, magnitude = rope.number("factor"), rope.optional_number("attention_factor")
    ours, divisor = (rope.number(key, 0.0) for key in weights)
    if magnitude is None and ours and divisor:
        magnitude = yarn_magnitude(factor, ours) / yarn_magnitude(factor, divisor)
    return RopeScaling(
        "yarn",
        factor,
        original_max_position_embeddings=original,
        beta_fast=rope.number("beta_fast", 0.0) or 32.0,
        beta_slow=rope.number("beta_slow", 0.0) or 1.0,
        attention_factor=magnitude,
        truncate=rope.boolean("truncate", True),
    )


def _refuse_other_keys(rope: Entries, known: set[str]) -> None:
    if unknown := [key for key, value in rope.values.items() if key not in known and value is not None]:
        raise UnsupportedModelError(
            f"{rope.source}: {unknown[0]} is {shortened(rope.get(unknown[0]))}, which is not implemented."
        )


def _sliding_window(entries: Entries, family: Family, num_layers: int) -> int | None:
    switched = family.sliding_window == "switched"
    counts = entries.boolean("use_sliding_window", False) if switched else family.sliding_window == "always"
    window = entries.optional_integer("sliding_window") if counts else None
    sliding = 0 if window is None else num_layers
    if switched and window is not None:
        sliding -= min(max(entries.integer("max_window_layers", 28), 0), num_layers)
    if (types := entries.get("layer_types")) is not None:
        sliding = _listed_sliding(entries, types, num_layers, None if switched else sliding)
    if 0 < sliding < num_layers:
        raise UnsupportedModelError(
            f"config.json: {num_layers - sliding} of {num_layers} layers use full attention and the others a sliding "
            f"window of {window}; supported: all layers alike (use_sliding_window false, or max_window_layers 0)."
        )
    if sliding and window is None:
        raise CheckpointError("config.json: layer_types lists sliding_attention, but no sliding window is in use.")
    return window if sliding else None


def _listed_sliding(entries: Entries, types: Any, num_layers: int, expected: int | None) -> int:
    """How many layers `layer_types` gives a sliding window, where that is not settled by the architecture."""
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != num_layers or any(kind not in known for kind in types):
        raise entries.wrong("layer_types", f"a list of {num_layers} entries, each {' or '.join(known)}")
    sliding = types.count("sliding_attention")
    if expected not in (None, sliding):
        raise UnsupportedModelError(
            f"config.json: layer_types gives {sliding} of {num_layers} layers a sliding window, where the model's "
            f"class gives it to {expected}."
        )
    return sliding
