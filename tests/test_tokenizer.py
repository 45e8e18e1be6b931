"""Tokenizers rebuilt from GGUF metadata split and join text as the originals do; folders load as they are."""

import copy
import itertools
import json
import logging
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

from minikv_jax.errors import CheckpointError, MiniKVError, UnsupportedModelError
from minikv_jax.models import load_tokenizer, locate
from minikv_jax.models.gguf_file import read_gguf_metadata
from minikv_jax.models.refusing import refusing
from minikv_jax.models.tokenizer import _from_gguf

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
    "smollm": ["It", "'", "S", "  ", *"12345", " +", *"6789", "!?", "\n\n\n ", " café", "'s"],
    "qwen2": ["It", "'S", " ", " ", *"12345", " +", *"6789", "!?\n\n\n", " ", " café", "'s"],
    "deepseek-r1-qwen": ["It", "'S", " ", " ", *"12345", " +", *"6789", "!?\n\n\n", " ", " café", "'s"],
    "tekken": ["It", "'S", " ", " ", *"12345", " +", *"6789", "!?\n\n\n", " ", " café", "'s"],
    "llama-bpe": ["It", "'S", " ", " ", "123", "45", " +", "678", "9", "!?\n\n\n", " ", " café", "'s"],
    "llama-v3": ["It", "'S", " ", " ", "123", "45", " +", "678", "9", "!?\n\n\n", " ", " café", "'s"],
}


@pytest.mark.parametrize("pre", WORDS)
def test_words(tmp_path, pre):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "t.gguf", pre))
    splits = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)
    assert [TEXT[start:end] for _, (start, end) in splits] == WORDS[pre]


def test_tekken_begins_words_at_capitals_and_keeps_slashes(tmp_path):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "t.gguf", "tekken"))
    text = "camelCase HTTPServer ÉtéÀ http://a/b\n"
    splits = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    words = ["camel", "Case", " HTTPServer", " Été", "À", " http", "://", "a", "/b", "\n"]
    assert [text[start:end] for _, (start, end) in splits] == words


@pytest.mark.parametrize("pre", WORDS)
@settings(max_examples=60, deadline=None)
@given(text=st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n\t'’0123456789the")), max_size=40))
def test_byte_level_round_trip(tmp_path_factory, pre, text):
    tokenizer = cached_byte_level(tmp_path_factory, pre)
    if pre in ("qwen2", "deepseek-r1-qwen"):
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
        ("tekken", {}, True, False),
        ("deepseek-r1-qwen", {"add_bos_token": True}, True, False),
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
    for pre, count in (("llama-bpe", 1), ("tekken", 1), ("qwen2", 3)):
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
        (
            "gpt2",
            {"tokenizer_pre": "deepseek-v3"},
            r"pre-tokenizer 'deepseek-v3'.*known: smollm, qwen2, llama-bpe, tekken, gpt-2",
        ),
        ("gpt2", {}, r"tokenizer\.ggml\.pre is None.*wrong ids.*gguf-new-metadata --pre-tokenizer NAME; known: smollm"),
        ("gpt2", {"tokenizer_pre": "default"}, r"tokenizer\.ggml\.pre is 'default'.*wrong ids"),
        ("gpt2", {"tokenizer_pre": "x" * 5000}, r"the rules of the pre-tokenizer 'xxx"),
    ],
)
@pytest.mark.promise("A GGUF file that does not say how its tokenizer splits text is refused, not guessed at")
def test_unknown_kinds_are_refused(tmp_path, model, entries, message):
    path = write_gguf(tmp_path / "t.gguf", model, BYTES, [NORMAL] * 256, token_merges=["t h"], **entries)
    with pytest.raises(UnsupportedModelError, match=message):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"token_merges": None}, "no 'tokenizer.ggml.merges'"),
        ({"token_merges": ["t zz"]}, "damaged"),
        ({"bos_token_id": 9999}, "bos_token_id is 9999, expected a token id below 265"),
        ({"token_types": [1, 1]}, "token_type must be a list of 265 integers, got <list of 2 numbers>"),
        ({"bos_token_id": None, "add_bos_token": True}, r"BOS token is to be added.*bos_token_id is missing"),
    ],
)
def test_damaged_vocabularies(tmp_path, entries, message):
    path = tmp_path / "t.gguf"
    if "token_types" in entries:
        tokens = [*BYTES, *(f"<{i}>" for i in range(9))]
        write_gguf(path, "gpt2", tokens, entries["token_types"], token_merges=["t h"], tokenizer_pre="gpt-2")
    else:
        write_byte_level(path, "gpt-2", **entries)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(path)


@pytest.mark.promise("A value of the wrong type in a GGUF file is refused by its name")
@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("tokenizer.chat_template", "text"),
        ("tokenizer.ggml.model", "text"),
        ("tokenizer.ggml.pre", "text"),
        ("tokenizer.ggml.tokens", "a list of text"),
        ("tokenizer.ggml.merges", "a list of text"),
        ("tokenizer.ggml.token_type", "a list of 265 integers"),
        ("tokenizer.ggml.add_bos_token", "true or false"),
        ("tokenizer.ggml.add_eos_token", "true or false"),
        ("tokenizer.ggml.bos_token_id", "an integer"),
        ("tokenizer.ggml.padding_token_id", "an integer"),
        ("llama.context_length", "an integer"),
        ("general.architecture", "text"),
    ],
)
def test_values_of_a_wrong_type_are_refused_by_name(tmp_path, key, expected, figure):
    metadata = dict(read_gguf_metadata(write_byte_level(tmp_path / "t.gguf", "gpt-2", chat_template="{{ messages }}")))
    others = read_gguf_metadata(write_others(tmp_path / "others.gguf"))
    for name, other in others.items():
        if not name.startswith("other.") or name == f"other.{expected}":
            continue
        with pytest.raises(CheckpointError, match=f"{key} must be {expected}, got") as caught:
            _from_gguf(metadata | {key: other}, tmp_path / "t.gguf")
        assert len(str(caught.value)) < 400
    figure("12 keys, 6 wrong types each")


def write_others(path: Path) -> Path:
    """A value of each type."""
    writer = GGUFWriter(path, "llama")
    writer.add_float64("other.a number", 1.5)
    writer.add_int8("other.an integer", -3)
    writer.add_bool("other.true or false", True)
    writer.add_string("other.text", "y" * 100)
    writer.add_array("other.a list of text", ["a", "b"])
    writer.add_array("other.a list of integers", [1, 2])
    writer.add_array("other.a list of numbers", [1.5, 2.5])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_long_texts_are_read_and_endless_ones_refused(tmp_path):
    for length in (63, 64, 65, 100_000):
        path = write_byte_level(tmp_path / "t.gguf", "gpt-2", chat_template="é" * (length // 2) + "x" * (length % 2))
        assert len(load_tokenizer(path).chat_template.encode()) == length
    path = write_byte_level(tmp_path / "t.gguf", "gpt-2", chat_template="x" * ((1 << 20) + 1))
    with pytest.raises(CheckpointError, match="must be text of at most 1048576 bytes, got <text of 1048577"):
        load_tokenizer(path)


def test_a_file_that_changes_after_its_header_was_read_is_refused(tmp_path):
    path = write_byte_level(tmp_path / "t.gguf", "gpt-2", chat_template="x" * 100)
    metadata, raw = read_gguf_metadata(path), path.read_bytes()
    tokens = metadata["tokenizer.ggml.tokens"]
    assert len(tokens.texts()) == len(tokens)
    path.write_bytes(raw[: tokens.offset] + b"\1" + raw[tokens.offset + 1 :].replace(b"\1\0\0", b"\2\0\0"))
    with pytest.raises(CheckpointError, match="changed while"):
        tokens.texts()
    path.write_bytes(raw[: tokens.offset + 10])
    for name in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type"):
        with pytest.raises(CheckpointError, match="cut off or damaged"):
            metadata[name]._bytes()
    path.unlink()
    with pytest.raises(CheckpointError, match="does not exist"):
        load_tokenizer(path)


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_a_token_of_a_million_letters_is_refused_at_once(tmp_path, model):
    tokens = [*BYTES, "a" * 1_000_000]
    path = write_gguf(
        tmp_path / "t.gguf",
        model,
        tokens,
        [NORMAL] * 257,
        token_scores=[0.0] * 257,
        token_merges=["t h"],
        tokenizer_pre="gpt-2",
    )
    load_tokenizer(write_byte_level(tmp_path / "warm.gguf", "gpt-2"))
    start = time.process_time()
    with pytest.raises(CheckpointError, match="a token of 1000000 letters; at most 512"):
        load_tokenizer(path)
    assert time.process_time() - start < 1


def test_joining_long_pieces_takes_time_in_proportion(tmp_path):
    pieces = ["".join("ab"[(i >> k) & 1] for k in range(9)) + "a" * n for i in range(512) for n in (0, 100, 503)]
    path = write_gguf(
        tmp_path / "t.gguf",
        "llama",
        ["<unk>", "a", "b", *pieces],
        [UNKNOWN] + [NORMAL] * (len(pieces) + 2),
        token_scores=[0.0] * (len(pieces) + 3),
        add_bos_token=False,
    )
    load_tokenizer(write_byte_level(tmp_path / "warm.gguf", "gpt-2"))
    start = time.process_time()
    load_tokenizer(path)
    assert time.process_time() - start < 5  # 310,000 letters: 0.2 s where this was written


TINY = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": None,
    "model": {"type": "BPE", "vocab": {"A": 0, "B": 1, "AB": 2}, "merges": [["A", "B"]]},
}


def write_json_tokenizer(folder: Path, **changes) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(TINY | changes))
    return folder


@pytest.mark.promise("A damaged tokenizer is refused in one line, when it is loaded or when it is used")
@pytest.mark.parametrize(
    "changes",
    [
        {"model": TINY["model"] | {"continuing_subword_prefix": "##abc"}},  # the library panics
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},  # so here
        {"model": {"type": "BPE", "vocab": {"A": 0}, "merges": [["A", "B" * 9000]]}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a"}, "behavior": "Isolated", "invert": False}},
        {"model": 3},
    ],
)
def test_a_tokenizer_that_cannot_be_built_is_refused_in_one_line(tmp_path, changes):
    with pytest.raises(CheckpointError, match="tokenizer cannot be read; download it again") as caught:
        load_tokenizer(write_json_tokenizer(tmp_path, **changes))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_settings_of_a_wrong_type_are_refused_when_the_tokenizer_is_loaded(tmp_path):
    write_json_tokenizer(tmp_path)
    for setting in ({"model_max_length": "many"}, {"padding_side": "middle"}, {"bos_token": 3}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(setting))
        with pytest.raises(CheckpointError, match="tokenizer cannot be read"):
            load_tokenizer(tmp_path)


NO_LENGTH = {"pre_tokenizer": {"type": "FixedLength", "length": 0}}
STRIP = {"decoder": {"type": "Strip", "content": "A", "start": 5, "stop": 5}}


@pytest.mark.parametrize(
    ("changes", "use", "message"),
    [
        (NO_LENGTH, lambda t: t("AB"), "cannot encode"),
        (NO_LENGTH, lambda t: t.encode("AB"), "cannot encode"),
        (NO_LENGTH, lambda t: t.tokenize("AB"), "cannot encode"),
        ({"model": {"type": "WordLevel", "unk_token": "[U]", "vocab": {"A": 0}}}, lambda t: t("B"), "cannot encode"),
        (STRIP, lambda t: t.decode([0]), "cannot decode"),
        (STRIP, lambda t: t.batch_decode([[0]]), "cannot decode"),
        (STRIP, lambda t: t.convert_tokens_to_string(["A"]), "cannot decode"),
    ],
)
def test_a_tokenizer_that_fails_when_used_is_refused_in_one_line(tmp_path, changes, use, message):
    tokenizer = load_tokenizer(write_json_tokenizer(tmp_path, **changes))
    with pytest.raises(CheckpointError, match=f"tokenizer is damaged: it {message}") as caught:
        use(tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template", ["{{ undefined.attribute }}", "{% for", "{{ 1 / 0 }}", "{{ raise_exception('no') }}"]
)
def test_a_chat_template_that_fails_is_refused_in_one_line(tmp_path, template):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "t.gguf", "gpt-2", chat_template=template))
    assert tokenizer("the").input_ids
    with pytest.raises(CheckpointError, match="chat template cannot be applied to these messages") as caught:
        tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("raised", [KeyboardInterrupt, SystemExit, TypeError])
def test_what_is_not_the_tokenizers_fault_passes(raised):
    with pytest.raises(raised), refusing("The tokenizer is damaged"):
        raise raised


def test_a_tokenizer_can_be_pickled_copied_and_saved(tmp_path):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "t.gguf", "llama-bpe"))
    for other in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert other(TEXT).input_ids == tokenizer(TEXT).input_ids
    tokenizer.save_pretrained(tmp_path / "folder")
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path / "folder")(TEXT).input_ids == tokenizer(TEXT).input_ids


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


@pytest.mark.parametrize("name", ["tokenizer_model", "vocab_merges"])
def test_an_older_folder_gives_what_transformers_makes_of_it(name):
    golden = Path(__file__).parent / "golden"
    expected, tokenizer = json.loads((golden / f"{name}.json").read_text()), load_tokenizer(golden / name)
    assert [tokenizer(text).input_ids for text in expected["texts"]] == expected["ids"]
    assert [tokenizer.decode(ids) for ids in expected["ids"]] == expected["decoded"]
    assert tokenizer.name_or_path == str(golden / name)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("vocab_merges", {"tokenizer_class": "CodeGenTokenizer"}, "'CodeGenTokenizer'.*Qwen2Tokenizer, GPT2Tokenizer"),
        ("vocab_merges", {"tokenizer_class": None}, "tokenizer_class is None"),
        ("vocab_merges", {"add_prefix_space": True}, "add_prefix_space is true"),
        ("tokenizer_model", {"tokenizer_class": "T5TokenizerFast"}, "'T5TokenizerFast'.*LlamaTokenizer are known"),
        ("tokenizer_model", {"add_bos_token": 1}, "true or false"),
    ],
)
def test_an_older_folder_of_other_rules_is_refused_by_name(tmp_path, name, changes, message):
    folder = Path(shutil.copytree(Path(__file__).parent / "golden" / name, tmp_path / "t"))
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(MiniKVError, match=message) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [lambda raw: raw[:-3], lambda raw: b"\xff" * 40, lambda raw: raw + b"\x0b"])
def test_a_damaged_sentencepiece_model_is_refused_in_one_line(tmp_path, change):
    folder = Path(shutil.copytree(Path(__file__).parent / "golden" / "tokenizer_model", tmp_path / "t"))
    path = folder / "tokenizer.model"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CheckpointError, match="tokenizer cannot be read"):
        load_tokenizer(folder)


def test_a_sentencepiece_model_that_changes_letters_is_refused(tmp_path):
    folder = Path(shutil.copytree(Path(__file__).parent / "golden" / "tokenizer_model", tmp_path / "t"))
    path = folder / "tokenizer.model"
    path.write_bytes(path.read_bytes() + bytes([3 << 3 | 2, 5, 2 << 3 | 2, 3, 1, 2, 3]))  # a normalizer with a map
    with pytest.raises(UnsupportedModelError, match="precompiled_charsmap is 3"):
        load_tokenizer(folder)
    os.truncate(path, 1 << 26)
    with pytest.raises(CheckpointError, match="too much for a vocabulary"):
        load_tokenizer(folder)


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
