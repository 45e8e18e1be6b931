"""Pictures of results: quality against bits per element, retrieval over depth and length, and KL along long answers.

python -m minikv_jax.evals.picture examples/results/quality-*.json --out examples/results/quality.png
"""

import argparse
import functools
import math
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from minikv_jax import outputs, presets, program
from minikv_jax.bench.timing import read_results
from minikv_jax.errors import ConfigError
from minikv_jax.evals.summary import ALL
from minikv_jax.evals.tasks import METRICS

# What a picture shows where it is there, and the scale of its axis.
_PANELS = {"kl": "log", "top1": "linear", "ppl": "symlog", "run_kl": "log", "lines": "linear", "shared": "linear"}
_MAPPED = ("passkey", "needle")
_PATH = "run_kl_path"


def _canvas(columns: int, rows: int, wide: float, high: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(wide * columns, high * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_quality(rows: Sequence[Mapping], path: Path, panels: Sequence[str] = ()) -> Path | None:
    """One panel a metric and model, one colour a method. Nothing to show: no file, and None.

    A line joins those of a method's settings that no smaller or equal one of it beats; the others are dots.
    """
    mine = [row for row in rows if row["case"] == ALL and row["value"] is not None and not row.get("cannot")]
    models = list(dict.fromkeys(row["model"] for row in mine))
    there = {row["task"] for row in mine if row["method"] != "full"}
    names = [name for name in (panels or _PANELS) if name in there]
    if not names:
        return None
    known = list(presets.METHODS)  # in this order, so that a method has its colour in every picture
    methods = sorted({_family(row) for row in mine}, key=lambda name: (*known, name).index(name))
    figure, axes = _canvas(len(names), len(models), 4.2, 3.4)
    for i, model in enumerate(models):
        for axis, name in zip(axes[i], names):
            found = [row for row in mine if row["model"] == model and row["task"] == name]
            _lines(axis, found, methods)
            scale = _PANELS.get(name, "linear")
            axis.set(
                title=f"{model}: {name}",
                xlabel="bits per element, all held",
                ylabel=textwrap.fill(METRICS[name].about, 36),
            )
            axis.set_xscale("log", base=2)
            axis.yaxis.label.set_fontsize("x-small")
            if scale == "symlog":  # grows by a few per cent or a hundredfold, or falls a little
                axis.set_yscale("symlog", linthresh=0.1)
            elif scale == "log" and any(row["value"] > 0 for row in found):
                axis.set_yscale("log")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), fontsize="small")
    return _save(figure, path)


def _family(row: Mapping) -> str:
    return row["method"].partition(":")[0]


def _lines(axis, rows: Sequence[Mapping], methods: Sequence[str]) -> None:
    full = next((row["value"] for row in rows if row["method"] == "full"), 0)
    for i, method in enumerate(methods):
        best, others = [], []
        for row in sorted((row for row in rows if _family(row) == method), key=lambda row: row["bits_per_element"]):
            beaten = best and abs(row["value"] - full) >= abs(best[-1]["value"] - full)
            (others if beaten else best).append(row)
        color = "black" if method == "full" else f"C{i % 10}"
        error = None
        if best and all(row["low"] is not None for row in best):
            error = [
                [max(row["value"] - row["low"], 0) for row in best],
                [max(row["high"] - row["value"], 0) for row in best],
            ]
        axis.errorbar(
            *_places(best), error, marker="o", markersize=4, linewidth=1.2, capsize=2, label=method, color=color
        )
        axis.plot(*_places(others), ".", markersize=3, alpha=0.5, color=color)


def _places(rows: Sequence[Mapping]) -> tuple[list[float], list[float]]:
    return [row["bits_per_element"] for row in rows], [row["value"] for row in rows]


def save_heatmap(rows: Sequence[Mapping], path: Path) -> Path | None:
    """Right answers by depth (down) and length (across), one panel a method and task."""
    mine = [row for row in rows if row["task"] in _MAPPED and "depth" in row]
    panels = list(dict.fromkeys((row["task"], row["method"]) for row in mine))
    if not panels:
        return None
    columns = min(len(panels), 5)
    figure, axes = _canvas(columns, math.ceil(len(panels) / columns), 2.8, 2.6)
    flat = [axis for line in axes for axis in line]
    for axis, (task, method) in zip(flat, panels):
        found = {
            (row["depth"], row["length"]): row["value"]
            for row in mine
            if (row["task"], row["method"]) == (task, method)
        }
        depths, lengths = (sorted({place[i] for place in found}) for i in (0, 1))
        grid = [[found.get((depth, length), math.nan) for length in lengths] for depth in depths]
        axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_title(textwrap.fill(f"{task}, {method}", 40), fontsize="x-small")
        axis.set_xticks(range(len(lengths)), [f"{x:,}" for x in lengths], fontsize="x-small")
        axis.set_yticks(range(len(depths)), [f"{100 * x:.0f} %" for x in depths], fontsize="x-small")
    for axis in flat[len(panels) :]:
        axis.remove()
    return _save(figure, path)


def save_paths(rows: Sequence[Mapping], path: Path) -> Path | None:
    """Mean KL stretch by stretch of answers written freely, one line a method, one panel a model."""
    mine = [row for row in rows if row["task"] == _PATH and row["case"] == ALL and row["method"] != "full"]
    if not mine:
        return None
    models = list(dict.fromkeys(row["model"] for row in mine))
    figure, axes = _canvas(len(models), 1, 4.8, 3.4)
    methods = list(dict.fromkeys(row["method"] for row in mine))
    for axis, model in zip(axes[0], models):
        for row in (row for row in mine if row["model"] == model):
            label, color = f"{row['method']} ({row['bits_per_element']:.2f} bits)", f"C{methods.index(row['method'])}"
            parts = range(1, len(row["profile"]) + 1)
            axis.plot(parts, row["profile"], marker="o", markersize=4, label=label, color=color)
        axis.set(title=model, xlabel="part of the answer", ylabel=METRICS[_PATH].about, yscale="log")
        axis.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    return _save(figure, path)


def _save(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="results files of `minikv eval`")
    parser.add_argument("--out", type=Path, required=True, help="a .png or .svg")
    parser.add_argument("--panels", default="", help="metrics for --out, as kl,lines; by default all that are there")
    parser.add_argument("--heatmap", type=Path, help="where to draw retrieval over depth and length")
    parser.add_argument("--paths", type=Path, help="where to draw KL along long answers")
    chosen = parser.parse_args(arguments)
    rows = [row for path in chosen.results for row in read_results(path, "quality")["rows"]]
    panels = [name for name in chosen.panels.split(",") if name]
    if unknown := [name for name in panels if name not in METRICS]:
        raise ConfigError(f"--panels: unknown metric {unknown[0]!r}: choose from {', '.join(METRICS)}.")
    quality = functools.partial(save_quality, panels=panels)
    wanted = {"--out": (quality, chosen.out), "--heatmap": (save_heatmap, chosen.heatmap)}
    wanted["--paths"] = (save_paths, chosen.paths)
    for option, (save, path) in wanted.items():
        if path is None:
            continue
        outputs.require_picture(path, option)
        if save(rows, path) is None:
            raise ConfigError(f"The results have nothing to show for {option}.")
    return 0


if __name__ == "__main__":
    program.run(lambda: main(sys.argv[1:]))
