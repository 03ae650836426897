"""The picture of a run: loss and accuracy over its steps."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

_TRAIN, _EVAL, _GRID = "#9db4c8", "#1f4e79", "#e6e6e6"


def draw(rows: Sequence[Mapping[str, Any]], path: pathlib.Path, title: str) -> None:
    """Draws the rows of `metrics.jsonl`, as PNG."""
    figure = Figure(figsize=(9, 3.6), dpi=130, layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    loss, accuracy = figure.subplots(1, 2)
    for axes, name, label in ((loss, "loss", "loss"), (accuracy, "accuracy", "accuracy")):
        for part, colour, legend in (("train", _TRAIN, "training"), ("eval", _EVAL, "held out")):
            points = [(r["step"], r[f"{part}/{name}"]) for r in rows if f"{part}/{name}" in r]
            if points:
                marker = "o" if len(points) < 40 else None
                axes.plot(
                    *zip(*points, strict=True),
                    color=colour,
                    label=legend,
                    linewidth=1.8,
                    marker=marker,
                    markersize=3,
                )
        axes.set_xlabel("step")
        axes.set_title(label, fontsize=10, loc="left", color="#444444")
        axes.grid(color=_GRID)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    loss.set_ylim(bottom=0)
    accuracy.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=None))
    final = [row for row in rows if "final/accuracy" in row]
    if final:
        value = final[-1]["final/accuracy"]
        accuracy.annotate(
            f"{value:.2%}",
            (final[-1]["step"], value),
            xytext=(-4, -14),
            textcoords="offset points",
            ha="right",
            fontsize=9,
            color=_EVAL,
        )
    if accuracy.get_legend_handles_labels()[0]:
        accuracy.legend(loc="lower right", frameon=False, fontsize=9, bbox_to_anchor=(1, 0.08))
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png")
    temporary.replace(path)
