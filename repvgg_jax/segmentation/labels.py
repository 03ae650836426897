"""Labels of pixels: the one that does not count, the classes of Cityscapes, colors of classes."""

import dataclasses
from collections.abc import Sequence

import numpy as np

IGNORE = 255
"""The label of pixels without a class, which count neither in the loss nor in metrics."""


@dataclasses.dataclass(frozen=True)
class CityscapesClass:
    """A class of Cityscapes that is evaluated.

    Attributes:
      name: as in the official table.
      label_id: in `*_labelIds.png`.
      color: red, green and blue, 0 … 255.
    """

    name: str
    label_id: int
    color: tuple[int, int, int]


CITYSCAPES = (
    CityscapesClass("road", 7, (128, 64, 128)),
    CityscapesClass("sidewalk", 8, (244, 35, 232)),
    CityscapesClass("building", 11, (70, 70, 70)),
    CityscapesClass("wall", 12, (102, 102, 156)),
    CityscapesClass("fence", 13, (190, 153, 153)),
    CityscapesClass("pole", 17, (153, 153, 153)),
    CityscapesClass("traffic light", 19, (250, 170, 30)),
    CityscapesClass("traffic sign", 20, (220, 220, 0)),
    CityscapesClass("vegetation", 21, (107, 142, 35)),
    CityscapesClass("terrain", 22, (152, 251, 152)),
    CityscapesClass("sky", 23, (70, 130, 180)),
    CityscapesClass("person", 24, (220, 20, 60)),
    CityscapesClass("rider", 25, (255, 0, 0)),
    CityscapesClass("car", 26, (0, 0, 142)),
    CityscapesClass("truck", 27, (0, 0, 70)),
    CityscapesClass("bus", 28, (0, 60, 100)),
    CityscapesClass("train", 31, (0, 80, 100)),
    CityscapesClass("motorcycle", 32, (0, 0, 230)),
    CityscapesClass("bicycle", 33, (119, 11, 32)),
)
"""The evaluated classes in the order of their train ids (cityscapesscripts, helpers/labels.py)."""


def class_colors(classes: Sequence[str]) -> np.ndarray:
    """A color for every class, uint8 (classes, 3): red, green and blue.

    Classes of Cityscapes have its official colors. Others have those of `distinct_colors`, of
    which the first, black, is for a class called `background` alone.

    Args:
      classes: names by label.
    """
    if tuple(classes) == tuple(entry.name for entry in CITYSCAPES):
        return np.array([entry.color for entry in CITYSCAPES], np.uint8)
    if classes and classes[0].lower() == "background":
        return distinct_colors(len(classes))
    return distinct_colors(len(classes) + 1)[1:]


def distinct_colors(count: int) -> np.ndarray:
    """Distinct colors, uint8 (count, 3); the first is black.

    The bits of a number, the lowest three first, become the highest bits of red, green and blue,
    as in the masks of PASCAL VOC.
    """
    number = np.arange(count)
    colors = np.zeros((count, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            set_bit = (number >> (3 * bit + channel)) & 1
            colors[:, channel] |= (set_bit << (7 - bit)).astype(np.uint8)
    return colors
