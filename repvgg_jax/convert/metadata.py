"""metadata.json of a deploy directory: what a network is, what it classifies, and its images."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Self

from repvgg_jax import files
from repvgg_jax.activations import OR_NONE
from repvgg_jax.normalize import Normalize
from repvgg_jax.segmentation.network import Segmenter
from repvgg_jax.segmentation.resnet import RESNETS
from repvgg_jax.text import one_line
from repvgg_jax.typed import typed
from repvgg_jax.variants import Variant

KIND = "repvgg_jax deployment"
FORMAT = 2
"""Version of the directory: proof.json has a digest of itself."""

_MOST = 10_000_000  # classes, or pixels of a side: anything above is damage


@dataclasses.dataclass(frozen=True)
class Crop:
    """How evaluation turned image files into pixels; see `config.data`.

    Attributes:
      fraction: of the side that just covers the crop, that remains.
      background: color behind transparent pixels.
      white: what becomes 255 in images of more than 8 bits; 0: their type's largest.
    """

    fraction: float = 0.875
    background: tuple[int, int, int] = (255, 255, 255)
    white: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction={self.fraction} must be above 0, up to 1")
        if not all(0 <= value <= 255 for value in self.background) or not self.white >= 0:
            raise ValueError(f"background={self.background} or white={self.white} is no color")


@dataclasses.dataclass(frozen=True)
class SegmenterForm:
    """What a segmenter adds to its backbone, as in `create_segmenter`.

    Attributes:
      backbone: its name.
      fast: which layers are dilated.
      output_stride: pixels of an image per pixel of the last map.
      bins: windows of the pyramid.
      width: channels of the decoder.
    """

    backbone: str
    fast: bool
    output_stride: int
    bins: tuple[int, ...]
    width: int

    @classmethod
    def of(cls, model: Segmenter) -> Self:
        """The form of a network."""
        return cls(model.variant.name, model.fast, model.output_stride, model.bins, model.width)


@dataclasses.dataclass(frozen=True)
class Metadata:
    """The fields of `metadata.json` that using a network takes; each is checked.

    Attributes:
      variant: the architecture; None for a segmenter on a ResNet.
      num_classes: 0 for pooled features.
      activation: of its blocks, a name in `repvgg_jax.activations`.
      classes: names, by label; empty if unknown.
      image_shape: (height, width, channels) of its images.
      mean: per channel or a single one, of pixels scaled to 0 … 1.
      std: the same.
      with_preprocessing: whether its graphs take uint8 images.
      format: version of the directory; 2 has a digest of `proof.json`.
      segmentation: None for a classifier.
      crop: how its images were read; earlier versions do not say.
    """

    variant: Variant | None
    num_classes: int
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    activation: str | None = "relu"
    with_preprocessing: bool = False
    format: int = 1
    segmentation: SegmenterForm | None = None
    crop: Crop = Crop()

    def __post_init__(self) -> None:
        if not 1 <= self.format <= FORMAT:
            raise ValueError(
                f"format={self.format} is of a later version, this one reads up to {FORMAT}"
            )
        if self.variant is None and (
            self.segmentation is None or self.segmentation.backbone not in RESNETS
        ):
            raise ValueError("variant is missing")
        if not 0 <= self.num_classes <= _MOST:
            raise ValueError(f"num_classes={self.num_classes} must be from 0 to {_MOST:,}")
        if self.activation not in OR_NONE:
            known = ", ".join(map(str, OR_NONE))
            raise ValueError(f"activation={one_line(self.activation, 60)!r} must be one of {known}")
        if self.classes and len(self.classes) != self.num_classes:
            raise ValueError(f"{len(self.classes)} classes have names, of {self.num_classes}")
        if not all(0 < size <= _MOST for size in self.image_shape):
            raise ValueError(f"image_shape={list(self.image_shape)} must be from 1 to {_MOST:,}")
        if len(Normalize(self.mean, self.std).mean) not in (1, self.image_shape[-1]):
            raise ValueError(f"{len(self.mean)} means for {self.image_shape[-1]} channels")

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Reads `metadata.json`; later versions may add fields.

        Raises:
          ValueError: a field is missing, or its type or value is not allowed.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        known = {key: value for key, value in content.items() if key in fields}
        return typed(cls, known, "metadata")


def is_deployment(path: pathlib.Path) -> bool:
    """Whether `convert.py` wrote this directory."""
    try:
        content = files.read_json(path / "metadata.json")
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("kind") == KIND
