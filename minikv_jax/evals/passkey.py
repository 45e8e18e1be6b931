"""One number hidden at a given depth: in noise (passkey), or in a real text (needle)."""

import functools

from minikv_jax.evals import known
from minikv_jax.evals.engine import Figures
from minikv_jax.evals.records import rng_of
from minikv_jax.evals.task import Case, Lab, Metric, Task, Values
from minikv_jax.evals.texts import passages

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_HEAD = "A pass key is hidden in a lot of text that does not matter. Find the pass key and remember it.\n"
_NOISE = "The river is wide. The hill is steep. The road is long. We go on. We come back again. "
_KEY = "\nThe pass key is {value}. Remember it: {value} is the pass key.\n"
_ASK = "\nWhat is the pass key? The pass key is"


def place(length: int, depth: float) -> dict:
    return {"place": {"length": length, "depth": depth}, "batch": f"{length} tokens"}


def cases(lab: Lab) -> list[Case]:
    noise, ask = lab.ids(_NOISE), known.asked(lab, _ASK, " 12345")
    head = lab.first_ids(_HEAD)
    found = []
    for length in lab.settings.lengths:
        for depth in DEPTHS:
            for i in range(lab.settings.limit):
                value = str(rng_of(lab, "passkey", length, depth, i).randrange(10_000, 100_000))
                key = lab.ids(_KEY.format(value=value))
                sentences = max((length - len(head) - len(key) - len(ask.tokens)) // len(noise), 1)
                before = round(depth * sentences)
                prompt = (*head, *noise * before, *key, *noise * (sentences - before))
                follow = known.asked(lab, _ASK, f" {value}", depth)
                group = f"{length} tokens, depth {depth:g}"
                found.append(Case(f"{length}/{depth}/{i}", group, prompt, (follow,), place(length, depth)))
    return found


def reduce(lab: Lab, case: Case, found: list[Figures], name: str) -> Values:
    return {name: [x.exact for pair in zip(case.follows, found) for x in known.answers(lab, *pair)]}


TASK = Task(
    "a pass key in noise, over depth and length",
    {"passkey": Metric("right pass keys", "accuracy")},
    cases,
    functools.partial(known.measure, reduce=functools.partial(reduce, name="passkey")),
)


# ---- needle --------------------------------------------------------------------------------------------------------

_NEEDLE = "\nOne of the special numbers is that of the {key}: the number of the {key} is {value}.\n"
_ASK_NEEDLE = "\nWhat is the special number? The number of the {key} is"


def needle_cases(lab: Lab) -> list[Case]:
    found = []
    for length in lab.settings.lengths:
        room = len(lab.ids(_NEEDLE.format(key="lantern", value=1_234_567))) + 16
        texts = list(passages(lab, max(length - room, 8)))
        for depth in DEPTHS:
            for i, (name, text) in enumerate(texts):
                rng = rng_of(lab, "needle", length, depth, i)
                key, value = rng.choice(("lantern", "garden", "castle", "river")), str(rng.randrange(10**6, 10**7))
                needle, at = lab.ids(_NEEDLE.format(key=key, value=value)), round(depth * len(text))
                # Not before a begin token.
                at = max(at, 1)
                follow = known.asked(lab, _ASK_NEEDLE.format(key=key), f" {value}", depth)
                group = f"{length} tokens, depth {depth:g}"
                prompt = (*text[:at], *needle, *text[at:])
                found.append(Case(f"{name}@{length}/{depth}", group, prompt, (follow,), place(length, depth)))
    return found


NEEDLE = Task(
    "a number in a real text, over depth and length",
    {"needle": Metric("right numbers", "accuracy")},
    needle_cases,
    functools.partial(known.measure, reduce=functools.partial(reduce, name="needle")),
)
