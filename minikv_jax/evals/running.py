"""Free running: along the full model's own greedy text, with flushes and evictions, do errors pile up?"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from minikv_jax import presets
from minikv_jax.config import CacheConfig
from minikv_jax.errors import ConfigError
from minikv_jax.evals import known
from minikv_jax.evals.engine import Figures, fitted
from minikv_jax.evals.task import Case, Follow, Lab, Measured, Metric, Task, Values
from minikv_jax.evals.texts import passages
from minikv_jax.generate import generate

_STRETCHES = 8


def cases(lab: Lab) -> list[Case]:
    more = lab.settings.new_tokens
    if more < 2:
        raise ConfigError("A text that is written freely has at least 2 tokens: give more --new-tokens.")
    return [
        Case(f"{name}@{length}+{more}", f"{length}+{more} tokens", ids)
        for length in lab.settings.lengths
        for name, ids in passages(lab, length)
    ]


def measure(lab: Lab, cases: Sequence[Case], methods: Mapping[str, CacheConfig]) -> dict[str, list[Measured]]:
    """The text is written once from the full cache, `new_tokens` long whatever comes, and every method reads it."""
    most = lab.settings.new_tokens
    written = greedy(lab, cases, most)
    followed = [dataclasses.replace(c, follows=(Follow(tuple(row)),)) for c, row in zip(cases, written.tolist())]
    return known.measure(lab, followed, methods, reduce)


def greedy(lab: Lab, cases: Sequence[Case], most: int) -> Int[np.ndarray, "B most"]:
    """What the full cache writes after each prompt, past any end token."""
    tokens, lengths = fitted(lab.model, [case.prompt for case in cases], most, lab.prompt_step)
    config = presets.full().replace(generated_capacity=most, dtype="bfloat16")
    written, _ = generate(lab.model, jnp.asarray(tokens), jnp.asarray(lengths), config, most)
    return np.asarray(written)


def reduce(lab: Lab, case: Case, found: list[Figures]) -> Values:
    (one,) = found
    kl, same = one.kl[:-1], one.best[:-1] == np.array(case.follows[0].tokens[1:])
    stretches = np.array_split(kl, min(_STRETCHES, len(kl)))
    return {
        "run_kl": float(kl.mean()),
        "run_kl_p99": float(np.percentile(kl, 99)),
        "run_ppl": float((one.nll - one.nll_full)[:-1].mean()),
        "run_top1": float(same.mean()),
        "run_same": float(same.argmin() if not same.all() else len(same)),
        "run_kl_path": [float(part.mean()) for part in stretches],
    }


TASK = Task(
    "the full model's own greedy text, read token by token",
    {
        "run_kl": Metric("mean KL along it, nats"),
        "run_kl_p99": Metric("99th percentile of the KL along it, nats"),
        "run_ppl": Metric("perplexity of it against the full cache", "growth"),
        "run_top1": Metric("its next token is the most likely one", more_is_better=True),
        "run_same": Metric("tokens before the first that is not", more_is_better=True),
        "run_kl_path": Metric("mean KL over each eighth of it, nats", "profile"),
    },
    cases,
    measure,
)
