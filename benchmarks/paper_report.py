"""What was measured of a table of the paper, as a page of Markdown and a picture."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import harness
import paper
import paper_rows
from baselines import cost

from repvgg_jax import cost as variant_cost
from repvgg_jax.files import replacing, write_text
from repvgg_jax.text import first_few

Record = dict[str, Any]
_MODES = {
    "light": {"background": "#ffffff", "text": "#1f2328", "grid": "#d8dee4", "rest": "#6e7781"},
    "dark": {"background": "#0d1117", "text": "#e6edf3", "grid": "#30363d", "rest": "#9198a1"},
}
_SERIES = (  # of the picture: rows joined by a line, and its color
    (("A0", "A1", "A2"), "#d1495b"),
    (("B0", "B1", "B2", "B3"), "#d1495b"),
    (("B1g4", "B2g4", "B3g4"), "#e08e45"),
    (("B1g2",), "#e08e45"),
    (("B1g2-fast", "B2-fast"), "#e08e45"),
    (("ResNet-18", "ResNet-34", "ResNet-50", "ResNet-101", "ResNet-152"), "#3d7ebd"),
)
_SPOTS: tuple[dict[str, Any], ...] = (  # where a name may stand, best first, around its point
    {"xytext": (3, 3), "ha": "left", "va": "bottom"},
    {"xytext": (-4, -3), "ha": "right", "va": "top"},
    {"xytext": (4, -3), "ha": "left", "va": "top"},
    {"xytext": (-4, 3), "ha": "right", "va": "bottom"},
    {"xytext": (6, 0), "ha": "left", "va": "center"},
    {"xytext": (-6, 0), "ha": "right", "va": "center"},
    {"xytext": (0, 6), "ha": "center", "va": "bottom"},
    {"xytext": (0, -6), "ha": "center", "va": "top"},
    {"xytext": (8, 8), "ha": "left", "va": "bottom"},
    {"xytext": (-8, -8), "ha": "right", "va": "top"},
    {"xytext": (8, -8), "ha": "left", "va": "top"},
    {"xytext": (-8, 8), "ha": "right", "va": "bottom"},
)


def write(
    folder: pathlib.Path, table: str, rows: Sequence[str], records: Sequence[Record]
) -> pathlib.Path:
    """Writes `tableN.md` and, if there are accuracies and speeds, `tableN-light.svg` and `-dark`.

    Args:
      folder: where to.
      table: a key of `paper.TABLES`.
      rows: what to report of, in order.
      records: `job`, `result`, `date`, `commit` and `versions` of what was done.

    Returns:
      The page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    timed = [record for record in records if "runner" in record["job"]]
    ahead = [record for record in records if "ahead" in record["job"]]
    lines = [f"# Table {table}: {paper.TABLES[table].title}", "", *_facts(records), ""]
    lines += _costs(table, rows)
    if any("error" not in record["result"] for record in timed):
        if table != "1" and draw(folder, table, timed):
            lines += [_picture(table), ""]
        for case in dict.fromkeys(map(_case, timed)):
            lines += _speeds(table, rows, [each for each in timed if _case(each) == case], case)
    lines += _ahead(rows, ahead)
    lines += _failures(records)
    page = folder / f"table{table}.md"
    write_text(page, "\n".join(lines))
    return page


def draw(folder: pathlib.Path, table: str, timed: Sequence[Record]) -> bool:
    """Draws accuracy over speed, one panel per framework and one for the paper's 1080Ti.

    Returns:
      Whether there was anything to draw.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    printed = paper.TABLES[table].rows
    panels: dict[str, dict[str, float]] = {}
    if speeds := {row: each.speed for row, each in printed.items() if each.speed}:
        panels["1080Ti, as printed"] = speeds
    for record in timed:
        if found := record["result"].get("images_per_second"):
            job = record["job"]
            title = f"{job['runner']}, batch {job['batch']}, {job['dtype']}"
            panels.setdefault(title, {})[job["row"]] = found["median"]
    panels = {title: points for title, points in panels.items() if points}
    if not any(row in printed for points in panels.values() for row in points):
        return False
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    for mode, colors in _MODES.items():
        style = {
            "text.color": colors["text"],
            "axes.edgecolor": colors["grid"],
            "axes.labelcolor": colors["text"],
            "xtick.color": colors["text"],
            "ytick.color": colors["text"],
            "axes.facecolor": colors["background"],
            "svg.fonttype": "none",
            "svg.hashsalt": "repvgg_jax",
            "font.size": 8,
        }
        with rc_context(style):
            figure = Figure(
                figsize=(5.2 * columns, 4.2 * lines),
                layout="constrained",
                facecolor=colors["background"],
            )
            axes = figure.subplots(lines, columns, squeeze=False, sharey=True).flatten()
            for axis in axes[len(panels) :]:
                axis.remove()
            drawn = [
                (axis, _panel(axis, title, points, table, colors))
                for axis, (title, points) in zip(axes, panels.items(), strict=False)
            ]
            figure.draw_without_rendering()  # where points are is known from here on
            for axis, names in drawn:
                _annotate(axis, names)
            with replacing(folder / f"table{table}-{mode}.svg") as path:
                figure.savefig(path, format="svg", metadata={"Date": None})
    return True


def _panel(
    axis: Any, title: str, points: dict[str, float], table: str, colors: dict[str, str]
) -> dict[str, tuple[Any, str]]:
    """Draws all but the names of the points; returns their places and colors."""
    from matplotlib import ticker

    printed = paper.TABLES[table].rows
    places = {row: (speed, printed[row].accuracy) for row, speed in points.items()}
    names = {row: (place, colors["rest"]) for row, place in places.items()}
    for rows, color in _SERIES:
        there = [row for row in rows if row in places]
        names |= {row: (places[row], color) for row in there}
        if there:
            axis.plot(*zip(*(places[row] for row in there), strict=True), color=color)
    for place, color in names.values():
        axis.plot(*place, "o", color=color, markersize=4)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.margins(x=0.2, y=0.1)
    axis.grid(color=colors["grid"], linewidth=0.5)
    axis.set_axisbelow(True)
    axis.set_title(title)
    axis.set_xlabel("images/s")
    axis.set_ylabel(paper.TABLES[table].measure)
    return names


def _annotate(axis: Any, names: dict[str, tuple[Any, str]]) -> None:
    """Writes every name where it covers the fewest points and other names."""
    from matplotlib.transforms import Bbox

    taken = [
        Bbox.from_bounds(x - 3, y - 3, 6, 6)
        for x, y in axis.transData.transform([place for place, _ in names.values()])
    ]
    for name, (place, color) in names.items():

        def written(
            spot: dict[str, Any], name: str = name, place: Any = place, c: str = color
        ) -> Any:
            options = {"textcoords": "offset points", "fontsize": 7, "color": c}
            return axis.annotate(name, place, **options, **spot)

        def covered(spot: dict[str, Any]) -> int:
            text = written(spot)
            box = text.get_window_extent()
            text.remove()
            inside = axis.bbox.contains(*box.min) and axis.bbox.contains(*box.max)
            return box.count_overlaps(taken) + 10 * (not inside)

        taken.append(written(min(_SPOTS, key=covered)).get_window_extent())


def _picture(table: str) -> str:
    return (
        f'<picture>\n  <source media="(prefers-color-scheme: dark)" '
        f'srcset="table{table}-dark.svg">\n'
        f'  <img alt="accuracy over speed" src="table{table}-light.svg">\n</picture>'
    )


def _facts(records: Sequence[Record]) -> list[str]:
    """Where and when the results come from."""
    facts: dict[str, Any] = {}
    if timed := [record for record in records if "runner" in record["job"]]:
        facts |= timed[-1]["machine"]
        loads = [record["machine"]["load_average"][0] for record in timed]
        facts["load_average"] = f"{min(loads)} to {max(loads)} after a measurement"
    if records:
        dates = sorted({record["date"] for record in records})
        facts["measured"] = " to ".join(dict.fromkeys((dates[0], dates[-1])))
        facts["commits"] = ", ".join(sorted({record["commit"] or "none" for record in records}))
    versions = {name: v for record in records for name, v in record["versions"].items()}
    facts["versions"] = ", ".join(f"{name} {v}" for name, v in sorted(versions.items()))
    return [f"- {name}: {value}" for name, value in facts.items() if value is not None]


def _costs(table: str, rows: Sequence[str]) -> list[str]:
    """Exact counts beside what the paper prints."""
    printed = paper.TABLES[table]
    if table == "1":
        return _density_printed(rows)
    base = printed.rows.get(printed.reference) or paper.TABLES["4"].rows[printed.reference]
    cells = []
    for row in rows:
        cell: dict[str, Any] = {"": row}
        if table == "8":
            cell |= _segmenter_costs(row)
        else:
            network, variant = paper.network_of(table, row), paper.variant_of(table, row)
            found = variant_cost(variant) if variant else cost(network)
            cell |= {
                "pixels": network.image_size,
                "M params trained": f"{found.params_train / 1e6:.2f}",
                "M folded": f"{found.params_deploy / 1e6:.2f}",
                "G MACs": f"{found.macs_deploy / 1e9:.2f}",
                "G Winograd": f"{found.winograd_muls / 1e9:.2f}",
            }
        here = printed.rows[row]
        cell |= {
            f"paper: {printed.measure}": f"{here.accuracy:.2f}",
            "paper: 1080Ti images/s": here.speed,
        }
        if here.speed:
            cell[f"paper: x {printed.reference}"] = f"{here.speed / base.speed:.2f}"
        if here.pixel_accuracy:
            cell["paper: pixel accuracy %"] = f"{here.pixel_accuracy:.2f}"
        if table in "45":
            cell |= {"paper: G MACs": here.macs, "paper: G Winograd": here.winograd}
        cells.append(cell)
    return ["## Costs, and what the paper prints", "", harness.table(cells), ""]


def _segmenter_costs(row: str) -> dict[str, Any]:
    trained = paper_rows.segmenter_cost(row, deploy=False)
    found = paper_rows.segmenter_cost(row)
    return {
        "pixels": paper.SEGMENTED_SIZE,
        "M params trained": f"{trained['params'] / 1e6:.2f}",
        "G MACs trained": f"{trained['macs'] / 1e9:.1f}",
        "M folded": f"{found['params'] / 1e6:.2f}",
        "G MACs": f"{found['macs'] / 1e9:.1f}",
        "G Winograd": f"{found['winograd'] / 1e9:.1f}",
    }


def _density_printed(rows: Sequence[str]) -> list[str]:
    images, channels, size = paper.DENSITY_SHAPE
    cells = [
        {"": row, "G MACs": f"{macs:.1f}", "ms": f"{took:.1f}", "TFLOPS": f"{speed:.2f}"}
        for row, (macs, took, speed) in ((row, paper.DENSITY[row]) for row in rows)
    ]
    title = f"## As printed: 1080Ti, batch {images}, {channels} channels, {size}x{size} pixels"
    return [title, "", harness.table(cells), ""]


def _speeds(table: str, rows: Sequence[str], records: Sequence[Record], case: str) -> list[str]:
    """Speeds, ratios and memory of one case, a column per framework."""
    runners = list(dict.fromkeys(record["job"]["runner"] for record in records))
    found = {(each["job"]["row"], each["job"]["runner"]): each for each in records}
    reference = paper.TABLES[table].reference

    def body(cell: Callable[[Record], str]) -> str:
        return harness.table(
            [
                {"": row}
                | {
                    kind: _cell(found[row, kind], cell) if (row, kind) in found else "-"
                    for kind in runners
                }
                for row in rows
            ]
        )

    def density(record: Record) -> str:
        job = record["job"]
        macs = cost(_network(record), image_size=job["image_size"]).macs_deploy
        return _number(2 * macs * record["result"]["images_per_second"]["median"] / 1e12)

    lines = [f"## {case}", ""]
    if table == "1":
        shape = f"{records[0]['job']['channels']} channels"
        lines += [f"TFLOPS, two FLOP per MAC, {shape}:", "", body(density), ""]
    return [
        *lines,
        "Images/s, median (smallest to largest):",
        "",
        body(lambda record: _spread(record["result"]["images_per_second"])),
        "",
        f"Images/s relative to {reference} in the same rounds:",
        "",
        body(lambda record: _spread(record["result"].get("ratio"))),
        "",
        "Memory in MiB: of the process with Python and the framework, after the first batch; on a "
        "GPU, the most that was allocated there:",
        "",
        body(lambda record: f"{record['result']['memory_mib']:.0f}"),
        "",
    ]


def _network(record: Record) -> Any:
    job = record["job"]
    return paper.network_of(job["table"], job["row"], channels=job["channels"])


def _ahead(rows: Sequence[str], records: Sequence[Record]) -> list[str]:
    """Bytes and kernels of the programs compiled ahead of time."""
    done = [record for record in records if "gb" in record["result"]]
    if not done:
        return []
    found = {(each["job"]["row"], each["job"]["ahead"]): each["result"] for each in done}
    targets = list(dict.fromkeys(record["job"]["ahead"] for record in done))
    cells = []
    for row in rows:
        cell: dict[str, Any] = {"": row}
        for target in targets:
            result = found.get((row, target), {})
            cell |= {f"{target}: GB": result.get("gb"), f"{target}: kernels": result.get("kernels")}
        cells.append(cell)
    job = done[0]["job"]
    return [
        "## Compiled ahead of time",
        "",
        f"Batch {job['batch']}, {job['dtype']}: read from and written to main memory per batch, "
        "and kernels. Counted from the compiled program, not timed.",
        "",
        harness.table(cells),
        "",
    ]


def _failures(records: Sequence[Record]) -> list[str]:
    """What has no result, by reason."""
    reasons: dict[str, list[str]] = {}
    for record in records:
        job, result = record["job"], record["result"]
        if "error" in result:
            what = job.get("runner") or f"compiled for {job['ahead']}"
            reasons.setdefault(f"{what}: {result['error']}", []).append(job["row"])
    if not reasons:
        return []
    lines = [
        f"- {reason} ({first_few(dict.fromkeys(rows), 30)})" for reason, rows in reasons.items()
    ]
    return ["## Not measured", "", *lines, ""]


def _case(record: Record) -> str:
    job = record["job"]
    size = f", {job['image_size']} pixels" if job["image_size"] else ""
    return f"{job['device'].upper()}, batch {job['batch']}, {job['dtype']}{size}"


def _cell(record: Record, show: Callable[[Record], str]) -> str:
    return "failed" if "error" in record["result"] else show(record)


def _spread(found: dict[str, float] | None) -> str:
    if found is None:
        return "-"
    middle, low, high = (_number(found[key]) for key in ("median", "min", "max"))
    return f"{middle} ({low} to {high})"


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
