"""The operations that a policy chooses from, and what was chosen."""

import enum
from typing import NamedTuple

import jax


class Kind(enum.IntEnum):
    """One operation on one image; the comment says what its argument is."""

    IDENTITY = 0
    AUTO_CONTRAST = 1
    EQUALIZE = 2
    INVERT = 3
    POSTERIZE = 4  # bits that are kept, 0 … 8
    SOLARIZE = 5  # values from here on are inverted, 0 … 256
    SOLARIZE_ADD = 6  # is added to values below 128
    BRIGHTNESS = 7  # factor, 1 changes nothing, as in the next three
    CONTRAST = 8
    COLOR = 9
    SHARPNESS = 10
    HUE = 11  # share of the colour circle, -0.5 … 0.5
    SHEAR_X = 12  # columns per row
    SHEAR_Y = 13  # rows per column
    TRANSLATE_X = 14  # share of the width
    TRANSLATE_Y = 15  # share of the height
    ROTATE = 16  # degrees, counterclockwise
    CUTOUT = 17  # side of the square in pixels


class Choice(NamedTuple):
    """What happens to each image of a batch; every field has the shape (images,).

    Attributes:
      kind: int32, values of `Kind`.
      argument: float32, see `Kind`.
      cubic: bool: geometric operations resample bicubically instead of bilinearly.
      row: float32 in [0, 1): where the middle of a cut-out is.
      column: likewise.
    """

    kind: jax.Array
    argument: jax.Array
    cubic: jax.Array
    row: jax.Array
    column: jax.Array
