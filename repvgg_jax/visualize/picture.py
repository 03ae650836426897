"""Kernels and shares of branches as pictures."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter

from repvgg_jax.visualize.kernels import BlockKernels, stage_shares

_COLORS = ("#1f4e79", "#d98324", "#5b9f6e", "#8b5ea6", "#c0504d", "#7f7f7f", "#3fa7b5", "#b5a33f")
_GRID, _TEXT = "#e6e6e6", "#444444"
_GAP = 1  # pixels between two kernels of a mosaic


def draw_blocks(blocks: Sequence[BlockKernels], title: str = "") -> Figure:
    """A column for every stage: where its kernels are large, some of them, and whose they are.

    Rows, from above: the share of the squared norm at every position of the kernel, mean over the
    blocks of the stage; kernels of the stage's last block, a row per output channel and a column
    per input channel; and, if the network is in training form, the branches' shares of every
    block. In stages with kernels of several sizes, the first two rows are of the largest ones.

    Args:
      blocks: from `inspect_blocks`.
      title: of the picture.

    Returns:
      A `matplotlib.figure.Figure`.
    """
    stages = {stage: [b for b in blocks if b.stage == stage] for stage in _stages(blocks)}
    branches = list(dict.fromkeys(name for block in blocks for name in block.shares))
    heights = [1.0, 1.0, 1.5] if branches else [1.0, 1.0]
    width = max(6.5, 1.75 * len(stages) + 1.0)
    layout = ConstrainedLayoutEngine(w_pad=0.08)
    figure = Figure(figsize=(width, 2.0 * sum(heights) + 0.6), dpi=130, layout=layout)
    grid = figure.add_gridspec(len(heights), len(stages), height_ratios=heights)
    figure.suptitle(title, fontsize=11, color=_TEXT)
    for column, (stage, members) in enumerate(stages.items()):
        taps = figure.add_subplot(grid[0, column])
        size = max(block.taps.shape for block in members)
        largest = [block for block in members if block.taps.shape == size]
        _draw_taps(taps, np.mean([block.taps for block in largest], axis=0))
        taps.set_title(f"{stage}, {size[0]}x{size[1]}", fontsize=9, color=_TEXT)
        mosaic = figure.add_subplot(grid[1, column])
        draw_kernels(mosaic, largest[-1].shown)
        if not column:
            taps.set_ylabel("norm by position", fontsize=8, color=_TEXT)
            mosaic.set_ylabel("kernels", fontsize=8, color=_TEXT)
    if branches:
        _draw_shares(figure.add_subplot(grid[2, :]), stages, branches)
    return figure


def draw_kernels(axes: Any, kernels: np.ndarray) -> None:
    """Draws kernels side by side: blue is positive, red negative.

    Colors are as strong as the square root of the number, so that small ones can be seen.

    Args:
      axes: of matplotlib.
      kernels: (count, height, width).
    """
    count, height, width = kernels.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = np.full((rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP), np.nan)
    for number, kernel in enumerate(kernels):
        top, left = (number // columns) * (height + _GAP), (number % columns) * (width + _GAP)
        sheet[top : top + height, left : left + width] = np.sign(kernel) * np.sqrt(np.abs(kernel))
    largest = math.sqrt(np.abs(kernels).max(initial=0.0)) or 1.0
    axes.imshow(sheet, cmap="RdBu", vmin=-largest, vmax=largest, interpolation="nearest")
    _bare(axes)


def _stages(blocks: Sequence[BlockKernels]) -> list[str]:
    return list(dict.fromkeys(block.stage for block in blocks))


def _draw_taps(axes: Any, taps: np.ndarray) -> None:
    axes.imshow(taps, cmap="Blues", vmin=0, interpolation="nearest")
    if taps.size <= 25:
        for (row, column), share in np.ndenumerate(taps):
            axes.text(
                column,
                row,
                f"{share:.0%}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if share > 0.55 * taps.max() else "#222222",
            )
    _bare(axes)


def _draw_shares(
    axes: Any, stages: Mapping[str, Sequence[BlockKernels]], branches: Sequence[str]
) -> None:
    blocks = [block for members in stages.values() for block in members]
    places = np.arange(len(blocks))
    above, below = np.zeros(len(blocks)), np.zeros(len(blocks))
    for number, branch in enumerate(branches):
        share = np.array([block.shares.get(branch, 0.0) for block in blocks])
        bottom = np.where(share < 0, below, above)
        color = _COLORS[number % len(_COLORS)]
        axes.bar(places, share, bottom=bottom, width=0.82, color=color, label=branch)
        above += np.maximum(share, 0)
        below += np.minimum(share, 0)
    edges = np.cumsum([len(members) for members in stages.values()])
    for edge in edges[:-1]:
        axes.axvline(edge - 0.5, color="#999999", linewidth=0.8)
    middles = edges - np.array([len(members) for members in stages.values()]) / 2 - 0.5
    axes.set_xticks(middles, stages, fontsize=8)
    axes.tick_params(axis="x", length=0)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlim(-0.6, len(blocks) - 0.4)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=_GRID)
    axes.set_ylabel("share of the fused kernel", fontsize=8, color=_TEXT)
    axes.legend(
        fontsize=8,
        frameon=False,
        ncols=min(len(branches), 5),
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        borderaxespad=0.1,
    )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _bare(axes: Any) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def table(blocks: Sequence[BlockKernels]) -> str:
    """The branches' mean shares by stage, as lines of text."""
    shares = stage_shares(blocks)
    branches = list(dict.fromkeys(name for found in shares.values() for name in found))
    rows = [("stage", "blocks", "kernel", *branches)]
    for stage, found in shares.items():
        members = [block for block in blocks if block.stage == stage]
        sizes = dict.fromkeys("x".join(map(str, block.taps.shape)) for block in members)
        cells = [f"{found[name]:.1%}" if name in found else "–" for name in branches]
        rows.append((stage, str(len(members)), ", ".join(sizes), *cells))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in (0, 2) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
