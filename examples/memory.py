"""Draws what caches weigh against how much has been read, for three shapes of models, from plans alone.

python examples/memory.py examples/results/memory.png
"""

import argparse
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from minikv_jax import outputs, presets, program
from minikv_jax.models.shapes import SHAPES
from minikv_jax.report import planned_report

MODELS = ("llama2-7b", "llama3-8b", "qwen2.5-1.5b")
METHODS = ("full", "int8", "mikv", "kivi", "minikv_plus", "minikv", "snapkv")
LENGTHS = tuple(1024 << i for i in range(8))


def draw(path: Path) -> None:
    """One panel a model, one line a method."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(MODELS))
    for axis, model in zip(axes, MODELS):
        for method in METHODS:
            plans = [planned_report(SHAPES[model], presets.by_name(method), length, 512).total for length in LENGTHS]
            axis.plot(LENGTHS, [plan.bytes_held / 2**30 for plan in plans], marker="o", markersize=3, label=method)
        axis.set(title=model, xlabel="prompt, tokens", ylabel="GiB held")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xticks(LENGTHS[::2], [f"{length >> 10}k" for length in LENGTHS[::2]])
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    path = parser.parse_args().picture
    outputs.require_picture(path, "picture")
    draw(path)


if __name__ == "__main__":
    program.run(main)
