"""Tokenizers from a Hugging Face folder's tokenizer.json, or rebuilt from what a GGUF file keeps of one.

A GGUF file holds the vocabulary and the merges, but of the rules that split text into words only a name; the rules for
the names known here are below. transformers is imported when a tokenizer is first loaded: it takes seconds.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minikv_jax.errors import CheckpointError, UnsupportedModelError
from minikv_jax.models.weights import read_gguf_metadata

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

# Words as Qwen2 and LLaMA 3 cut them; they differ only in how many digits stay together.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}|"
    r" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _WORDS.format(digits=r"\p{N}")
_LLAMA3 = _WORDS.format(digits=r"\p{N}{1,3}")
_SAME_RULES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "default": "gpt-2"}
_PRETOKENIZERS = ("smollm", "qwen2", "llama-bpe", "gpt-2")

# Token types of GGUF. Others are 2 unknown, 5 unused (padding rows of the embedding, no tokens at all) and 6 byte.
_NORMAL, _UNKNOWN, _CONTROL, _USER, _BYTE = 1, 2, 3, 4, 6


def load_tokenizer(path: str | os.PathLike[str]) -> "PreTrainedTokenizerFast":
    """Loads a model's tokenizer, with its special tokens and chat template. Never touches the network.

    Args:
        path: a Hugging Face folder with tokenizer.json, or a GGUF file.

    Raises:
        CheckpointError: if the tokenizer is missing or damaged.
        UnsupportedModelError: if a GGUF file names a kind of tokenizer whose rules are not known here.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; expected a Hugging Face folder or a GGUF file.")
    return _from_gguf(read_gguf_metadata(path), path)


def _tokenizer_class() -> "type[PreTrainedTokenizerFast]":
    # transformers warns on import where PyTorch is absent, which does not matter to tokenizers.
    logger = logging.getLogger("transformers")
    quiet = lambda record: "PyTorch was not found" not in record.getMessage()  # noqa: E731
    logger.addFilter(quiet)
    try:
        from transformers import PreTrainedTokenizerFast
    finally:
        logger.removeFilter(quiet)
    return PreTrainedTokenizerFast


def _from_folder(folder: Path) -> "PreTrainedTokenizerFast":
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json. Save one with transformers: "
            "AutoTokenizer.from_pretrained(model).save_pretrained(folder)."
        )
    try:
        return _tokenizer_class().from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the Rust library raises plain Exception for damaged files
        raise CheckpointError(f"{folder}: the tokenizer cannot be read ({error}). Download it again.") from error


def _from_gguf(metadata: Mapping[str, Any], path: Path) -> "PreTrainedTokenizerFast":
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModelError(
            f"{path}: tokenizer of type {kind!r} is not supported; supported: 'gpt2' (byte-level BPE), 'llama' "
            "(SentencePiece BPE). Use the model's Hugging Face folder."
        )
    tokens = _list_of(metadata, "tokens", str, path)
    types = [_NORMAL] * len(tokens)
    if "tokenizer.ggml.token_type" in metadata:
        types = _list_of(metadata, "token_type", int, path, len(tokens))
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {
        name: tokens[index]
        for name, key in keys.items()
        if (index := _token_id(metadata, f"tokenizer.ggml.{key}_token_id", len(tokens), path)) is not None
    }
    try:
        build = _byte_level if kind == "gpt2" else _sentencepiece
        tokenizer = build(metadata, tokens, types, path)
        _add_special_tokens(tokenizer, tokens, types, special)
        _add_template(tokenizer, metadata, kind, special)
    except (CheckpointError, UnsupportedModelError):
        raise
    except Exception as error:  # the Rust library raises plain Exception for vocabularies that do not fit together
        raise CheckpointError(f"{path}: the tokenizer is damaged ({error}). Download the file again.") from error
    context = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    return _tokenizer_class()(
        tokenizer_object=tokenizer,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **({"model_max_length": context} if isinstance(context, int) else {}),
        **special,
    )


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], types: list[int], path: Path) -> "Tokenizer":
    """BPE over bytes, as GPT-2 began it."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    given = metadata.get("tokenizer.ggml.pre", "default")
    rules = _SAME_RULES.get(given, given) if isinstance(given, str) else given
    if rules not in _PRETOKENIZERS:
        raise UnsupportedModelError(
            f"{path}: the rules of the pre-tokenizer {given!r} are not known here; known: {', '.join(_PRETOKENIZERS)}. "
            "Use the model's Hugging Face folder."
        )
    merges = [tuple(merge.split(" ", 1)) for merge in _list_of(metadata, "merges", str, path)]
    kept = (_NORMAL, _CONTROL, _USER)
    vocabulary = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind in kept}
    # LLaMA 3 looks whole words up before it merges.
    tokenizer = Tokenizer(BPE(vocabulary, merges, ignore_merges=rules == "llama-bpe"))
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rules in ("smollm", "gpt-2"))
    first = {
        "smollm": lambda: [pre_tokenizers.Digits(individual_digits=True)],
        "qwen2": lambda: [pre_tokenizers.Split(Regex(_QWEN2), behavior="isolated")],
        "llama-bpe": lambda: [pre_tokenizers.Split(Regex(_LLAMA3), behavior="isolated")],
        "gpt-2": lambda: [],
    }[rules]()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, to_bytes])
    if rules == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], types: list[int], path: Path) -> "Tokenizer":
    """BPE with scores in place of merges: of all neighbours that form a token, the best-scored join first."""
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    scores = _list_of(metadata, "scores", float, path, len(tokens))
    pieces = {token: score for token, score, kind in zip(tokens, scores, types, strict=True) if kind == _NORMAL}
    merges = [
        (score, left, right)
        for piece, score in pieces.items()
        for cut in range(1, len(piece))
        if (left := piece[:cut]) in pieces and (right := piece[cut:]) in pieces
    ]
    merges.sort(key=lambda merge: (-merge[0], -len(merge[1]), -len(merge[2])))
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    tokenizer = Tokenizer(
        BPE(
            {token: i for i, token in enumerate(tokens)},
            [(left, right) for _, left, right in merges],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=_BYTE in types,
        )
    )
    prefixed = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    prefix = [normalizers.Prepend("▁")] if prefixed else []
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _add_special_tokens(
    tokenizer: "Tokenizer", tokens: list[str], types: list[int], special: Mapping[str, str]
) -> None:
    """Tokens that text is searched for before it is split, such as `<|im_start|>`."""
    from tokenizers import AddedToken

    added = [
        AddedToken(token, special=kind == _CONTROL or token in special.values(), normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (_CONTROL, _USER) or token in special.values()
    ]
    tokenizer.add_tokens(added)


def _add_template(tokenizer: "Tokenizer", metadata: Mapping[str, Any], kind: str, special: Mapping[str, str]) -> None:
    """Begin and end tokens around every text, where the model was trained with them."""
    from tokenizers.processors import TemplateProcessing

    # Files that do not say follow llama.cpp: SentencePiece models and LLaMA 3 begin with BOS.
    rules = metadata.get("tokenizer.ggml.pre", "default")
    begins = kind == "llama" or _SAME_RULES.get(rules, rules) == "llama-bpe"
    before = [special["bos_token"]] if metadata.get("tokenizer.ggml.add_bos_token", begins) else []
    after = [special["eos_token"]] if metadata.get("tokenizer.ggml.add_eos_token", False) else []
    if before or after:
        tokenizer.post_processor = TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B", *after],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*before, *after}],
        )


def _list_of(metadata: Mapping[str, Any], key: str, kind: type, path: Path, length: int | None = None) -> list[Any]:
    values = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, list) or not values or not isinstance(values[0], kind):
        raise CheckpointError(f"{path} holds no tokenizer: tokenizer.ggml.{key} must be a list of {kind.__name__}.")
    if length is not None and len(values) != length:
        raise CheckpointError(
            f"{path}: tokenizer.ggml.{key} has {len(values)} entries for {length} tokens; the file is damaged."
        )
    return values


def _token_id(metadata: Mapping[str, Any], key: str, count: int, path: Path) -> int | None:
    index = metadata.get(key)
    if index is not None and (not isinstance(index, int) or not 0 <= index < count):
        raise CheckpointError(f"{path}: {key} is {index!r}, expected a token id below {count}.")
    return index
