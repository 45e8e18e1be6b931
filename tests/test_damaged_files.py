"""Files damaged at random are loaded or refused in one line: quickly, in little memory, and with no other error."""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import draws
import numpy as np
import pytest
from memory import peak_growth
from mutate import mutated, mutated_json
from safetensors.numpy import load_file
from test_tokenizer import TINY, write_byte_level, write_json_tokenizer, write_sentencepiece
from test_weights import gguf_tensors, write_folder, write_gguf

from minikv_jax.errors import MiniKVError
from minikv_jax.models import load_tokenizer, open_checkpoint
from minikv_jax.models.checkpoint import parameter_shapes

GOLDEN = Path(__file__).parent / "golden"


def read_weights(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    shapes = {name: array.shape for name, array in checkpoint.tensors()}
    assert shapes == dict(parameter_shapes(checkpoint.config))


def use_tokenizer(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    for text in ("", "It's 12 <s> the é\n"):
        tokenizer.decode(tokenizer(text).input_ids)
    tokenizer.decode(list(range(0, 300, 7)))
    if tokenizer.chat_template is not None:
        tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)


@dataclass(frozen=True)
class Format:
    """A kind of file: how a sound one is written, which of its files are damaged, and how it is read.

    `header` is how many of its first bytes say what the file is; None for JSON, which is damaged by values.
    """

    write: Callable[[Path], Path]
    files: tuple[str, ...]
    read: Callable[[Path], None]
    header: int | None = None


def small_model() -> tuple[dict, dict[str, np.ndarray]]:
    config = json.loads((GOLDEN / "llama2" / "config.json").read_text())
    shards = sorted((GOLDEN / "llama2").glob("*.safetensors"))
    return config, {name: weight for shard in shards for name, weight in load_file(shard).items()}


def golden_folder(folder: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "llama2", folder / "model"))


def rich_tokenizer(folder: Path) -> Path:
    """A tokenizer.json with something of everything, and its configuration."""
    (folder / "panic").mkdir()
    with pytest.raises(MiniKVError):  # the library's first panic reads its own symbols, which takes 50 MB
        load_tokenizer(
            write_json_tokenizer(folder / "panic", model=TINY["model"] | {"continuing_subword_prefix": "##abc"})
        )
    template = "{% for m in messages %}<|start|>{{ m.content }}<|end|>{% endfor %}"
    tokenizer = load_tokenizer(write_byte_level(folder / "t.gguf", "llama-bpe", chat_template=template))
    tokenizer.save_pretrained(folder / "rich")
    full = json.loads((folder / "rich" / "tokenizer.json").read_text())
    write_json_tokenizer(
        folder / "rich",
        **{key: full[key] for key in ("added_tokens", "pre_tokenizer", "post_processor", "decoder")},
        normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Prepend", "prepend": "_"}]},
        truncation={"max_length": 10, "stride": 2, "strategy": "LongestFirst", "direction": "Right"},
        padding={
            "strategy": "BatchLongest",
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "A",
        },
    )
    return folder / "rich"


FORMATS = {
    "safetensors": Format(
        lambda folder: write_folder(folder / "model", *small_model()), ("model.safetensors",), read_weights, 2500
    ),
    "gguf": Format(
        lambda folder: write_gguf(folder / "m.gguf", *(lambda c, s: (c, gguf_tensors(c, s)))(*small_model())),
        ("",),
        read_weights,
        2500,
    ),
    "config.json": Format(
        golden_folder,
        ("config.json", "config.json", "generation_config.json", "model.safetensors.index.json"),
        read_weights,
    ),
    "tokenizer.json": Format(
        rich_tokenizer, ("tokenizer.json", "tokenizer.json", "tokenizer_config.json"), use_tokenizer
    ),
    "gguf, byte-level tokenizer": Format(
        lambda folder: write_byte_level(folder / "t.gguf", "qwen2", chat_template="{{ messages }}", add_bos_token=True),
        ("",),
        use_tokenizer,
        7000,
    ),
    "gguf, SentencePiece tokenizer": Format(
        lambda folder: write_sentencepiece(folder / "t.gguf"), ("",), use_tokenizer, 7000
    ),
}


def rewrite(path: Path, raw: bytes) -> None:
    """Writes a file anew in its place: ext4 waits for the disk when a file is cut to nothing first."""
    with path.open("r+b") as file:
        file.write(raw)
        file.truncate()


def damage_and_read(kind: Format, folder: Path, count: int) -> tuple[int, float, int]:
    """How many of `count` damaged files were refused, the longest CPU time of one, and the largest rise of memory."""
    path = kind.write(folder)
    kind.read(path)
    sound = {name: (path / name if name else path).read_bytes() for name in kind.files}
    rng, refused, slowest, largest = draws.rng(), 0, 0.0, 0
    for done in range(0, count, 100):
        with peak_growth() as growth:
            for _ in range(min(100, count - done)):
                name = kind.files[rng.integers(len(kind.files))]
                target = path / name if name else path
                raw = mutated_json(rng, sound[name]) if kind.header is None else mutated(rng, sound[name], kind.header)
                rewrite(target, raw)
                began = time.process_time()
                refused += is_refused(kind, path)
                slowest = max(slowest, time.process_time() - began)
                rewrite(target, sound[name])
        largest = max(largest, growth.bytes)
    return refused, slowest, largest


def is_refused(kind: Format, path: Path) -> bool:
    try:
        kind.read(path)
    except MiniKVError as error:
        message = str(error)
        assert message.isprintable(), message
        assert len(message.replace(os.fspath(path), "")) < 600, message
        return True
    return False


def check(name: str, folder: Path, count: int, figure) -> None:
    refused, slowest, growth = damage_and_read(FORMATS[name], folder, count)
    assert slowest < 1
    assert growth < 32 << 20
    assert count // 10 < refused
    figure(
        f"{count:,} damaged files ({name}): {refused:,} refused in one line, the others loaded; at most "
        f"{slowest * 1e3:.0f} ms and {growth / 2**20:.0f} MiB"
    )


@pytest.mark.promise("A damaged file is refused in one line or loads: no traceback, no hang, little memory")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files_load_or_are_refused_in_one_line(tmp_path, name, figure):
    check(name, tmp_path, 2000 // len(FORMATS), figure)


@pytest.mark.slow
@pytest.mark.promise("A damaged file is refused in one line or loads: no traceback, no hang, little memory")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FORMATS)
def test_many_damaged_files_load_or_are_refused_in_one_line(tmp_path, name, figure):
    check(name, tmp_path, 20_000, figure)
