"""From an image's number to what a batch holds of it; runs in the workers.

An image that cannot be decoded never raises here: the example says so in `bad`, and the main
process, which counts over all workers, decides (`undecodable.py`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from repvgg_jax.data.decoding import UndecodableError
from repvgg_jax.data.source import Source
from repvgg_jax.data.views import CentreCrop, RandomResizedCrop

# Reading a file or a record can fail like decoding can, and the answer is the same.
FAILURES = (UndecodableError, OSError)


@dataclasses.dataclass(frozen=True)
class TrainReader:
    """Reads training images: position in the endless stream and image number -> example.

    What it gives is a function of (seed, epoch, image number) and of the size alone.

    Attributes:
      source: the images.
      crop: the part of an image to show; None shows it as it is.
      size_at: number of the stream's batch -> height and width to give, in pixels.
      batch_size: of all processes together.
      seed: of the crops.
      attempts: at an image and those after it, until one can be decoded.
    """

    source: Source
    crop: RandomResizedCrop | None
    size_at: Callable[[int], int]
    batch_size: int
    seed: int
    attempts: int

    def __call__(self, position: int, number: int) -> dict[str, Any]:
        """`image` uint8, `label` int32, `bad` int64 (2,): the first bad image, and how many.

        In the place of an image that cannot be decoded comes the next one of the source.
        """
        count = len(self.source)
        size = self.size_at(position // self.batch_size)
        for failed in range(self.attempts):
            try:
                # A stream of its own for every image in every epoch.
                key = np.random.Philox(
                    key=[self.seed, 0], counter=[0, 0, position // count, number]
                )
                example = self.source[(number + failed) % count]
                if self.crop is None:
                    image = example["image"]
                else:
                    image = self.crop(example, size, np.random.Generator(key))
                return _example(image, example["label"], bad=(number, failed))
            except FAILURES:
                continue
        return _example(np.zeros((size, size, 3), np.uint8), 0, bad=(number, self.attempts))


@dataclasses.dataclass(frozen=True)
class EvalReader:
    """Reads held-out images by number; beyond the last there are blanks.

    Attributes:
      source: the images.
      crop: what to show of an image; None shows it as it is.
      shape: (height, width, channels) to give.
    """

    source: Source
    crop: CentreCrop | None
    shape: tuple[int, int, int]

    def __call__(self, number: int) -> dict[str, Any]:
        """As `TrainReader`, and `mask`, False for blanks and for what cannot be decoded."""
        blank = np.zeros(self.shape, np.uint8)
        if number >= len(self.source):
            return {**_example(blank, 0, bad=(0, 0)), "mask": np.bool_(False)}
        try:
            example = self.source[number]
            image = example["image"] if self.crop is None else self.crop(example)
        except FAILURES:
            return {**_example(blank, 0, bad=(number, 1)), "mask": np.bool_(False)}
        return {**_example(image, example["label"], bad=(number, 0)), "mask": np.bool_(True)}


def _example(image: np.ndarray, label: int, *, bad: tuple[int, int]) -> dict[str, Any]:
    return {"image": image, "label": np.int32(label), "bad": np.array(bad, np.int64)}
