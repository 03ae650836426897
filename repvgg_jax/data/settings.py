"""Settings of the data and of augmentation: `config.data` and `config.augment`."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from repvgg_jax.settings import Section, setting

POLICIES = ("none", "autoaugment", "randaugment", "raug15")
RESAMPLINGS = ("bilinear", "bicubic", "random")
ERASE_MODES = ("pixel", "color", "zero")


Size = int | tuple[int, int]
"""Height and width of images in pixels, or one number for squares."""


def height_width(size: Size) -> tuple[int, int]:
    """Height and width in pixels."""
    return size if isinstance(size, tuple) else (size, size)


def parse_size(name: str, value: Any, least: int = 0) -> Size:
    """A size as it is stored: one number for squares, else (height, width).

    Raises:
      ValueError: something else; says it of `name`.
    """
    sides = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
    if len(sides) != 2 or any(type(side) is not int or side < least for side in sides):
        raise ValueError(
            f"{name}={value!r} must be {least} or more, in pixels: one number, or (height, width), "
            f"e.g. (128, 256)"
        )
    if 0 in sides and any(sides):
        raise ValueError(f"{name}={value!r} must not be 0 for one side only")
    return sides[0] if sides[0] == sides[1] else sides


def parse_background(values: Sequence[Any]) -> tuple[int, int, int]:
    """A color from integers, or from their decimal digits.

    Raises:
      ValueError: not three values from 0 to 255.
    """
    color = [int(value) if str(value).isdecimal() else -1 for value in values]
    if len(color) != 3 or not all(0 <= value <= 255 for value in color):
        raise ValueError(
            f"config.data.background={tuple(values)} must be three integers, 0 … 255: red, green, "
            f"blue"
        )
    return color[0], color[1], color[2]


@dataclasses.dataclass(frozen=True)
class MaskSettings(Section, path="config.data.masks"):
    """Random crops of images with a class per pixel, image and labels together.

    The defaults are those of hszhao/semseg. With `train_size` 0 there are no crops, and none of
    this is done.
    """

    scale: tuple[float, float] = setting(
        (0.5, 2.0), "factor of the image's size, smallest and largest"
    )
    rotation: float = setting(10.0, "degrees, to each side", least=0, most=180)
    rotate: float = setting(0.5, "probability of a rotation", least=0, most=1)
    blur: float = setting(0.5, "probability of a 5x5 Gaussian blur", least=0, most=1)
    flip: float = setting(0.5, "probability of a mirror image", least=0, most=1)

    def check(self) -> None:
        """Checks the scales."""
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(
                f"config.data.masks.scale={self.scale} must be two factors above 0, the smaller "
                "first, e.g. (0.5, 2.0)"
            )


@dataclasses.dataclass(frozen=True)
class DataSettings(Section, path="config.data"):
    """Images: where they come from, which part is shown, at which size; see docs/data.md."""

    source: str = setting(
        "digits",
        "digits, clutter, fake, tfds:NAME, folder:DIRECTORY or records:DIRECTORY; with a class per "
        "pixel: scenes, cityscapes:DIRECTORY, masks:DIRECTORY, records:DIRECTORY or, with mask, "
        "tfds:NAME",
    )
    directory: str = setting("", "where TFDS prepared tfds:NAME; empty: its own default")
    train_split: str = setting(
        "train", "split of tfds:NAME or records:, or folder of folder:, to train on"
    )
    eval_split: str = setting(
        "validation",
        "the same to evaluate on; of folder: and records:, val if there is no validation",
    )
    holdout: float = setting(
        0.0,
        "share of each class's training images to evaluate on instead of eval_split; 0: none",
        least=0,
        below=1,
    )
    sampling: str = setting(
        "uniform",
        "of training images; balanced: every class equally often, however rare it is",
        choices=("uniform", "balanced"),
    )
    mask: str = setting(
        "",
        "feature of tfds:NAME that holds a class per pixel, e.g. segmentation_mask; empty: a class "
        "per image",
    )
    num_classes: int = setting(0, "number of classes to expect; 0: any", least=0)
    allow_empty: bool = setting(
        False, "classes of a folder tree may lack images; they are named, and keep their numbers"
    )
    train_size: int | tuple[int, int] = setting(
        0,
        "height and width, pixels: one number or (height, width); 0: as they are, for digits, "
        "clutter, fake and scenes only",
        parse=parse_size,
        any_type=True,
    )
    sizes: tuple[tuple[int, Size], ...] = setting(
        (), "pairs (epoch, train size) from which it changes: ((0, 128), (60, 224))"
    )
    eval_size: int | tuple[int, int] = setting(
        0,
        "height and width in evaluation, pixels, as train_size; 0: train_size",
        parse=parse_size,
        any_type=True,
    )
    eval_crop: float = setting(
        0.875, "fraction of the resized image's short side that evaluation sees", above=0, most=1
    )
    crop_scale: tuple[float, float] = setting(
        (0.08, 1.0), "fraction of the image's area in a random training crop, smallest and largest"
    )
    crop_ratio: tuple[float, float] = setting(
        (3 / 4, 4 / 3),
        "width over height of a random training crop, relative to train_size's; two limits",
    )
    workers: int = setting(0, "reading processes per process of the run; 0: threads", least=0)
    threads: int = setting(1, "reading threads in each of them", least=1)
    max_bad: int = setting(0, "undecodable images allowed; one more stops the run", least=0)
    max_pixels: int = setting(
        178_956_970, "height times width of the largest image that is decoded", least=1
    )
    background: tuple[int, int, int] = setting(
        (255, 255, 255), "color behind transparent pixels: red, green, blue, 0 … 255"
    )
    white: float = setting(
        0.0,
        "value that becomes 255 in images of more than 8 bits; 0: 65535 in those of 16 bits, 1 in "
        "those of floats",
        least=0,
    )
    masks: MaskSettings = MaskSettings()
    mean: tuple[float, ...] = setting(
        (0.485, 0.456, 0.406), "mean per channel of pixels on the scale 0 … 1"
    )
    std: tuple[float, ...] = setting(
        (0.229, 0.224, 0.225), "standard deviation per channel of pixels on the scale 0 … 1"
    )

    @property
    def size_of_evaluation(self) -> int | tuple[int, int]:
        """Size of validation images: `eval_size`, or without one `train_size`; 0: as they are."""
        return self.eval_size or self.train_size

    def check(self) -> None:
        """Checks crops, standard deviations, the background and sizes."""
        for name in ("train_size", "eval_size"):
            size = parse_size(f"config.data.{name}", getattr(self, name))
            object.__setattr__(self, name, size)
        parse_background(self.background)
        if any(value <= 0 for value in self.std):
            raise ValueError(f"config.data.std={self.std} must be above 0")
        for name, most in (("crop_scale", 1.0), ("crop_ratio", float("inf"))):
            values = getattr(self, name)
            if len(values) != 2 or not 0 < values[0] <= values[1] <= most:
                raise ValueError(
                    f"config.data.{name}={values} must be two numbers, the smaller first, above 0"
                    + (f" and at most {most:g}" if most == 1 else "")
                )
        self._check_sizes()

    def _check_sizes(self) -> None:
        example = "e.g. ((0, 128), (60, 192), (90, 224))"
        if not all(_is_change(change) for change in self.sizes):
            raise ValueError(
                f"config.data.sizes={self.sizes} must hold pairs of an epoch and a size above 0 "
                f"in pixels, {example}"
            )
        if not self.sizes:
            return
        if self.sizes[0][0] != 0 or any(a[0] >= b[0] for a, b in itertools.pairwise(self.sizes)):
            raise ValueError(
                f"config.data.sizes={self.sizes} must start with epoch 0, with increasing epochs, "
                f"{example}"
            )
        if not self.train_size:
            raise ValueError(
                f"config.data.sizes={self.sizes} needs config.data.train_size above 0, which "
                f"evaluation follows, e.g. {self.sizes[-1][1]}"
            )


def _is_change(change: Any) -> bool:
    try:
        epoch, size = change
        parse_size("", size, least=1)
        return type(epoch) is int
    except (TypeError, ValueError):
        return False


@dataclasses.dataclass(frozen=True)
class RandAugmentSettings(Section, path="config.augment.randaugment"):
    """RandAugment; the defaults are timm's rand-m9-mstd0.5-inc1."""

    ops: int = setting(2, "operations per image", least=1, most=16)
    magnitude: float = setting(9.0, "mean level, 0 … 10", least=0, most=10)
    deviation: float = setting(0.5, "standard deviation of the level", least=0)
    increasing: bool = setting(True, "a higher level always changes more")
    probability: float = setting(0.5, "of each operation", least=0, most=1)


@dataclasses.dataclass(frozen=True)
class JitterSettings(Section, path="config.augment.jitter"):
    """Color jitter; factors are drawn from 1 ± the setting."""

    brightness: float = setting(0.0, "largest change of the factor", least=0)
    contrast: float = setting(0.0, "largest change of the factor", least=0)
    saturation: float = setting(0.0, "largest change of the factor", least=0)
    hue: float = setting(0.0, "largest change, fraction of the color circle", least=0, most=0.5)


@dataclasses.dataclass(frozen=True)
class AffineSettings(Section, path="config.augment.affine"):
    """Random affine transformations of small images; amounts are drawn from 0 ± the setting."""

    rotation: float = setting(0.0, "degrees")
    scale: float = setting(0.0, "relative change of height and of width")
    shear: float = setting(0.0, "columns per row")
    shift: float = setting(0.0, "fraction of the image's size")


def _parse_erase_mode(name: str, value: Any) -> Any:
    return "color" if value == "colour" else value  # its spelling in version 0.1.0


@dataclasses.dataclass(frozen=True)
class EraseSettings(Section, path="config.augment.erase"):
    """Random erasing, one rectangle per image."""

    probability: float = setting(0.0, "that an image loses a rectangle", least=0, most=1)
    mode: str = setting(
        "pixel",
        "what replaces it: normal noise per pixel, one random color, or zero, the mean color",
        choices=ERASE_MODES,
        parse=_parse_erase_mode,
    )
    least_area: float = setting(0.02, "smallest area, fraction of the image", least=0, most=1)
    most_area: float = setting(1 / 3, "largest area, fraction of the image", least=0, most=1)
    least_aspect: float = setting(
        0.3, "smallest height over width; the largest is its inverse", above=0, most=1
    )

    def check(self) -> None:
        """Checks the two areas against each other."""
        if self.least_area > self.most_area:
            raise ValueError(
                f"config.augment.erase.least_area={self.least_area} must be at most "
                f"config.augment.erase.most_area={self.most_area}"
            )


@dataclasses.dataclass(frozen=True)
class AugmentSettings(Section, path="config.augment"):
    """Augmentation on the device; see docs/augmentation.md."""

    flip: float = setting(0.0, "probability of a mirror image", least=0, most=1)
    policy: str = setting("none", "of operations per image", choices=POLICIES)
    resampling: str = setting("bilinear", "of autoaugment and randaugment", choices=RESAMPLINGS)
    randaugment: RandAugmentSettings = RandAugmentSettings()
    jitter: JitterSettings = JitterSettings()
    affine: AffineSettings = AffineSettings()
    erase: EraseSettings = EraseSettings()
    mixup: float = setting(0.0, "alpha; 0: off. With cutmix, a coin decides per group", least=0)
    cutmix: float = setting(0.0, "alpha; 0: off", least=0)
    mix_group: int = setting(
        0, "images that are mixed among themselves; 0: the whole batch", least=0
    )
