"""From the number of an image to its place in a batch; runs in the workers.

An image that cannot be decoded never raises here: it is reported beside the example, and the main
process, which counts over all workers, decides (`BadImages`).
"""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from repvgg_jax import text
from repvgg_jax.data.images import CenterCrop, RandomResizedCrop, UndecodableError, decode
from repvgg_jax.data.sources import Source

logger = logging.getLogger(__name__)

# Reading a file or a record can fail as decoding can, and the answer is the same.
FAILURES = (UndecodableError, OSError)

Element = tuple[dict[str, Any], np.ndarray]
"""An example, `{"image", "label", …}`, and the bad images met on the way to it: int64 (2,), the
number of the first and how many. A batch of elements has one more axis in front of each."""


@dataclasses.dataclass(frozen=True)
class TrainSizes:
    """The size of training images by epoch. Picklable, as it goes to the workers.

    Attributes:
      changes: (epoch, size) pairs, counted from 0 and ascending: the size from that epoch on.
      otherwise: the size before the first change.
    """

    changes: tuple[tuple[int, int], ...]
    otherwise: int

    def __call__(self, epoch: int) -> int:
        """Height and width of all images of that epoch, in pixels."""
        begun = [size for first, size in self.changes if first <= epoch]
        return begun[-1] if begun else self.otherwise


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Training images: (position in the endless stream, image number) -> element.

    Its result is a function of (seed, pass over the data, image number) and of the size alone.

    Attributes:
      source: the images.
      crop: random crop of an image; None takes it as it is.
      size_at: epoch -> height and width, in pixels.
      images_per_epoch: of all processes together: whole batches only.
      seed: of the crops.
      attempts: at an image and those after it, until one can be decoded.
    """

    source: Source
    crop: RandomResizedCrop | None
    size_at: Callable[[int], int]
    images_per_epoch: int
    seed: int
    attempts: int

    def __call__(self, position: int, number: int) -> Element:
        """`image` uint8 and `label` int32; the next image of the source replaces a bad one."""
        count = len(self.source)
        size = self.size_at(position // self.images_per_epoch)
        for failed in range(self.attempts):
            try:
                # A random stream for every image in every pass over the data.
                key = np.random.Philox(
                    key=[self.seed, 0], counter=[0, 0, position // count, number]
                )
                example = self.source[(number + failed) % count]
                if self.crop is None:
                    image = example["image"]
                else:
                    image = self.crop(example, size, np.random.Generator(key))
                return _element(image, example["label"], bad=(number, failed))
            except FAILURES:
                continue
        return _element(np.zeros((size, size, 3), np.uint8), 0, bad=(number, self.attempts))


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """Validation images: image number -> element; beyond the last image there are blanks.

    Attributes:
      source: the images.
      crop: center crop of an image; None takes it as it is.
      shape: (height, width, channels).
    """

    source: Source
    crop: CenterCrop | None
    shape: tuple[int, int, int]

    def __call__(self, number: int) -> Element:
        """As `TrainTransform`, and `mask`, False for blanks and for images that are bad."""
        blank = np.zeros(self.shape, np.uint8)
        if number >= len(self.source):
            return _element(blank, 0, bad=(0, 0), mask=np.bool_(False))
        try:
            example = self.source[number]
            image = example["image"] if self.crop is None else self.crop(example)
        except FAILURES:
            return _element(blank, 0, bad=(number, 1), mask=np.bool_(False))
        return _element(image, example["label"], bad=(number, 0), mask=np.bool_(True))


def _element(image: np.ndarray, label: int, *, bad: tuple[int, int], **others: Any) -> Element:
    return {"image": image, "label": np.int32(label), **others}, np.array(bad, np.int64)


class BadImages:
    """The images that this process could not read or decode: each is logged once, all count.

    Attributes:
      allowed: `config.data.max_bad`; one more raises.
    """

    def __init__(self, allowed: int = 0):
        self.allowed = allowed
        self._met: dict[tuple[str, int], str] = {}

    def report(self, source: Source, split: str, bad: np.ndarray) -> None:
        """Records the bad images of a batch.

        Args:
          source: where they are.
          split: `training` or `validation`.
          bad: int64 (images, 2), see `Element`.

        Raises:
          ValueError: more than are allowed; names the first of them, with the reason.
        """
        for first, count in bad[bad[:, 1] > 0].tolist():
            for number in range(first, first + count):
                self._add(source, split, number % len(source))

    def _add(self, source: Source, split: str, number: int) -> None:
        if (split, number) in self._met:
            return
        line = f"{split} image {_why(source, number)}"
        self._met[split, number] = line
        count = len(self._met)
        if count > self.allowed:
            first = next(iter(self._met.values()))
            others = f" (and {count - 1} more, all named above)" if count > 1 else ""
            raise ValueError(
                f"{first}{others}; config.data.max_bad={self.allowed} such images are allowed, "
                f"repair or remove it, or allow more"
            )
        what = "the next image takes its place" if split == "training" else "it is left out"
        logger.warning(
            "%s; %s (%d of at most %s)",
            line,
            what,
            count,
            text.plural(self.allowed, "bad image"),
        )


def _why(source: Source, number: int) -> str:
    """Name and reason, found by trying once more."""
    name = f"number {number}"
    try:
        example: Any = source[number]
        name = example.get("name", name)
        decode(example["encoded"])
    except FAILURES as error:
        return f"{name} cannot be decoded: {text.one_line(error, 500)}"
    return f"{name} could not be decoded, although now it can: look for a failing disk"
