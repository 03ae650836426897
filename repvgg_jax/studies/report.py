"""Tables, pictures and sentences of the studies."""

import dataclasses
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence

from repvgg_jax.files import replacing

# Colors that are readable on white and on black, as pages may be either; no background.
TEXT, LINES, COLORS = (
    "#808080",
    "#80808060",
    ("#3b82f6", "#e8762c", "#16a37a", "#b565d8", "#c9a227"),
)


@dataclasses.dataclass(frozen=True)
class Sample:
    """Results of several seeds, in percent.

    Attributes:
      values: one per seed.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean of the values."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation of the values; NaN for a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan

    @property
    def error(self) -> float:
        """The standard error of the mean; NaN for a single one."""
        return self.spread / math.sqrt(len(self.values))

    def __str__(self) -> str:
        """Mean, standard deviation and number of seeds."""
        if len(self.values) == 1:
            return f"{self.mean:.2f} (1)"
        return f"{self.mean:.2f} ± {self.spread:.2f} ({len(self.values)})"


def difference(sample: Sample, reference: Sample) -> tuple[float, float]:
    """Difference of two means, and its standard error."""
    return sample.mean - reference.mean, math.hypot(sample.error, reference.error)


def is_clear(sample: Sample, reference: Sample) -> bool:
    """Whether two means differ by more than twice the standard error of their difference."""
    found, error = difference(sample, reference)
    return not math.isnan(error) and abs(found) > 2 * error


def signed(change: float) -> str:
    """A change with two digits behind the point and its sign; none if it is 0 to these digits."""
    return f"{change:+.2f}" if round(change, 2) else "0.00"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def draw_intervals(
    path: pathlib.Path,
    groups: Mapping[str, Mapping[str, Sample]],
    *,
    label: str,
    marks: Mapping[str, float] | None = None,
    marks_label: str = "",
) -> None:
    """A picture of means with their standard deviations, a row per name.

    Args:
      path: of an SVG file, or another format that Matplotlib writes.
      groups: by name of a group, which has a color, samples by name of a row.
      label: of the axis.
      marks: other values of rows, drawn as crosses.
      marks_label: what they are.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for samples in groups.values() for name in samples))
    figure = Figure(figsize=(7, 0.8 + 0.3 * len(names) * max(1, 0.6 * len(groups))))
    axes = figure.subplots()
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    for number, ((group, samples), color) in enumerate(zip(groups.items(), COLORS, strict=False)):
        shift = 0.7 * ((number + 0.5) / len(groups) - 0.5)
        axes.errorbar(
            [sample.mean for sample in samples.values()],
            [names.index(name) + shift for name in samples],
            xerr=[0 if math.isnan(s.spread) else s.spread for s in samples.values()],
            fmt="o",
            color=color,
            capsize=3,
            markersize=5,
            label=group,
        )
        for name, sample in samples.items():
            height = [names.index(name) + shift] * len(sample.values)
            axes.plot(sample.values, height, "|", color=color, alpha=0.6, markersize=7)
    if marks:
        known = [name for name in marks if name in names]
        axes.plot(
            [marks[name] for name in known],
            [names.index(name) for name in known],
            "x",
            color=COLORS[1],
            label=marks_label,
        )
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(label, color=TEXT)
    axes.tick_params(colors=TEXT)
    axes.grid(axis="x", color=LINES)
    for spine in axes.spines.values():
        spine.set_color(LINES)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(labelcolor=TEXT, framealpha=0, fontsize="small", loc="best")
    with replacing(path) as temporary:
        figure.savefig(temporary, bbox_inches="tight", transparent=True)
