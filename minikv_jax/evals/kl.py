"""Teacher-forced text: how far next-token distributions move when the text before them was compressed."""

import functools

import numpy as np

from minikv_jax.evals import known
from minikv_jax.evals.engine import Figures
from minikv_jax.evals.task import Case, Follow, Lab, Metric, Task, Values
from minikv_jax.evals.texts import passages


def cases(lab: Lab) -> list[Case]:
    more = lab.settings.new_tokens
    return [
        Case(f"{name}@{length}+{more}", f"{length}+{more} tokens", ids[:length], (Follow(ids[length:]),))
        for length in lab.settings.lengths
        for name, ids in passages(lab, length + more + 1)
    ]


def reduce(lab: Lab, case: Case, found: list[Figures]) -> Values:
    (one,) = found
    # What follows the passage's last token is not known.
    kl, nll = one.kl[:-1], one.nll[:-1] - one.nll_full[:-1]
    return {
        "kl": float(kl.mean()),
        "kl_p99": float(np.percentile(kl, 99)),
        "top1": float(one.agrees[:-1].mean()),
        "ppl": float(nll.mean()),
    }


TASK = Task(
    "next tokens of real texts after a compressed prompt, teacher-forced",
    {
        "kl": Metric("mean KL from the full cache, nats"),
        "kl_p99": Metric("99th percentile of the KL, nats"),
        "top1": Metric("most likely token unchanged", more_is_better=True),
        "ppl": Metric("perplexity against the full cache", "growth"),
    },
    cases,
    functools.partial(known.measure, reduce=reduce),
)
