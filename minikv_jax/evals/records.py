"""Records of made-up numbers, to be asked for: lines in LongEval's wording, and plain sentences.

Small models need help that larger ones can do without: keys of one token, and worked examples, which are some of the
record's lines once more, in another order, never those asked for.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from minikv_jax.evals.known import asked
from minikv_jax.evals.task import Follow, Lab

# Nouns first: with few lines the keys are concrete things.
WORDS = (Path(__file__).parent / "words.txt").read_text(encoding="utf-8").split()
_NOUNS = 168
EXAMPLES = 20


class Form(NamedTuple):
    """`line` is one entry; `head` introduces the record, and `question` begins an entry for the model to finish."""

    head: str
    line: str
    question: str


REGISTER = Form(
    "Below is a record of lines to remember. Each line begins with its name and holds a number, its "
    "REGISTER_CONTENT. Later the REGISTER_CONTENT of some lines will be asked for.\n\n",
    "line {key}: REGISTER_CONTENT is <{value}>\n",
    "line {key}: REGISTER_CONTENT is <",
)
CODES = Form("Remember these codes.\n\n", "The code of {key} is {value}.\n", "The code of {key} is")


class Record(NamedTuple):
    """A record's text, and the questions: key, value, and how deep in the record its line stands."""

    text: str
    questions: list[tuple[str, str, float]]


def record(rng: random.Random, form: Form, lines: int, questions: int) -> Record:
    """Draws a record; one question from each of `questions` equal parts of it, in random order."""
    keys = rng.sample(WORDS[: max(_NOUNS, lines)], lines)
    values = rng.sample(range(10_000, 100_000), lines)
    entries = [form.line.format(key=key, value=value) for key, value in zip(keys, values)]
    chosen = [rng.randrange(i * lines // questions, (i + 1) * lines // questions) for i in range(questions)]
    rest = [i for i in range(lines) if i not in chosen]
    examples = [entries[i] for i in rng.sample(rest, min(EXAMPLES, len(rest)))]
    rng.shuffle(chosen)
    text = form.head + "".join(entries) + "".join(examples)
    return Record(text, [(keys[i], str(values[i]), i / lines) for i in chosen])


def question(lab: Lab, form: Form, key: str, value: str, depth: float) -> Follow:
    """An entry begun, and its value. A value after a space has the space in its own first token's text."""
    begun = form.question.format(key=key)
    spaced = form.line.format(key=key, value=value)[len(begun) :].startswith(" ")
    return asked(lab, begun, f" {value}" if spaced else value, depth)


def rng_of(lab: Lab, *parts: object) -> random.Random:
    """Random numbers of one case; those of different splits and seeds have nothing in common."""
    return random.Random(repr((lab.settings.split, lab.settings.seed, *parts)))


def counts(lab: Lab, form: Form, candidates: Sequence[int]) -> list[int]:
    """For each prompt length asked for, the largest of these numbers of lines whose record fits it."""
    entry = len(lab.ids(form.line.format(key=WORDS[0], value=12_345)))
    head = len(lab.first_ids(form.head))
    tokens = {n: head + (n + min(n, EXAMPLES)) * entry for n in candidates}
    fitting = ([n for n in candidates if tokens[n] <= length] for length in lab.settings.lengths)
    return sorted({max(some) for some in fitting if some})
