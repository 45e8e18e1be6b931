"""Tokenizers of older Hugging Face folders: vocab.json with merges.txt, and SentencePiece's tokenizer.model.

Both are rebuilt by the rules of the class that tokenizer_config.json names, as transformers does.
"""

import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minikv_jax.errors import CheckpointError, UnsupportedModelError, shortened
from minikv_jax.models.entries import Entries
from minikv_jax.models.json_text import read_json
from minikv_jax.models.tokenizer_rules import NORMAL, begin_and_end, byte_level, sentencepiece

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BYTE_LEVEL = {"Qwen2Tokenizer": "qwen2", "GPT2Tokenizer": "gpt-2"}
_SENTENCEPIECE = ("LlamaTokenizer",)
_SETTINGS = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
)
_BPE = 2  # of SentencePiece's kinds of models
_MOST_BYTES = 1 << 25  # of a file; published ones have at most 5 MB


@contextmanager
def newer_folder(folder: Path) -> Iterator[Path]:
    """The folder itself if it has a tokenizer.json, else one for a while that has one, and the rest of its settings."""
    if (folder / "tokenizer.json").is_file():
        yield folder
        return
    tokenizer = _older_tokenizer(folder)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save(os.path.join(scratch, "tokenizer.json"))
        for name in _SETTINGS:
            if (folder / name).is_file():
                _refuse_large(folder / name)
                shutil.copyfile(folder / name, os.path.join(scratch, name))
        yield Path(scratch)


def _older_tokenizer(folder: Path) -> "Tokenizer":
    """The tokenizer of a folder without tokenizer.json.

    Raises:
        CheckpointError: if there is none, or it is damaged.
        UnsupportedModelError: if its class has other rules than those known here.
    """
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _from_merges(folder)
    if (folder / "tokenizer.model").is_file():
        return _from_pieces(folder)
    raise CheckpointError(
        f"{folder} has no tokenizer.json, nor vocab.json with merges.txt, nor tokenizer.model. Save one with "
        "transformers: AutoTokenizer.from_pretrained(model).save_pretrained(folder)."
    )


def _class(folder: Path, known: tuple[str, ...]) -> tuple[str, Entries]:
    """The class that tokenizer_config.json names, without "Fast", and what else it says."""
    entries = Entries(read_json(folder / "tokenizer_config.json"), str(folder / "tokenizer_config.json"))
    given = entries.optional_text("tokenizer_class")
    name = (given or "").removesuffix("Fast")
    if name not in known:
        raise UnsupportedModelError(
            f"{entries.source}: tokenizer_class is {shortened(given)}; without tokenizer.json the rules of "
            f"{', '.join(known)} are known here. Save the tokenizer with transformers "
            "(AutoTokenizer.from_pretrained(model).save_pretrained(folder))."
        )
    return name, entries


def _from_merges(folder: Path) -> "Tokenizer":
    from tokenizers.models import BPE

    name, entries = _class(folder, tuple(_BYTE_LEVEL))
    for key in ("add_prefix_space", "add_bos_token"):
        if entries.boolean(key, False):
            raise UnsupportedModelError(f"{entries.source}: {key} is true, which is not supported for {name}.")
    files = folder / "vocab.json", folder / "merges.txt"
    for file in files:
        _refuse_large(file)
    vocabulary, merges = BPE.read_file(*map(str, files))
    return byte_level(vocabulary, merges, _BYTE_LEVEL[name])


def _from_pieces(folder: Path) -> "Tokenizer":
    from tokenizers import pre_tokenizers

    _, entries = _class(folder, _SENTENCEPIECE)
    prefixed = entries.boolean("add_prefix_space", True)
    tokens, scores, types = _pieces(folder / "tokenizer.model")
    tokenizer = sentencepiece(tokens, scores, types, prefixed)
    # Beside special tokens the space before a text differs: in these folders, unless they are "legacy", only what
    # begins a text has one.
    scheme = ("always" if entries.boolean("legacy", False) else "first") if prefixed else "never"
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=False)
    before, after = (
        [_special(entries, f"{which}_token", default)] if entries.boolean(f"add_{which}_token", False) else []
        for which, default in (("bos", "<s>"), ("eos", "</s>"))
    )
    begin_and_end(tokenizer, before, after)
    return tokenizer


def _special(entries: Entries, key: str, default: str) -> str:
    """A special token, which transformers writes as a text or as an object with one."""
    if isinstance(entries.get(key), dict):
        entries, key = Entries(entries.get(key), f"{entries.source}: {key}"), "content"
    return entries.optional_text(key) or default


def _pieces(path: Path) -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types of a SentencePiece model, a protocol buffer.

    Its numbers of fields are those of sentencepiece_model.proto.
    """
    _refuse_large(path)
    tokens, scores, types = [], [], []
    trainer, normalizer = {}, {}
    for field, value in _fields(path.read_bytes()):
        if field == 1:
            piece = dict(_fields(value))
            tokens.append(piece.get(1, b"").decode())
            scores.append(piece.get(2, 0.0))
            types.append(piece.get(3, NORMAL))
        trainer = dict(_fields(value)) if field == 2 else trainer
        normalizer = dict(_fields(value)) if field == 3 else normalizer
    # What the rebuilt tokenizer does: BPE, no other letters in place of some, no spaces removed.
    expected = {
        "model_type": (trainer.get(3, 1), _BPE),
        "precompiled_charsmap": (len(normalizer.get(2, b"")), 0),
        "remove_extra_whitespaces": (normalizer.get(4, 1), 0),
    }
    for name, (given, supported) in expected.items():
        if given != supported:
            raise UnsupportedModelError(
                f"{path}: SentencePiece's {name} is {given}; supported without tokenizer.json: {supported}. Save the "
                "tokenizer with transformers (AutoTokenizer.from_pretrained(model).save_pretrained(folder))."
            )
    return tokens, scores, types


def _fields(raw: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and values of a protocol buffer's fields: integers, floats of 32 bits, and bytes."""
    at = 0

    def integer() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = raw[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(raw):
        number, kind = divmod(integer(), 8)
        if kind == 0:
            yield number, integer()
            continue
        size = {1: lambda: 8, 2: integer, 5: lambda: 4}[kind]()
        value = raw[at : at + size]
        if len(value) < size:
            raise ValueError("a field ends beyond its message")
        at += size
        yield number, struct.unpack("<f", value)[0] if kind == 5 else value


def _refuse_large(path: Path) -> None:
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise CheckpointError(f"{path} has {size} bytes, too much for a vocabulary: at most {_MOST_BYTES} are read.")
