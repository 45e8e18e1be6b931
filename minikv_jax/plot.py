"""Pictures of what a cache holds."""

from collections.abc import Mapping
from pathlib import Path

from minikv_jax.report import CacheReport


def save_cache_picture(reports: Mapping[str, CacheReport], path: Path) -> Path:
    """Draws bytes held and tokens kept, layer by layer, one colour a method.

    The ending of `path` chooses the format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    bytes_axis, tokens_axis = figure.subplots(1, 2)
    width = 0.8 / len(reports)
    for i, (name, report) in enumerate(reports.items()):
        at = [layer + i * width for layer in range(len(report.layers))]
        label = f"{name}: {report.total.bytes_held / 2**20:.1f} MiB"
        bytes_axis.bar(at, [layer.bytes_held / 2**10 for layer in report.layers], width, align="edge", label=label)
        label = f"{name}: {report.total.tokens_kept:,.0f} of {report.total.tokens_read:,}"
        tokens_axis.bar(at, [layer.tokens_kept for layer in report.layers], width, align="edge", label=label)
    bytes_axis.set(title="Bytes held", xlabel="layer", ylabel="KiB")
    tokens_axis.set(title="Tokens kept (per key/value head)", xlabel="layer", ylabel="tokens")
    for axis in (bytes_axis, tokens_axis):
        axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
