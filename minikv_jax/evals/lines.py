"""Line retrieval, MiKV's benchmark (arXiv 2402.18096): the number of one line of a record, asked after compression."""

import functools

from minikv_jax.evals import known
from minikv_jax.evals.engine import Figures
from minikv_jax.evals.records import REGISTER, counts, question, record, rng_of
from minikv_jax.evals.task import Case, Lab, Metric, Task, Values

_LINES = (20, 50, 100, 200, 400, 800)
_QUESTIONS = 4


def cases(lab: Lab) -> list[Case]:
    found = []
    for lines in counts(lab, REGISTER, _LINES):
        for i in range(lab.settings.limit):
            drawn = record(rng_of(lab, "lines", lines, i), REGISTER, lines, _QUESTIONS)
            follows = tuple(question(lab, REGISTER, *asked) for asked in drawn.questions)
            found.append(Case(f"{lines}/{i}", f"{lines} lines", tuple(lab.first_ids(drawn.text)), follows))
    return found


def reduce(lab: Lab, case: Case, found: list[Figures]) -> Values:
    outcomes = [known.answers(lab, *pair)[0] for pair in zip(case.follows, found)]
    return {
        "lines": [x.exact for x in outcomes],
        "lines_digits": [x.digits for x in outcomes],
        "lines_nll": [x.nll for x in outcomes],
    }


TASK = Task(
    "line retrieval: the number of a line, exactly",
    {
        "lines": Metric("right numbers", "accuracy"),
        "lines_digits": Metric("right digits", "accuracy"),
        "lines_nll": Metric("answer's negative log-likelihood, nats a token"),
    },
    cases,
    functools.partial(known.measure, reduce=reduce),
)
