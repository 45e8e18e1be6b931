"""What a task is: named cases, and how a batch of them is measured under every method at once."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from minikv_jax.chat import as_message
from minikv_jax.config import CacheConfig
from minikv_jax.errors import ConfigError, PromptError, shortened
from minikv_jax.evals.engine import Weight
from minikv_jax.model import Model

_CUT = "\u241f"  # a character that no text has
_MOST_TOKENS = 1 << 22
_RANGES = {"seed": (0, 2**32 - 1), "limit": (1, 10_000), "new_tokens": (1, _MOST_TOKENS)}


def _within(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


# A case's figures under one method: a number, or one for each of its samples.
type Values = dict[str, float | list[float]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run asks for; everything that decides what a case is, and what its figures are.

    Attributes:
        seed: of everything drawn.
        split: "dev" texts and draws are for choosing, "test" for reporting; no case is in both.
        lengths: prompt tokens.
        limit: cases per figure.
        new_tokens: tokens read or written after a prompt, where a task leaves that open.
        texts, ruler, longbench, scbench: folders of data, where the user has them.
        dtype: of the model's weights, where one was asked for.
    """

    seed: int = 0
    split: Literal["dev", "test"] = "dev"
    lengths: tuple[int, ...] = (1024, 2048)
    limit: int = 8
    new_tokens: int = 256
    texts: Path | None = None
    ruler: Path | None = None
    longbench: Path | None = None
    scbench: Path | None = None
    dtype: str | None = None

    def __post_init__(self):
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if not _within(value, least, most):
                raise ConfigError(f"{name}={shortened(value)}: give a whole number from {least} to {most}.")
        if not self.lengths or not all(_within(x, 16, _MOST_TOKENS) for x in self.lengths):
            raise ConfigError(
                f"lengths={shortened(self.lengths)}: give prompt lengths of at least 16 tokens, at most {_MOST_TOKENS}."
            )
        if len(set(self.lengths)) < len(self.lengths):
            raise ConfigError(f"lengths={shortened(self.lengths)}: give each length once.")
        if self.split not in ("dev", "test"):
            raise ConfigError(f"split={self.split!r}: choose dev or test.")
        for name in ("texts", "ruler", "longbench", "scbench"):
            folder = getattr(self, name)
            if folder is not None and not folder.is_dir():
                raise ConfigError(f"--{name} {folder}: there is no such folder.")


@dataclasses.dataclass(frozen=True)
class Lab:
    """A model, its tokenizer, and what the run asks for."""

    model: Model
    tokenizer: Any
    settings: Settings

    def ids(self, text: str) -> list[int]:
        """Tokens of a text that goes on from another."""
        return self._known(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def first_ids(self, text: str) -> list[int]:
        """Tokens of a text that begins a prompt, with the model's begin token where it has one."""
        return self._known(self.tokenizer(text)["input_ids"])

    def _known(self, ids: list[int]) -> list[int]:
        """The ids, if the model has them all.

        Raises:
            PromptError: one that it does not have.
        """
        vocabulary = self.model.config.vocab_size
        if ids and not 0 <= min(ids) <= max(ids) < vocabulary:
            raise PromptError(
                f"The tokenizer gives token {max(ids)}, and the model has {vocabulary}: do they belong together?"
            )
        return ids

    def chat(self, context: str, question: str) -> tuple[str, str]:
        """A user's message in the model's chat template, cut before the question; else two paragraphs.

        Raises:
            PromptError: the template fails on a message, or leaves its text out.
        """
        if getattr(self.tokenizer, "chat_template", None) is None:
            return f"{context}\n\n", f"{question}\n"
        before, cut, after = as_message(self.tokenizer, f"{context}\n\n{_CUT}{question}").rpartition(_CUT)
        if not cut:
            raise PromptError("The model's chat template leaves the text of a user's message out: mend or remove it.")
        return before, after

    @property
    def batch_tokens(self) -> int:
        """Prompt tokens read at once."""
        return 4096 if jax.default_backend() == "cpu" else 1 << 16

    @property
    def prompt_step(self) -> int:
        """Prompts are padded to a multiple of this. A GPU reads faster than it compiles: one program serves all."""
        return 128 if jax.default_backend() == "cpu" else 2048


@dataclasses.dataclass(frozen=True)
class Follow:
    """Known tokens that go on from a prompt's cache.

    Attributes:
        tokens: read one after the other.
        answers: (start, stop) of the answers among them, each after at least one other token.
        depth: where in the prompt the answer stands, 0 to 1.
    """

    tokens: tuple[int, ...]
    answers: tuple[tuple[int, int], ...] = ()
    depth: float = 0.0


@dataclasses.dataclass(frozen=True)
class Case:
    """A prompt, and what goes on from a copy of its compressed cache each.

    Attributes:
        name: unique within its task; finished cases are known by it.
        group: what figures are averaged over, such as "2048 tokens".
        prompt: what is compressed.
        follows: independent continuations. Cases of one group have equally many.
        about: whatever else the task needs of it. Neighbours with the same "batch" (else the same group) are measured
            together; "place" (length, depth, ...) goes into the results.
    """

    name: str
    group: str
    prompt: tuple[int, ...]
    follows: tuple[Follow, ...] = ()
    about: dict[str, Any] = dataclasses.field(default_factory=dict)


def room_of(lab: Lab, *cases: Case) -> int:
    """For what follows the cases' prompts, and the new tokens asked for.

    One more than these is what texts take: with it for all tasks, they share programs.
    """
    return max(lab.settings.new_tokens + 1, *(len(follow.tokens) for case in cases for follow in case.follows), 0)


@dataclasses.dataclass(frozen=True)
class Measured:
    values: Values
    weight: Weight


@dataclasses.dataclass(frozen=True)
class Metric:
    """How a figure is averaged and shown.

    Attributes:
        about: in words.
        kind: "mean"; "growth": cases give a difference of log-likelihoods, shown as exp(mean) - 1; "accuracy": a mean
            between 0 and 1 that says nothing where the full cache is below one half; "profile": a case gives a list,
            of layers or stretches of text, that is shown place by place.
        more_is_better: of which cases the smallest figure is the worst; so it is of accuracies.
    """

    about: str
    kind: Literal["mean", "growth", "accuracy", "profile"] = "mean"
    more_is_better: bool = False


@dataclasses.dataclass(frozen=True)
class Task:
    """
    Attributes:
        about: in words.
        metrics: by name; cases give values under these names.
        cases: all cases of a run, the same ones in the same order each time.
        measure: cases of one group under every method: a `Measured` for each case.
        compares: False for what is looked at with the full cache alone.
        room: of a case, the tokens that its caches need room for after the prompt.
    """

    about: str
    metrics: Mapping[str, Metric]
    cases: Callable[[Lab], list[Case]]
    measure: Callable[[Lab, Sequence[Case], Mapping[str, CacheConfig]], dict[str, list[Measured]]]
    compares: bool = True
    room: Callable[[Lab, Case], int] = room_of


def padded(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows filled up with zeros on the right, int32, and their true lengths."""
    lengths = np.array([len(row) for row in rows], np.int32)
    filled = np.zeros((len(rows), max(int(lengths.max()), 1)), np.int32)
    for i, row in enumerate(rows):
        filled[i, : len(row)] = row
    return filled, lengths
