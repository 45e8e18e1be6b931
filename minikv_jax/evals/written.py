"""Measuring by what is written: greedy answers to questions about a compressed context, turn after turn.

The context is compressed before any question is read. After each turn the right answer, not the model's, goes into
the conversation, so that turns are judged alone (SCBench's default).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from minikv_jax.config import CacheConfig
from minikv_jax.errors import ConfigError
from minikv_jax.evals import known
from minikv_jax.evals.engine import best, read_on, write_on
from minikv_jax.evals.task import Case, Lab, Measured, padded


@dataclasses.dataclass(frozen=True)
class Turn:
    """
    Attributes:
        question: tokens that lead to the answer; at least one.
        answer: tokens of the right answer, for the turns that follow.
        most: tokens to write.
        score: 0 to 1, of a written text.
    """

    question: tuple[int, ...]
    answer: tuple[int, ...]
    most: int
    score: Callable[[str], float]


def case(name: str, group: str, prompt: Sequence[int], turns: Sequence[Turn]) -> Case:
    """A case of these turns.

    Raises:
        ConfigError: an empty context or question.
    """
    if not prompt or not turns or not all(turn.question for turn in turns):
        raise ConfigError(f"{name}: the context or a question is empty.")
    return Case(name, group, tuple(prompt), about={"turns": tuple(turns)})


def room_of(lab: Lab, case: Case) -> int:
    """For all questions and answers of the case, and one token more."""
    return sum(len(turn.question) + max(turn.most, len(turn.answer)) for turn in case.about["turns"]) + 1


def measure(
    lab: Lab, cases: Sequence[Case], methods: Mapping[str, CacheConfig], metric: str
) -> dict[str, list[Measured]]:
    """Scores of all turns of each case; cases with fewer turns wait while others go on."""
    turns: list[Sequence[Turn]] = [case.about["turns"] for case in cases]
    rounds = max(map(len, turns))
    room = max(room_of(lab, case) for case in cases)
    caches = known.read_cases(lab, cases, methods, room).caches
    ends = lab.model.config.eos_token_ids

    def one(name: str) -> list[Measured]:
        cache, scores = caches[name], [[] for _ in cases]
        for i in range(rounds):
            now = [mine[i] if i < len(mine) else None for mine in turns]
            question, counts = padded([turn.question if turn else () for turn in now])
            hidden, cache = read_on(lab.model, cache, jnp.asarray(question), jnp.asarray(counts))
            last = jnp.asarray(np.maximum(counts - 1, 0))
            most = max(turn.most for turn in now if turn)
            texts, _ = write_on(lab.model, cache, best(lab.model, hidden, last), most, ends)
            for turn, row, mine in zip(now, texts.tolist(), scores):
                if turn:
                    mine.append(turn.score(_text(lab, row[: turn.most], ends)))
            if i + 1 < rounds:
                answer, counts = padded([turn.answer if turn else () for turn in now])
                _, cache = read_on(lab.model, cache, jnp.asarray(answer), jnp.asarray(counts))
        weights = [known.weight_of_case(lab, case, methods[name], room) for case in cases]
        return [Measured({metric: mine}, weight) for mine, weight in zip(scores, weights)]

    return {name: one(name) for name in methods}


def _text(lab: Lab, ids: list[int], ends: Sequence[int]) -> str:
    stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return lab.tokenizer.decode(ids[:stop], skip_special_tokens=True)


def middle_out(ids: Sequence[int], most: int) -> list[int]:
    """The first and last halves of what is too long, as LongBench cuts prompts."""
    return list(ids) if len(ids) <= most else [*ids[: most // 2], *ids[len(ids) - (most - most // 2) :]]
