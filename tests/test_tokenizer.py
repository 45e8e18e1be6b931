"""Tokenizers rebuilt from GGUF metadata split and join text as the originals do; folders load as they are."""

import itertools
import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

from minikv_jax.errors import CheckpointError, UnsupportedModelError
from minikv_jax.models import load_tokenizer, locate

BYTES = sorted(ByteLevel.alphabet())
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def write_gguf(path: Path, model: str, tokens, types, **entries) -> Path:
    """A GGUF file that is all tokenizer; None leaves an entry out."""
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name, value in entries.items():
        if value is not None:
            getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_byte_level(path: Path, pre: str | None, **entries) -> Path:
    """256 bytes, a few merges, an unused row, and special tokens after them."""
    merges = ["t h", "th e", "Ġ the", "1 2", "12 3"]
    tokens = [*BYTES, *(merge.replace(" ", "") for merge in merges), "[PAD0]", "<|start|>", "<|end|>", "<tool>"]
    types = [NORMAL] * (256 + len(merges)) + [UNUSED, CONTROL, CONTROL, USER]
    defaults = {"tokenizer_pre": pre, "token_merges": merges, "bos_token_id": 262, "eos_token_id": 263}
    return write_gguf(path, "gpt2", tokens, types, **defaults | entries)


TEXT = "It'S  12345 +6789!?\n\n\n  café's"
WORDS = {
    "gpt-2": ["It", "'", "S", " ", " 12345", " +", "6789", "!?", "\n\n\n ", " café", "'s"],
    "default": ["It", "'", "S", " ", " 12345", " +", "6789", "!?", "\n\n\n ", " café", "'s"],
    "smollm": ["It", "'", "S", "  ", *"12345", " +", *"6789", "!?", "\n\n\n ", " café", "'s"],
    "qwen2": ["It", "'S", " ", " ", *"12345", " +", *"6789", "!?\n\n\n", " ", " café", "'s"],
    "llama-bpe": ["It", "'S", " ", " ", "123", "45", " +", "678", "9", "!?\n\n\n", " ", " café", "'s"],
    "llama-v3": ["It", "'S", " ", " ", "123", "45", " +", "678", "9", "!?\n\n\n", " ", " café", "'s"],
}


@pytest.mark.parametrize("pre", WORDS)
def test_words(tmp_path, pre):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "t.gguf", pre))
    splits = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)
    assert [TEXT[start:end] for _, (start, end) in splits] == WORDS[pre]


@pytest.mark.parametrize("pre", WORDS)
@settings(max_examples=60, deadline=None)
@given(text=st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n\t'’0123456789the")), max_size=40))
def test_byte_level_round_trip(tmp_path_factory, pre, text):
    tokenizer = cached_byte_level(tmp_path_factory, pre)
    if pre == "qwen2":
        text = tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    assert 261 not in ids  # a padding row is no token


TOKENIZERS = {}


def cached_byte_level(tmp_path_factory, pre):
    if pre not in TOKENIZERS:
        TOKENIZERS[pre] = load_tokenizer(write_byte_level(tmp_path_factory.mktemp("t") / "t.gguf", pre))
    return TOKENIZERS[pre]


def test_special_tokens_and_template(tmp_path):
    template = "{% for m in messages %}<|start|>{{ m.content }}<|end|>{% endfor %}"
    path = write_byte_level(tmp_path / "t.gguf", "gpt-2", chat_template=template, pad_token_id=263)
    tokenizer = load_tokenizer(path)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|start|>", "<|end|>", "<|end|>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.model_max_length) == (262, 263, 2048)
    assert tokenizer.chat_template == template
    ids = tokenizer("<|start|>the the<tool><|end|>").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|start|>", "the", "Ġthe", "<tool>", "<|end|>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the the<tool>"


@pytest.mark.parametrize(
    ("pre", "entries", "begins", "ends"),
    [
        ("gpt-2", {}, False, False),
        ("qwen2", {"add_bos_token": True}, True, False),
        ("llama-bpe", {}, True, False),
        ("llama3", {"add_eos_token": True}, True, True),
        ("llama-bpe", {"add_bos_token": False}, False, False),
    ],
)
def test_begin_and_end_are_added_where_trained_with(tmp_path, pre, entries, begins, ends):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "t.gguf", pre, **entries))
    words = tokenizer.convert_ids_to_tokens(tokenizer("the").input_ids)
    assert words == ["<|start|>"] * begins + ["the"] + ["<|end|>"] * ends
    assert len(tokenizer("the", add_special_tokens=False).input_ids) == 1


def test_llama3_looks_words_up_before_merging(tmp_path):
    tokens = [*BYTES, "cat"]  # reachable by no merge
    path = write_gguf(
        tmp_path / "t.gguf", "gpt2", tokens, [NORMAL] * 257, tokenizer_pre="llama-bpe", token_merges=["c t"]
    )
    with pytest.raises(CheckpointError, match="tokenizer is damaged"):  # the merge yields no token
        load_tokenizer(path)
    tokens.append("ct")
    entries = {"token_merges": ["c t"], "add_bos_token": False}
    for pre, count in (("llama-bpe", 1), ("qwen2", 3)):
        path = write_gguf(tmp_path / "t.gguf", "gpt2", tokens, [NORMAL] * 258, tokenizer_pre=pre, **entries)
        assert len(load_tokenizer(path)("cat").input_ids) == count


# SentencePiece joins the best score first. Scores fall as in a trained vocabulary, every merge after its parts.
PIECES = ["▁", "t", "h", "e", "a", "n", "b", "th", "▁a", "he", "an", "▁th", "▁the", "en", "▁an", "at", "hen", "then"]


def write_sentencepiece(path: Path, **entries) -> Path:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *PIECES]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(PIECES)]
    scores = [0.0] * 259 + [-float(i) for i in range(len(PIECES))]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0}
    return write_gguf(path, "llama", tokens, types, token_scores=scores, **ids | entries)


def joined_by_score(text: str) -> list[str]:
    """llama.cpp's algorithm, the slow way."""
    words = list("▁" + text.replace(" ", "▁"))
    score = {piece: -i for i, piece in enumerate(PIECES)}
    while True:
        pairs = [(score.get(a + b, -1000), -i) for i, (a, b) in enumerate(itertools.pairwise(words))]
        if not pairs or max(pairs)[0] == -1000:
            spelled = ([word] if word in score else [f"<0x{b:02X}>" for b in word.encode()] for word in words)
            return [*itertools.chain(*spelled)]
        at = -max(pairs)[1]
        words[at : at + 2] = [words[at] + words[at + 1]]


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    return load_tokenizer(write_sentencepiece(tmp_path_factory.mktemp("t") / "t.gguf"))


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from(" thenab?é"), min_size=1, max_size=30))
def test_sentencepiece_joins_by_score(sentencepiece, text):
    ids = sentencepiece(text, add_special_tokens=False).input_ids
    assert sentencepiece.convert_ids_to_tokens(ids) == joined_by_score(text)
    assert sentencepiece.decode(ids) == text


def test_sentencepiece_special_tokens(sentencepiece, tmp_path):
    ids = sentencepiece("the</s>").input_ids
    assert sentencepiece.convert_ids_to_tokens(ids) == ["<s>", "▁the", "</s>"]
    assert sentencepiece.decode(ids, skip_special_tokens=True) == "the"
    bare = load_tokenizer(write_sentencepiece(tmp_path / "t.gguf", add_space_prefix=False, add_bos_token=False))
    assert bare.convert_ids_to_tokens(bare("the").input_ids) == ["th", "e"]


@pytest.mark.parametrize(
    ("model", "entries", "message"),
    [
        ("bert", {}, r"t\.gguf: tokenizer of type 'bert'.*supported: 'gpt2'"),
        ("gpt2", {"tokenizer_pre": "tekken"}, r"pre-tokenizer 'tekken'.*known: smollm, qwen2, llama-bpe, gpt-2"),
    ],
)
def test_unknown_kinds_are_refused(tmp_path, model, entries, message):
    path = write_gguf(tmp_path / "t.gguf", model, BYTES, [NORMAL] * 256, token_merges=["t h"], **entries)
    with pytest.raises(UnsupportedModelError, match=message):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"token_merges": None}, "merges must be a list of str"),
        ({"token_merges": ["t zz"]}, "damaged"),
        ({"bos_token_id": 9999}, "bos_token_id is 9999, expected a token id below 265"),
        ({"token_types": [1, 1]}, "token_type has 2 entries for 265 tokens"),
    ],
)
def test_damaged_vocabularies(tmp_path, entries, message):
    path = tmp_path / "t.gguf"
    if "token_types" in entries:
        tokens = [*BYTES, *(f"<{i}>" for i in range(9))]
        write_gguf(path, "gpt2", tokens, entries["token_types"], token_merges=["t h"])
    else:
        write_byte_level(path, "gpt-2", **entries)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(path)


def test_folder_never_touches_the_network(tmp_path, monkeypatch):
    original = load_tokenizer(write_byte_level(tmp_path / "t.gguf", "llama-bpe", chat_template="{{ messages }}"))
    original.save_pretrained(tmp_path / "folder")

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    loaded = load_tokenizer(tmp_path / "folder")
    assert loaded(TEXT).input_ids == original(TEXT).input_ids
    assert loaded.chat_template == original.chat_template
    assert (loaded.bos_token, loaded.eos_token) == (original.bos_token, original.eos_token)


@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer", "PreTrainedTokenizerFast"])
def test_folder_is_read_as_its_tokenizer_json_says(tmp_path, name):
    """transformers rebuilds some classes' tokenizers from their vocabulary, with rules of its own."""
    original = load_tokenizer(write_byte_level(tmp_path / "t.gguf", "smollm"))
    original.save_pretrained(tmp_path / "folder")
    config = tmp_path / "folder" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tokenizer_class": name}))
    assert load_tokenizer(tmp_path / "folder")(TEXT).input_ids == original(TEXT).input_ids


def test_folder_errors(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_smollm2():
    tokenizer = load_tokenizer(locate("smollm2"))
    words = ["cost", "s", "Ġ", *"12345", "Ġ+", "ĠĠ", *"6789"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("costs 12345 +  6789").input_ids) == words
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert "<|im_start|>" in tokenizer.chat_template


def test_transformers_is_imported_late_and_quietly(tmp_path):
    path = write_byte_level(tmp_path / "t.gguf", "gpt-2")
    script = (
        "import sys, minikv_jax.models; assert 'transformers' not in sys.modules;"
        f"minikv_jax.models.load_tokenizer({os.fspath(path)!r})"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1]
    )
    assert result.returncode == 0, result.stderr
    assert "PyTorch" not in result.stderr
    assert not logging.getLogger("transformers").filters
