"""The rows of a run as a picture and as one page that can be mailed and read offline."""

import base64
import html
import math
import pathlib
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import jax
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from repvgg_jax.files import replacing, write_text
from repvgg_jax.text import encodable, versions
from repvgg_jax.train.by_class import ByClass
from repvgg_jax.train.workdir import Workdir

Row = Mapping[str, Any]

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_TRAIN, _EVAL, _GRID = "#9db4c8", "#1f4e79", "#e6e6e6"

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .15rem 1.2rem .15rem 0; text-align: left; border-bottom: 1px solid #e6e6e6 }
img { max-width: 100% }
.quiet { color: #666 } code { font-size: .9em }
"""


def write(
    workdir: Workdir,
    *,
    title: str,
    rows: Sequence[Row],
    config: Mapping[str, Any],
    by_class: ByClass | None = None,
    headline: str = "accuracy",
    picture: Callable[[pathlib.Path], None] | None = None,
) -> None:
    """Writes `curves.png` and `report.html`, and `confusion.png` after the final evaluation.

    Args:
      workdir: the run directory.
      title: of the run.
      rows: of `metrics.jsonl`.
      config: the content of `config.json`.
      by_class: of the final evaluation, fused.
      headline: the metric that says how good a network is.
      picture: draws `examples.png`; None leaves what an evaluation before drew.
    """
    draw_curves(rows, workdir.curves, title, headline=headline)
    if picture is not None:
        with replacing(workdir.examples) as temporary:
            picture(temporary)
    if by_class is not None:
        by_class.draw(workdir.confusion)
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="quiet">{html.escape(_state(rows))}</p>',
        *_forms(rows),
        *_picture("Curves", f"loss and {headline}", workdir.curves),
        *_picture("Examples of the last evaluation", "examples", workdir.examples),
        *_classes(by_class, workdir),
        *_evaluations(rows, headline),
        *_speed(rows),
        "<h2>Configuration</h2>",
        _table(["setting", "value"], [(k, v) for k, v in _flat(config)]),
        "<h2>Environment</h2>",
        _table(["what", "version"], _environment()),
    ]
    text = "\n".join(parts)
    page = (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style></head>\n"
        f"<body>\n{text}\n</body>\n</html>\n"
    )
    write_text(workdir.report, page)


def _state(rows: Sequence[Row]) -> str:
    if not rows:
        return "nothing reported yet"
    ended = "finished" if "final/accuracy" in rows[-1] else "running or interrupted"
    return f"{ended} at step {rows[-1]['step']:,}"


def _forms(rows: Sequence[Row]) -> list[str]:
    final = next((row for row in reversed(rows) if "final/accuracy" in row), None)
    if final is None:
        return []
    names = [
        name.removeprefix("final/")
        for name in final
        if name.startswith("final/") and not name.endswith(("_fused", "_int8"))
    ]
    forms = {"as trained": "", "fused": "_fused", "integers, simulated": "_int8"}
    if f"final/{names[0]}_int8" not in final:
        forms.popitem()
    body = [
        (name, *(_number(final.get(f"final/{name}{suffix}")) for suffix in forms.values()))
        for name in names
    ]
    return [
        "<h2>The network as trained, and fused</h2>",
        _table(["validation images", *forms], body),
    ]


def _picture(title: str, text: str, path: pathlib.Path) -> list[str]:
    if not path.exists():
        return []
    data = base64.b64encode(path.read_bytes()).decode()
    return [f"<h2>{title}</h2>", f'<img alt="{text}" src="data:image/png;base64,{data}">']


def _classes(by_class: ByClass | None, workdir: Workdir) -> list[str]:
    if by_class is None:
        return []
    picture = (
        []
        if by_class.confusion is None
        else _picture("Confusion matrix, fused", "confusion matrix", workdir.confusion)
    )
    return [
        f"<h2>Classes of the lowest {by_class.score_name}, fused</h2>",
        _table(*by_class.table()),
        *picture,
    ]


def _evaluations(rows: Sequence[Row], headline: str) -> list[str]:
    found = [row for row in rows if f"eval/{headline}" in row]
    if not found:
        return []
    names = [name for name in found[0] if name.startswith("eval/")]
    best = best_row(found, headline)
    return [
        "<h2>Evaluations</h2>",
        _table(
            ["step", *(name.removeprefix("eval/") for name in names), ""],
            [
                (
                    f"{row['step']:,}",
                    *(_number(row.get(name)) for name in names),
                    "best" if row is best else "",
                )
                for row in found
            ],
        ),
    ]


def best_row(rows: Sequence[Row], headline: str = "accuracy") -> Row | None:
    """The evaluation with the best headline, the last of equal ones; None if none is finite."""
    name = f"eval/{headline}"
    found = [row for row in rows if _is_finite(row.get(name))]
    return max(found, key=lambda row: (row[name], row["step"]), default=None)


def _speed(rows: Sequence[Row]) -> list[str]:
    names = ("images_per_second_per_device", "data_wait")
    found = [row for row in rows if all(row.get(name) is not None for name in names)]
    if not found:
        return []
    speeds, waits = ([row[name] for row in found] for name in names)
    body = [
        (name, *(form(value) for value in (statistics.median(values), min(values), max(values))))
        for name, values, form in (
            ("images/s/device", speeds, lambda v: f"{v:,.1f}"),
            ("waiting for data", waits, lambda v: f"{v:.1%}"),
        )
    ]
    return ["<h2>Speed</h2>", _table(["over the rows", "median", "least", "most"], body)]


def _environment() -> list[tuple[str, str]]:
    devices = jax.devices()
    found = [
        ("devices", f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"),
        ("processes", str(jax.process_count())),
        ("system", platform.platform()),
        ("python", platform.python_version()),
    ]
    found += versions(*_PACKAGES).items()
    return found


def _flat(settings: Mapping[str, Any], path: str = "") -> list[tuple[str, str]]:
    lines = []
    for key, value in settings.items():
        name = f"{path}.{key}" if path else key
        lines += _flat(value, name) if isinstance(value, Mapping) else [(name, repr(value))]
    return lines


def _is_finite(value: float | None) -> TypeGuard[float]:
    """Of a row's number; what is not finite is None, and was NaN in files of earlier versions."""
    return value is not None and math.isfinite(value)


def _number(value: float | None) -> str:
    return f"{value:.4f}" if _is_finite(value) else "not finite"


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        texts = "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells)
        return f"<tr>{texts}</tr>"

    lines = [row(head, "th"), *(row(cells, "td") for cells in body)]
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def draw_curves(
    rows: Sequence[Mapping[str, Any]],
    path: pathlib.Path,
    title: str,
    *,
    headline: str = "accuracy",
) -> None:
    """Draws the rows of `metrics.jsonl`, as PNG: the loss, and `headline` beside it."""
    figure = Figure(figsize=(9, 3.6), dpi=130, layout="constrained")
    figure.suptitle(encodable(title), fontsize=11, x=0.01, ha="left")
    loss, accuracy = figure.subplots(1, 2)
    for axes, name, label in ((loss, "loss", "loss"), (accuracy, headline, headline)):
        for part, color, legend in (("train", _TRAIN, "training"), ("eval", _EVAL, "validation")):
            found = [(r["step"], r.get(f"{part}/{name}")) for r in rows]
            points = [point for point in found if _is_finite(point[1])]
            if points:
                marker = "o" if len(points) < 40 else None
                axes.plot(
                    *zip(*points, strict=True),
                    color=color,
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
    best = best_row(rows, headline)
    if best is not None:
        accuracy.plot(
            best["step"],
            best[f"eval/{headline}"],
            marker="*",
            markersize=10,
            linestyle="none",
            color=_EVAL,
            label=f"best, step {best['step']:,}",
        )
    final = [row for row in rows if "final/accuracy" in row]
    if final and _is_finite(value := final[-1][f"final/{headline}"]):
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
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
