"""The metrics of LongBench, SCBench and RULER, each a function of (what was written, a reference) to 0..1.

Summaries are judged, Chinese is cut into words and code is parsed by the packages that the benchmarks use; `require`
says which are missing before anything is measured.
"""

import difflib
import functools
import importlib
import importlib.util
import logging
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

from minikv_jax.errors import ConfigError

# What both benchmarks take out of Chinese beside ASCII's punctuation, from one code point to another.
_CHINESE_MARKS = (
    (0x2013, 0x2014), (0x2018, 0x2019), (0x201B, 0x201F), (0x2026, 0x2027), (0x3001, 0x3003), (0x300B, 0x3011),
    (0x3014, 0x301F), (0x3030, 0x3030), (0x303E, 0x303F), (0xFE4F, 0xFE4F), (0xFF01, 0xFF0D), (0xFF0F, 0xFF0F),
    (0xFF1A, 0xFF20), (0xFF3B, 0xFF40), (0xFF5B, 0xFF64),
)  # fmt: skip
_MARKS = {*string.punctuation, *(chr(code) for first, last in _CHINESE_MARKS for code in range(first, last + 1))}


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation and articles (SQuAD's normalisation)."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in plain.split() if word not in ("a", "an", "the")]


def _f1(ours: Sequence[Hashable], theirs: Sequence[Hashable]) -> float:
    """Harmonic mean of the shares of parts found in the other text."""
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def f1(written: str, reference: str) -> float:
    return _f1(words_of(written), words_of(reference))


def _chinese(text: str) -> str:
    return "".join(c for c in "".join(text.lower().split()) if c not in _MARKS)


def f1_characters(written: str, reference: str) -> float:
    """F1 of Chinese, every character a word (SCBench)."""
    return _f1(_chinese(written), _chinese(reference))


@functools.cache
def _cutter():
    with warnings.catch_warnings():  # its own source has escapes that Python warns of when it compiles them
        warnings.simplefilter("ignore")
        import jieba
    jieba.setLogLevel(logging.WARNING)
    return jieba


def f1_chinese(written: str, reference: str) -> float:
    """F1 of words that jieba finds (LongBench)."""
    ours, theirs = ([word for part in _cutter().cut(x) if (word := _chinese(part))] for x in (written, reference))
    return _f1(ours, theirs)


def rouge_l(written: str, reference: str) -> float:
    """ROUGE-L of the package `rouge`: sentences end at full stops, and a word counts once (LongBench)."""
    from rouge import Rouge

    try:
        (found,) = cast(Any, Rouge(metrics=["rouge-l"], stats=["f"])).get_scores([written], [reference])
    except (ValueError, RecursionError):  # of nothing but full stops; LongBench counts what cannot be judged as 0
        return 0.0
    return found["rouge-l"]["f"]


def rouge_l_chinese(written: str, reference: str) -> float:
    """The same of words that jieba finds (LongBench)."""
    return rouge_l(*(" ".join(_cutter().cut(x)) for x in (written, reference)))


def rouge_l_sum(written: str, reference: str) -> float:
    """ROUGE-Lsum of the package `rouge-score`: sentences are lines (SCBench)."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeLsum"]).score(reference, written)["rougeLsum"].fmeasure


# A package for each language, what it calls the language, and what the language's grammar calls a function.
LANGUAGES = {
    "python": ("tree_sitter_python", "language", "function_definition"),
    "java": ("tree_sitter_java", "language", "method_declaration"),
    "typescript": ("tree_sitter_typescript", "language_typescript", "function_declaration"),
    "rust": ("tree_sitter_rust", "language", "function_item"),
    "cpp": ("tree_sitter_cpp", "language", "function_definition"),
    "go": ("tree_sitter_go", "language", "function_declaration"),
}


def _is_function(node, kind: str, language: str) -> bool:
    if node.type != kind:
        return False
    if language != "cpp":
        return node.child_by_field_name("name") is not None
    # RepoQA takes C++'s free functions alone, and none that return a pointer.
    declared = node.child_by_field_name("declarator")
    name = declared.child_by_field_name("declarator") if declared and declared.type == "function_declarator" else None
    return name is not None and name.type == "identifier"


def first_function(text: str, language: str) -> str:
    """The first function in a code block of the text; without any the first block, without blocks the text."""
    from tree_sitter import Language, Parser

    blocks = re.findall(r"^```\w*\s*\n(.*?)^```", text.strip(), re.DOTALL | re.MULTILINE)
    package, name, kind = LANGUAGES[language]
    parser = Parser(Language(getattr(importlib.import_module(package), name)()))
    for block in blocks:
        waiting = [parser.parse(block.encode()).root_node]
        while waiting:
            node = waiting.pop()
            if _is_function(node, kind, language):
                return cast(bytes, node.text).decode()
            waiting.extend(reversed(node.children))
    return blocks[0] if blocks else text.strip()


def finds_function(written: str, *, name: str, functions: Sequence[tuple[str, str]], language: str) -> float:
    """1 where, of a repository's functions (name, code), the one called `name` is the most like the function written,
    with a BLEU of 0.8 or more (RepoQA, arXiv 2406.06025, in SCBench)."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    def likeness(code: str) -> float:
        smooth = SmoothingFunction().method4
        return float(cast(float, sentence_bleu([code.split()], ours, smoothing_function=smooth)))

    ours = first_function(written, language).split() or [""]
    best, found = max(((likeness(code), called) for called, code in functions), key=lambda x: x[0])
    return float(found == name and best >= 0.8)


_NEEDS = {
    finds_function: ("nltk", "tree_sitter", *(package for package, *_ in LANGUAGES.values())),
    f1_chinese: ("jieba",),
    rouge_l: ("rouge",),
    rouge_l_chinese: ("rouge", "jieba"),
    rouge_l_sum: ("rouge_score",),
}


def require(score: Callable | str, name: str) -> None:
    """Makes sure that the packages are there which judge the data set `name` by this metric.

    Raises:
        ConfigError: one is missing; the message says which.
    """
    missing = [package for package in _NEEDS.get(score, ()) if importlib.util.find_spec(package) is None]
    if missing:
        packages = " ".join(missing).replace("_", "-")
        raise ConfigError(f"{name} is judged with {packages}, as its authors do: pip install 'minikv-jax[longbench]'.")


def classification(written: str, reference: str, classes: Sequence[str]) -> float:
    """1 / n where n class names are written, the right one among them; names within the right one do not count."""
    named = [name for name in classes if name in written]
    named = [name for name in named if name == reference or name not in reference]
    return 1 / len(named) if reference in named else 0.0


def number_share(written: str, reference: str) -> float:
    """Share of the numbers written that are the right one (passage retrieval and counting)."""
    wanted, numbers = re.search(r"\d+", reference), re.findall(r"\d+", written)
    return numbers.count(wanted[0]) / len(numbers) if wanted and numbers else 0.0


def code_similarity(written: str, reference: str) -> float:
    """Edit similarity of the first line of code that is no comment."""
    lines = written.lstrip("\n").split("\n")
    line = next((x for x in lines if not any(mark in x for mark in ("`", "#", "//"))), "")
    return round(difflib.SequenceMatcher(None, line, reference).ratio(), 2)


def contains(written: str, reference: str) -> float:
    return float(reference.lower() in written.lower())


def holds(written: str, reference: str) -> float:
    return float(reference in written)


def first_number(written: str, reference: str) -> float:
    """The first number is the right one; its fraction counts where the right one has one."""
    found = re.search(r"\d+(\.\d+)?", written)
    if found is None:
        return 0.0
    number = float(found[0]) if "." in reference else int(float(found[0]))
    return float(number == float(reference))


def choice(written: str, reference: str) -> float:
    """A letter A to D that the text begins with, or all of it, or what follows "answer is" and the like, or the first
    lone letter (SCBench)."""
    text = written.strip()
    if text[:1] in ("A", "B", "C", "D"):
        return float(text[0] == reference)
    if text == reference:
        return 1.0
    plain = re.sub(r"[\n\"'.,?!{}]", " ", text)
    plain = re.sub(" +", " ", plain)
    for opening in ("answer is:", "answer:", "answer is", "option is"):
        _, found, after = plain.partition(opening)
        if found:
            return float(after[1:].startswith(reference))
    letter = next((word for word in plain.split() if word in "ABCD"), None)
    return float(letter == reference)
