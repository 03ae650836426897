"""Masks as pictures: overlays, and a grid that shows what a network does."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from repvgg_jax.segmentation.labels import IGNORE, class_colors
from repvgg_jax.text import encodable

OPACITY = 0.6
"""Opacity of the colors over an image."""


def colorize(mask: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """A mask in the colors of its classes, uint8 (height, width, 3); ignored pixels are white.

    Args:
      mask: classes or 255, integers (height, width).
      colors: uint8 (classes, 3).
    """
    table = np.full((256, 3), 255, np.uint8)
    table[: len(colors)] = colors
    table[IGNORE] = 255
    return table[np.asarray(mask, np.uint8)]


def overlay(image: np.ndarray, mask: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """An image with the colors of a mask over it; ignored pixels and black classes keep the image.

    Args:
      image: uint8 (height, width, 3), or 1 channel.
      mask: as in `colorize`.
      colors: uint8 (classes, 3).
    """
    image = np.broadcast_to(image, (*mask.shape, 3))
    colored = colorize(mask, colors)
    mixed = ((1 - OPACITY) * image + OPACITY * colored).round().astype(np.uint8)
    kept = (mask == IGNORE) | ~colored.any(axis=-1)
    return np.where(kept[..., None], image, mixed)


def grid(
    images: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    predictions: Sequence[np.ndarray],
    classes: Sequence[str],
    colors: np.ndarray | None = None,
) -> Any:
    """A figure with a row per image: image, truth, prediction, and wrong pixels in red.

    Args:
      images: uint8 (height, width, 3) or 1 channel each.
      labels: classes or 255, integers (height, width) each.
      predictions: classes, integers (height, width) each.
      classes: names by label, shown with their colors.
      colors: uint8 (classes, 3); None for `class_colors`.

    Returns:
      A `matplotlib.figure.Figure`.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colors = class_colors(classes) if colors is None else colors
    columns = ("image", "truth", "prediction", "error")
    # Wide enough for four columns; the legend below takes a line per five classes.
    figure = Figure(figsize=(10, 2.6 * len(images) + 0.25 * -(-len(classes) // 5)), dpi=110)
    figure.set_layout_engine("constrained")
    axes = figure.subplots(len(images), len(columns), squeeze=False)
    rows = zip(axes, images, labels, predictions, strict=True)
    for row, image, label, prediction in rows:
        wrong = (label != IGNORE) & (label != prediction)
        error = np.where(wrong, 0, IGNORE).astype(np.uint8)
        panels = (
            np.broadcast_to(image, (*label.shape, 3)),
            colorize(label, colors),
            colorize(prediction, colors),
            overlay(image, error, np.array([[255, 0, 0]], np.uint8)),
        )
        for panel, shown in zip(row, panels, strict=True):
            panel.imshow(shown, interpolation="nearest")
            panel.set_axis_off()
    for panel, title in zip(axes[0], columns, strict=True):
        panel.set_title(title, fontsize=10)
    handles = [
        Patch(facecolor=color / 255, edgecolor="#888888", label=encodable(name))
        for name, color in zip(classes, colors, strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return figure
