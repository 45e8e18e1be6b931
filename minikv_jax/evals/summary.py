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
    figures = interval(samples)
    if kind.kind == "growth":
        figures = tuple(math.expm1(x) for x in figures)
    value, low, high = (None if math.isnan(x) else float(f"{x:.6g}") for x in figures)
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
        "cases": len(items),
        "samples": sum(map(len, samples)),
        **(place if group != ALL else {}),
        **profile,
    }


def shown(row: Mapping, metric: Metric) -> str:
    """A figure with its interval, as a table's cell."""
    if row.get("cannot"):
        return "model cannot"
    if metric.kind == "growth":
        value, ends = (
            f"{100 * row['value']:+.1f} %",
            [f"{100 * x:+.1f}" for x in (row["low"], row["high"]) if x is not None],
        )
    elif metric.kind == "accuracy":
        value, ends = (
            f"{100 * row['value']:.1f} %",
            [f"{100 * x:.1f}" for x in (row["low"], row["high"]) if x is not None],
        )
    else:
        value, ends = f"{row['value']:.3g}", [f"{x:.3g}" for x in (row["low"], row["high"]) if x is not None]
    return f"{value} ({' to '.join(ends)})" if ends else value


def table(
    found: Sequence[Mapping],
    metrics: Mapping[str, Metric],
    names: Sequence[str] = (),
    case: str = ALL,
    weight: str = "bits_per_element",
) -> str:
    """Markdown: a line a method, fewest bits last; a column for each metric (those of `names`, or all there are).

    `weight` is the field of the rows that bits are taken from, and with spaces the column's title.
    """
    mine = [row for row in found if row["case"] == case]
    names = [name for name in (names or metrics) if any(row["task"] == name for row in mine)]
    bits: dict[str, list[float]] = {}
    for row in mine:
        bits.setdefault(row["method"], []).append(row[weight])
    cells = {(row["task"], row["method"]): shown(row, metrics[row["task"]]) for row in mine}
    lines = [["method", weight.replace("_", " "), *names], ["---"] * (len(names) + 2)]
    for method in sorted(bits, key=lambda method: -float(np.mean(bits[method]))):
        low, high = f"{min(bits[method]):.2f}", f"{max(bits[method]):.2f}"
        span = low if low == high else f"{low} to {high}"
        lines.append([f"`{method}`", span, *(cells.get((name, method), "-") for name in names)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
