"""What a task is: named cases, and how a batch of them is measured under every method at once."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from minikv_jax.config import CacheConfig
from minikv_jax.errors import ConfigError
from minikv_jax.evals.engine import Weight
from minikv_jax.models.llama import Llama

_CUT = "\u241f"  # a character that no text has

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
        for name in ("limit", "new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: give at least 1.")
        if not self.lengths or min(self.lengths) < 16:
            raise ConfigError(f"lengths={self.lengths}: give prompt lengths of at least 16 tokens.")
        if self.split not in ("dev", "test"):
            raise ConfigError(f"split={self.split!r}: choose dev or test.")
        for name in ("texts", "ruler", "longbench", "scbench"):
            folder = getattr(self, name)
            if folder is not None and not folder.is_dir():
                raise ConfigError(f"--{name} {folder}: there is no such folder.")


@dataclasses.dataclass(frozen=True)
class Lab:
    """A model, its tokenizer, and what the run asks for."""

    model: Llama
    tokenizer: Any
    settings: Settings

    def ids(self, text: str) -> list[int]:
        """Tokens of a text that goes on from another."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def first_ids(self, text: str) -> list[int]:
        """Tokens of a text that begins a prompt, with the model's begin token where it has one."""
        return self.tokenizer(text)["input_ids"]

    def chat(self, context: str, question: str) -> tuple[str, str]:
        """A user's message in the model's chat template, cut before the question; else two paragraphs."""
        if getattr(self.tokenizer, "chat_template", None) is None:
            return f"{context}\n\n", f"{question}\n"
        message = [{"role": "user", "content": f"{context}\n\n{_CUT}{question}"}]
        text = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        before, _, after = text.rpartition(_CUT)
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
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)


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
    """

    about: str
    kind: Literal["mean", "growth", "accuracy", "profile"] = "mean"


@dataclasses.dataclass(frozen=True)
class Task:
    """
    Attributes:
        about: in words.
        metrics: by name; cases give values under these names.
        cases: all cases of a run, the same ones in the same order each time.
        measure: cases of one group under every method: a `Measured` for each case.
        compares: False for what is looked at with the full cache alone.
    """

    about: str
    metrics: Mapping[str, Metric]
    cases: Callable[[Lab], list[Case]]
    measure: Callable[[Lab, Sequence[Case], Mapping[str, CacheConfig]], dict[str, list[Measured]]]
    compares: bool = True


def padded(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows filled up with zeros on the right, int32, and their true lengths."""
    lengths = np.array([len(row) for row in rows], np.int32)
    filled = np.zeros((len(rows), max(int(lengths.max()), 1)), np.int32)
    for i, row in enumerate(rows):
        filled[i, : len(row)] = row
    return filled, lengths
