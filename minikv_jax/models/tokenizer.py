"""Tokenizers from a Hugging Face folder, or rebuilt from what a GGUF file keeps of one.

A GGUF file holds the vocabulary and the merges, but of the rules that split text into words only a name; the rules for
the names known here are in `tokenizer_rules.py`. transformers is imported when a tokenizer is first loaded: it takes
seconds.
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
from minikv_jax.models.tokenizer_files import newer_folder
from minikv_jax.models.tokenizer_rules import (
    CONTROL,
    LIKE_LLAMA3,
    NORMAL,
    PRETOKENIZERS,
    SAME_RULES,
    USER,
    begin_and_end,
    byte_level,
    sentencepiece,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

_LONGEST_TOKEN = 512  # letters; published vocabularies stay below 256


def load_tokenizer(path: str | os.PathLike[str]) -> "PreTrainedTokenizerFast":
    """Loads a model's tokenizer, with its special tokens and chat template. Never touches the network.

    Args:
        path: a GGUF file, or a Hugging Face folder with tokenizer.json, or of an older kind, with vocab.json and
            merges.txt or with SentencePiece's tokenizer.model.

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
    with refusing(f"{folder}: the tokenizer cannot be read; download it again", Exception):
        with newer_folder(folder) as readable:
            tokenizer = _tokenizer_class().from_pretrained(readable, local_files_only=True)
        tokenizer.name_or_path = os.fspath(folder)
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
    types = [NORMAL] * len(tokens) if listed_types is None else listed_types.tolist()
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
            scores = entries.numbers("tokenizer.ggml.scores", "f", len(tokens)).tolist()
            prefixed = entries.boolean("tokenizer.ggml.add_space_prefix", True)
            tokenizer = sentencepiece(tokens, scores, types, prefixed)
        else:
            kept = (NORMAL, CONTROL, USER)
            vocabulary = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind in kept}
            merges = [tuple(merge.split(" ", 1)) for merge in entries.texts("tokenizer.ggml.merges")]
            tokenizer = byte_level(vocabulary, cast(list[tuple[str, str]], merges), rules)
        _add_special_tokens(tokenizer, tokens, types, special)
        # Files that do not say follow llama.cpp: SentencePiece models and LLaMA 3 begin with BOS.
        _add_begin_and_end(tokenizer, entries, special, begins=rules in (None, *LIKE_LLAMA3))
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
    rules = SAME_RULES.get(given or "", given)
    if rules in PRETOKENIZERS:
        return rules
    known = ", ".join((*PRETOKENIZERS, *SAME_RULES))
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


def _add_special_tokens(
    tokenizer: "Tokenizer", tokens: list[str], types: list[int], special: Mapping[str, str]
) -> None:
    """Tokens that text is searched for before it is split, such as `<|im_start|>`."""
    from tokenizers import AddedToken

    added = [
        AddedToken(token, special=kind == CONTROL or token in special.values(), normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (CONTROL, USER) or token in special.values()
    ]
    tokenizer.add_tokens(added)


def _add_begin_and_end(tokenizer: "Tokenizer", entries: Entries, special: Mapping[str, str], begins: bool) -> None:
    """Begin and end tokens around every text, where the model was trained with them."""
    before = _wanted(entries, "bos", begins, special)
    begin_and_end(tokenizer, before, _wanted(entries, "eos", False, special))


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
