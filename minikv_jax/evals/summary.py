"""From items to figures with intervals, and to tables in Markdown."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from minikv_jax.evals.task import Metric

_RESAMPLES = 2000
ALL = "all"


def interval(cases: Sequence[Sequence[float]], seed: int = 0) -> tuple[float, float, float]:
    """Mean over all samples, and a bootstrap 95 % interval (percentiles) of it.

    Cases are drawn with replacement, their samples together, for questions about one text are not independent. With a
    single case its samples are drawn. A single sample has no interval: NaN.
    """
    if len(cases) == 1:
        cases = [[x] for x in cases[0]]
    sums, counts = np.array([sum(x) for x in cases]), np.array([len(x) for x in cases])
    mean = float(sums.sum() / counts.sum())
    if len(cases) == 1:
        return mean, math.nan, math.nan
    drawn = np.random.default_rng(seed).integers(0, len(cases), (_RESAMPLES, len(cases)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return mean, float(low), float(high)


def rows(items: Sequence[Mapping], metrics: Mapping[str, Metric], model: str) -> list[dict]:
    """A row for each metric, group of cases and method, and one over all groups, in the results format.

    An accuracy that the full cache does not bring to one half carries `"cannot": true`.
    """
    held: dict[tuple, list[Mapping]] = {}
    for item in items:
        for metric in item["values"]:
            for group in (item["group"], ALL):
                held.setdefault((metric, group, item["method"]), []).append(item)
    made = [
        _row(model, metric, group, method, found, metrics[metric]) for (metric, group, method), found in held.items()
    ]
    full = {(row["task"], row["case"]): row["value"] for row in made if row["method"] == "full"}
    for row in made:
        if metrics[row["task"]].kind == "accuracy" and full.get((row["task"], row["case"]), 1.0) < 0.5:
            row["cannot"] = True
    return made


def _row(model: str, metric: str, group: str, method: str, items: Sequence[Mapping], kind: Metric) -> dict:
    values = [item["values"][metric] for item in items]
    samples = [x if isinstance(x, list) else [x] for x in values]
    figures = (*interval(samples), *_middle_and_worst(samples, kind))
    if kind.kind == "growth":
        figures = tuple(math.expm1(x) for x in figures)
    value, low, high, median, worst = (None if math.isnan(x) else float(f"{x:.6g}") for x in figures)
    weights = {
        name: round(float(np.mean([item[name] for item in items])), 4)
        for name in ("bits_per_element", "bits_of_tiers", "bits_of_codes")
    }
    place = items[0].get("place") or {}
    profile = {}
    if kind.kind == "profile":
        profile["profile"] = [float(f"{x:.5g}") for x in np.mean(samples, axis=0)]
    return {
        "model": model,
        "case": group,
        "task": metric,
        "method": method,
        **weights,
        "bytes": round(float(np.mean([item["bytes"] for item in items]))),
        "value": value,
        "low": low,
        "high": high,
        "median": median,
        "worst": worst,
        "cases": len(items),
        "samples": sum(map(len, samples)),
        **(place if group != ALL else {}),
        **profile,
    }


def _middle_and_worst(cases: Sequence[Sequence[float]], metric: Metric) -> tuple[float, float]:
    """The median case and the worst one, by the means of their samples; NaN of a single case."""
    if len(cases) == 1:
        return math.nan, math.nan
    means = [float(np.mean(case)) for case in cases]
    worst = min(means) if metric.more_is_better or metric.kind == "accuracy" else max(means)
    return float(np.median(means)), worst


def shown(row: Mapping, metric: Metric) -> str:
    """A figure with its interval, the median case and the worst one, as a table's cell."""
    if row.get("cannot"):
        return "model cannot"

    def cell(x: float, unit: str = "") -> str:
        if metric.kind in ("growth", "accuracy"):
            return f"{100 * x:{'+' if metric.kind == 'growth' else ''}.1f}{unit}"
        return f"{x:.3g}"

    about = []
    if row["low"] is not None and row["high"] is not None:
        about.append(f"{cell(row['low'])} to {cell(row['high'])}")
    if metric.kind != "profile" and row.get("worst") is not None:
        about.append(f"median {cell(row['median'])}, worst {cell(row['worst'])}")
    value = cell(row["value"], " %")
    return f"{value} ({'; '.join(about)})" if about else value


def table(
    found: Sequence[Mapping],
    metrics: Mapping[str, Metric],
    names: Sequence[str] = (),
    case: str = ALL,
) -> str:
    """Markdown: a line a method, most bits first; a column for each metric (those of `names`, or all there are).

    A sequence's MiB and bits per element, of all that is held, of tiers (no window) and of codes (no metadata either),
    are those of the first metric that a method has: what other tasks read is longer or shorter.
    """
    mine = [row for row in found if row["case"] == case]
    names = [name for name in (names or metrics) if any(row["task"] == name for row in mine)]
    cells = {(row["task"], row["method"]): shown(row, metrics[row["task"]]) for row in mine}
    weighs: dict[str, Mapping] = {}
    for row in sorted((row for row in mine if row["task"] in names), key=lambda row: names.index(row["task"])):
        weighs.setdefault(row["method"], row)
    header = ["method", "bits held", "of tiers", "of codes", "MiB", *names]
    lines = [header, ["---"] * len(header)]
    for method, row in sorted(weighs.items(), key=lambda one: -one[1]["bits_per_element"]):
        bits = [f"{row[name]:.2f}" for name in ("bits_per_element", "bits_of_tiers", "bits_of_codes")]
        mib = f"{row['bytes'] / 2**20:.2f}"
        lines.append([f"`{method}`", *bits, mib, *(cells.get((name, method), "-") for name in names)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
