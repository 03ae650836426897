"""What is done with each image in the workers.

An image that cannot be decoded never raises here: it is reported with the example, and the main
process, which counts over all workers, decides (`repvgg_jax.data.dataset.BadImages`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from repvgg_jax.data.decoding import UndecodableError
from repvgg_jax.data.images import CenterCrop, RandomResizedCrop
from repvgg_jax.data.joint_crop import JointCrop, WholeImage
from repvgg_jax.data.settings import Size, height_width
from repvgg_jax.data.sources import Source
from repvgg_jax.segmentation.labels import IGNORE

# Reading a file or a record can fail as decoding can, and the answer is the same.
FAILURES = (UndecodableError, OSError)

TrainCrop = RandomResizedCrop | JointCrop
EvalCrop = CenterCrop | WholeImage

Element = tuple[dict[str, Any], np.ndarray]
"""An example, `{"image", "label", …}`, and what is to be reported of it: int64 (3,), the number of
the first bad image met on the way to it, how many there were, and 1 if the file that is shown holds
further frames. A batch of elements has one more axis in front of each."""


@dataclasses.dataclass(frozen=True)
class TrainSizes:
    """The size of training images by epoch. Picklable, as it goes to the workers.

    Attributes:
      changes: (epoch, size) pairs, counted from 0 and ascending: the size from that epoch on.
      otherwise: the size before the first change.
    """

    changes: tuple[tuple[int, Size], ...]
    otherwise: Size

    def __call__(self, epoch: int) -> tuple[int, int]:
        """Height and width of all images of that epoch, in pixels."""
        begun = [size for first, size in self.changes if first <= epoch]
        return height_width(begun[-1] if begun else self.otherwise)


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Training images: (position in the endless stream, draw) -> element.

    Its result is a function of the seed, of the draw, which is (image number, times it was drawn
    before), and of the size alone.

    Attributes:
      source: the images.
      crop: random crop of an image; None takes it as it is.
      size_at: epoch -> height and width, in pixels.
      images_per_epoch: of all processes together: whole batches only.
      seed: of the crops.
      attempts: at an image and those after it, until one can be decoded.
      masks: whether there is a label per pixel.
    """

    source: Source
    crop: TrainCrop | None
    size_at: Callable[[int], tuple[int, int]]
    images_per_epoch: int
    seed: int
    attempts: int
    masks: bool = False

    def __call__(self, position: int, draw: tuple[int, int]) -> Element:
        """`image` uint8, `label` int32 or a mask; the next image replaces a bad one."""
        count, (number, before) = len(self.source), draw
        size = self.size_at(position // self.images_per_epoch)
        for failed in range(self.attempts):
            try:
                # A random stream for every image, every time that it is drawn.
                key = np.random.Philox(key=[self.seed, 0], counter=[0, 0, before, number])
                example = self.source[(number + failed) % count]
                image, label = _cropped(example, self.crop, size, np.random.Generator(key))
                return _element(image, label, (number, failed, _has_frames(example, self.crop)))
            except FAILURES:
                continue
        blank = np.zeros((*size, 3), np.uint8)
        return _element(blank, _no_label(blank, self.masks), (number, self.attempts, 0))


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """Validation images: image number -> element; beyond the last image there are blanks.

    Attributes:
      source: the images.
      crop: center crop of an image; None takes it as it is.
      shape: (height, width, channels).
      masks: whether there is a label per pixel.
    """

    source: Source
    crop: EvalCrop | None
    shape: tuple[int, int, int]
    masks: bool = False

    def __call__(self, number: int) -> Element:
        """Like `TrainTransform`, with `mask`: False for blanks and for images that are bad."""
        blank = np.zeros(self.shape, np.uint8)
        label = _no_label(blank, self.masks)
        if number >= len(self.source):
            return _element(blank, label, (0, 0, 0), mask=np.bool_(False))
        try:
            example = self.source[number]
            image, label = _cropped(example, self.crop)
            found = (number, 0, _has_frames(example, self.crop))
        except FAILURES:
            return _element(blank, label, (number, 1, 0), mask=np.bool_(False))
        return _element(image, label, found, mask=np.bool_(True))


def _cropped(example: Mapping[str, Any], crop: Any, *how: Any) -> tuple[np.ndarray, Any]:
    """The image that a crop makes of an example, and its label; None takes it as it is."""
    made = example["image"] if crop is None else crop(example, *how)
    return made if isinstance(made, tuple) else (made, example["label"])


def _no_label(image: np.ndarray, masks: bool) -> Any:
    """The label of an image that does not count."""
    return np.full(image.shape[:2], IGNORE, np.uint8) if masks else 0


def _has_frames(example: Mapping[str, Any], crop: TrainCrop | EvalCrop | None) -> int:
    encoded = example.get("encoded")
    if encoded is None or not isinstance(crop, (RandomResizedCrop, CenterCrop)):
        return 0
    return int(crop.decoder.is_animated(encoded))


def _element(image: np.ndarray, label: Any, report: tuple[int, int, int], **others: Any) -> Element:
    label = label if isinstance(label, np.ndarray) else np.int32(label)
    return {"image": image, "label": label, **others}, np.array(report, np.int64)
