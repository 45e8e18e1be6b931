"""Tokenizers from a Hugging Face folder's tokenizer.json, or rebuilt from what a GGUF file keeps of one.

A GGUF file holds the vocabulary and the merges, but of the rules that split text into words only a name; the rules for
the names known here are below. transformers is imported when a tokenizer is first loaded: it takes seconds.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from minikv_jax.errors import CheckpointError, UnsupportedModelError, shortened
from minikv_jax.models.entries import Entries
from minikv_jax.models.gguf_file import read_gguf_metadata
from minikv_jax.models.hub import given_path
from minikv_jax.models.refusing import refusing

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
# Mistral's since Nemo: words begin anew at a capital after small letters.
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SAME_RULES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}
_PRETOKENIZERS = ("smollm", "qwen2", "llama-bpe", "tekken", "gpt-2")
# These look whole words up before they merge, and begin with BOS where a file does not say.
_LIKE_LLAMA3 = ("llama-bpe", "tekken")

_LONGEST_TOKEN = 512  # letters; published vocabularies stay below 256

# Token types of GGUF. Others are 2 unknown, 5 unused (padding rows of the embedding, no tokens at all) and 6 byte.
_NORMAL, _UNKNOWN, _CONTROL, _USER, _BYTE = 1, 2, 3, 4, 6


def load_tokenizer(path: str | os.PathLike[str]) -> "PreTrainedTokenizerFast":
    """Loads a model's tokenizer, with its special tokens and chat template. Never touches the network.

    Args:
        path: a Hugging Face folder with tokenizer.json, or a GGUF file.

    Returns:
        The tokenizer. It raises CheckpointError too, where damage shows only at some text or some tokens.

    Raises:
        CheckpointError: if the tokenizer is missing or damaged.
        UnsupportedModelError: if a GGUF file names a kind of tokenizer whose rules are not known here, or none.
    """
    path = given_path(path)
    if not os.path.exists(path):
        raise CheckpointError(f"{path} does not exist; expected a Hugging Face folder or a GGUF file.")
    try:
        return _from_folder(path) if path.is_dir() else _from_gguf(read_gguf_metadata(path), path)
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error}") from error


def _tokenizer_class() -> "type[PreTrainedTokenizerFast]":
    # transformers warns on import where PyTorch is absent, which does not matter to tokenizers.
    logger = logging.getLogger("transformers")
    quiet = lambda record: "PyTorch was not found" not in record.getMessage()  # noqa: E731
    logger.addFilter(quiet)
    try:
        from minikv_jax.models.backend import TokenizersBackend
    finally:
        logger.removeFilter(quiet)
    return TokenizersBackend


def _from_folder(folder: Path) -> "PreTrainedTokenizerFast":
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json. Save one with transformers: "
            "AutoTokenizer.from_pretrained(model).save_pretrained(folder)."
        )
    with refusing(f"{folder}: the tokenizer cannot be read; download it again", Exception):
        tokenizer = _tokenizer_class().from_pretrained(folder, local_files_only=True)
        tokenizer.decode(tokenizer("").input_ids)  # settings of a wrong type show when they are first used
    return tokenizer


def _from_gguf(metadata: Mapping[str, Any], path: Path) -> "PreTrainedTokenizerFast":
    entries = Entries(metadata, f"{path}: GGUF metadata")
    kind = entries.optional_text("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModelError(
            f"{path}: tokenizer of type {shortened(kind)} is not supported; supported: 'gpt2' (byte-level BPE), "
            "'llama' (SentencePiece BPE). Use the model's Hugging Face folder."
        )
    rules = _rules(entries, path) if kind == "gpt2" else None
    tokens = entries.texts("tokenizer.ggml.tokens")
    if (longest := max(map(len, tokens))) > _LONGEST_TOKEN:
        raise CheckpointError(
            f"{path}: the vocabulary has a token of {longest} letters; at most {_LONGEST_TOKEN} are expected. The "
            "file is damaged: download it again."
        )
    listed_types = entries.optional_numbers("tokenizer.ggml.token_type", "iu", len(tokens))
    types = [_NORMAL] * len(tokens) if listed_types is None else listed_types.tolist()
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {
        name: tokens[index]
        for name, key in keys.items()
        if (index := _token_id(entries, f"tokenizer.ggml.{key}_token_id", len(tokens))) is not None
    }
    template = entries.optional_text("tokenizer.chat_template")
    context = entries.optional_integer(f"{entries.optional_text('general.architecture')}.context_length")
    with refusing(f"{path}: the tokenizer is damaged; download the file again", Exception):
        if rules is None:
            tokenizer = _sentencepiece(entries, tokens, types)
        else:
            tokenizer = _byte_level(entries, tokens, types, rules)
        _add_special_tokens(tokenizer, tokens, types, special)
        # Files that do not say follow llama.cpp: SentencePiece models and LLaMA 3 begin with BOS.
        _add_begin_and_end(tokenizer, entries, special, begins=rules in (None, *_LIKE_LLAMA3))
        return _tokenizer_class()(
            tokenizer_object=tokenizer,
            chat_template=template,
            clean_up_tokenization_spaces=False,
            **({} if context is None else {"model_max_length": context}),
            **special,
        )


def _rules(entries: Entries, path: Path) -> str:
    """The name of the rules that cut text into words."""
    given = entries.optional_text("tokenizer.ggml.pre")
    rules = _SAME_RULES.get(given or "", given)
    if rules in _PRETOKENIZERS:
        return rules
    known = ", ".join((*_PRETOKENIZERS, *_SAME_RULES))
    if rules in (None, "default"):
        raise UnsupportedModelError(
            f"{path}: tokenizer.ggml.pre is {shortened(given)}: the file does not say how its tokenizer cuts text into "
            "words, and a guess would give wrong ids. Convert the model again with a current llama.cpp, write the name "
            f"into a copy (gguf-new-metadata --pre-tokenizer NAME; known: {known}), or use the model's Hugging Face "
            "folder."
        )
    raise UnsupportedModelError(
        f"{path}: the rules of the pre-tokenizer {shortened(given)} are not known here; known: {known}. Use the "
        "model's Hugging Face folder."
    )


def _byte_level(entries: Entries, tokens: list[str], types: list[int], rules: str) -> "Tokenizer":
    """BPE over bytes, as GPT-2 began it."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    pairs = [tuple(merge.split(" ", 1)) for merge in entries.texts("tokenizer.ggml.merges")]
    kept = (_NORMAL, _CONTROL, _USER)
    vocabulary = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind in kept}
    tokenizer = Tokenizer(BPE(vocabulary, cast(list[tuple[str, str]], pairs), ignore_merges=rules in _LIKE_LLAMA3))
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rules in ("smollm", "gpt-2"))
    first = {
        "smollm": lambda: [pre_tokenizers.Digits(individual_digits=True)],
        "qwen2": lambda: [pre_tokenizers.Split(Regex(_QWEN2), behavior="isolated")],
        "llama-bpe": lambda: [pre_tokenizers.Split(Regex(_LLAMA3), behavior="isolated")],
        "tekken": lambda: [pre_tokenizers.Split(Regex(_TEKKEN), behavior="isolated")],
        "gpt-2": lambda: [],
    }[rules]()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, to_bytes])
    if rules == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(entries: Entries, tokens: list[str], types: list[int]) -> "Tokenizer":
    """BPE with scores in place of merges: of all neighbours that form a token, the best-scored join first."""
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    scores = entries.numbers("tokenizer.ggml.scores", "f", len(tokens)).tolist()
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
    prefixed = entries.boolean("tokenizer.ggml.add_space_prefix", True)
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


def _add_begin_and_end(tokenizer: "Tokenizer", entries: Entries, special: Mapping[str, str], begins: bool) -> None:
    """Begin and end tokens around every text, where the model was trained with them."""
    from tokenizers.processors import TemplateProcessing

    before = _wanted(entries, "bos", begins, special)
    after = _wanted(entries, "eos", False, special)
    if before or after:
        tokenizer.post_processor = TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B", *after],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*before, *after}],
        )


def _wanted(entries: Entries, which: str, default: bool, special: Mapping[str, str]) -> list[str]:
    if not entries.boolean(f"tokenizer.ggml.add_{which}_token", default):
        return []
    if f"{which}_token" not in special:
        raise CheckpointError(
            f"{entries.source}: the {which.upper()} token is to be added to every text, but "
            f"tokenizer.ggml.{which}_token_id is missing."
        )
    return [special[f"{which}_token"]]


def _token_id(entries: Entries, key: str, count: int) -> int | None:
    index = entries.optional_integer(key)
    if index is not None and not 0 <= index < count:
        raise CheckpointError(f"{entries.source}: {key} is {index}, expected a token id below {count}.")
    return index
