"""The metrics of LongBench, SCBench and RULER, each a function of (what was written, a reference) to 0..1."""

import difflib
import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation and articles (SQuAD's normalisation)."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in plain.split() if word not in ("a", "an", "the")]


def f1(written: str, reference: str) -> float:
    """Harmonic mean of the shares of words found in the other text."""
    ours, theirs = words_of(written), words_of(reference)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def rouge_l(written: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words (Lin 2004), texts as one sentence each."""
    ours, theirs = written.split(), reference.split()
    if not ours or not theirs:
        return 0.0
    names = {word: i for i, word in enumerate(dict.fromkeys(theirs))}
    row, columns = np.zeros(len(theirs) + 1, np.int64), np.array([names[word] for word in theirs])
    for word in ours:
        grown = np.where(columns == names.get(word, -1), row[:-1] + 1, row[1:])
        row = np.maximum.accumulate(np.concatenate([[0], grown]))
    common = int(row[-1])
    return 2 * common / (len(ours) + len(theirs))


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


def first_number(written: str, reference: str) -> float:
    found = re.search(r"\d+(\.\d+)?", written)
    return float(found is not None and float(found[0]) == float(reference))


def choice(written: str, reference: str) -> float:
    """The first lone letter A to D, or the answer's own text."""
    letter = re.search(r"\b([A-D])\b", written)
    return float(letter[1] == reference if letter and len(reference) == 1 else reference in written)
