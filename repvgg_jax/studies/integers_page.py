"""The page of the study of quantization: a table, pictures, and what they say."""

import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from repvgg_jax.files import replacing, write_text
from repvgg_jax.studies.integers import METHODS, NETWORKS, recipe
from repvgg_jax.studies.report import COLORS, LINES, TEXT, Sample, draw_intervals, signed, table
from repvgg_jax.studies.runs import Results

COLLAPSE = 2.0
"""Points of accuracy that int8 may cost, as QARepVGG's authors want it."""

_PANELS = {
    "weights": "largest over median range of output channels",
    "activations": "largest input",
    "noise": "noise of int8 relative to the variance of outputs",
}


def runs_of(results: Results) -> dict[str, list[dict[str, Any]]]:
    """Runs by network, with the settings of today, in the order of seeds."""
    found = {name: results.of(name, recipe(name)) for name in NETWORKS}
    return {name: runs for name, runs in found.items() if runs}


def write_page(output: pathlib.Path, results: Results) -> str:
    """Writes `int8.md` and its pictures, and returns the text."""
    runs = runs_of(results)
    if not runs:
        return "no results yet"
    text = f"{page_table(runs)}\n\n{sentences(runs)}\n"
    write_text(output / "int8.md", text)
    drops = {
        name: {method: drop(of_name, method) for method in METHODS}
        for name, of_name in runs.items()
    }
    draw_intervals(output / "int8.svg", drops, label="change of accuracy by int8, points")
    draw_layers(output / "layers.svg", runs)
    return text


def accuracy(runs: Sequence[Mapping[str, Any]], method: str) -> Sample:
    """Accuracies of a network, percent."""
    return Sample(tuple(100 * run["accuracies"][method] for run in runs))


def drop(runs: Sequence[Mapping[str, Any]], method: str) -> Sample:
    """Changes of accuracy against the same network in float, points."""
    pairs = ((run["accuracies"][method], run["accuracies"]["float"]) for run in runs)
    return Sample(tuple(100 * (integer - floating) for integer, floating in pairs))


def page_table(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Float accuracies, and what each method changes."""
    header = ["network", "float, % (seeds)", *METHODS]
    body = [
        [
            name,
            str(accuracy(of_name, "float")),
            *(signed(drop(of_name, method).mean) for method in METHODS),
        ]
        for name, of_name in runs.items()
    ]
    return table(header, body)


def sentences(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Whether what the papers report appears."""
    lines = []
    for name, of_name in runs.items():
        means = {method: drop(of_name, method).mean for method in METHODS}
        worst = min(means, key=lambda method: means[method])
        best = max(means, key=lambda method: means[method])
        lines.append(
            f"{name}: {signed(means[worst])} points by the worst method ({worst}), "
            f"{signed(means[best])} by the best ({best})."
        )
    if "RepVGG" in runs and "QARepVGG" in runs:
        own, other = (drop(runs[name], "max").mean for name in ("RepVGG", "QARepVGG"))
        finding = (
            "RepVGG collapses in int8 and QARepVGG does not (A0: -20.2 and -1.8 points on ImageNet)"
        )
        numbers = f"with the calibrator max they change by {signed(own)} and {signed(other)} points"
        if own < -COLLAPSE < other:
            lines.append(f"The papers' finding that {finding} appears here: {numbers}.")
        else:
            lines.append(f"The papers' finding that {finding} does not appear here: {numbers}.")
    return "\n".join(lines)


def draw_layers(path: pathlib.Path, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Ranges of weights and activations and the noise of every layer, medians of seeds."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(8, 7.5))
    figure.patch.set_alpha(0)
    panels = figure.subplots(len(_PANELS), 1)
    for axes, (key, label) in zip(panels, _PANELS.items(), strict=True):
        axes.patch.set_alpha(0)
        for (name, of_name), color in zip(runs.items(), COLORS, strict=False):
            layers = zip(*(run["layers"] for run in of_name), strict=True)
            values = [statistics.median(layer[key] for layer in seeds) for seeds in layers]
            depth = [number / (len(values) - 1) for number in range(len(values))]
            axes.plot(depth, values, "o-", color=color, markersize=3, label=name)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_title(label, color=TEXT, fontsize="small")
        axes.tick_params(colors=TEXT)
        axes.grid(color=LINES)
        for spine in axes.spines.values():
            spine.set_color(LINES)
    panels[0].legend(labelcolor=TEXT, framealpha=0, fontsize="small", ncols=len(runs))
    panels[-1].set_xlabel("depth of the layer, from the stem to the classifier", color=TEXT)
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, bbox_inches="tight", transparent=True)
