"""The rules by which tokenizers cut text and join its pieces, for files that hold a vocabulary and a name."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

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
SAME_RULES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}
PRETOKENIZERS = ("smollm", "qwen2", "llama-bpe", "tekken", "gpt-2")
# These look whole words up before they merge, and begin with BOS where a file does not say.
LIKE_LLAMA3 = ("llama-bpe", "tekken")

# Token types of GGUF and of SentencePiece. The fifth is unused: padding rows of the embedding, no tokens at all.
NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6


def byte_level(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], rules: str) -> "Tokenizer":
    """BPE over bytes, as GPT-2 began it; `rules` is one of PRETOKENIZERS."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    tokenizer = Tokenizer(BPE(dict(vocabulary), list(merges), ignore_merges=rules in LIKE_LLAMA3))
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


def sentencepiece(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], prefixed: bool) -> "Tokenizer":
    """BPE with scores in place of merges: of all neighbours that form a token, the best-scored join first.

    With `prefixed` a space is put before every text.
    """
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    pieces = {token: score for token, score, kind in zip(tokens, scores, types, strict=True) if kind == NORMAL}
    merges = [
        (score, left, right)
        for piece, score in pieces.items()
        for cut in range(1, len(piece))
        if (left := piece[:cut]) in pieces and (right := piece[cut:]) in pieces
    ]
    merges.sort(key=lambda merge: (-merge[0], -len(merge[1]), -len(merge[2])))
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    tokenizer = Tokenizer(
        BPE(
            {token: i for i, token in enumerate(tokens)},
            [(left, right) for _, left, right in merges],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=BYTE in types,
        )
    )
    prefix = [normalizers.Prepend("▁")] if prefixed else []
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def begin_and_end(tokenizer: "Tokenizer", before: Sequence[str], after: Sequence[str]) -> None:
    """Puts tokens around every text."""
    from tokenizers.processors import TemplateProcessing

    if before or after:
        tokenizer.post_processor = TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B", *after],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*before, *after}],
        )
