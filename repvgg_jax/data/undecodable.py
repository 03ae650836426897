"""Images that cannot be decoded: each is named, all are counted, too many stop the run."""

from collections.abc import Callable
from typing import Any

import numpy as np
from absl import logging

from repvgg_jax.data import decoding
from repvgg_jax.data.reading import FAILURES
from repvgg_jax.data.source import Source


class Undecodable:
    """The bad images that this process has met.

    Attributes:
      say: takes a line for every image that is met for the first time.
    """

    def __init__(self, allowed: int, say: Callable[[str], None] = logging.warning):
        """Args are `config.data.max_bad` and where lines go."""
        self.say = say
        self._allowed = allowed
        self._names: dict[tuple[str, int], str] = {}

    def take(self, source: Source, split: str, bad: np.ndarray) -> None:
        """Learns of the bad images in a batch.

        Args:
          source: where they are.
          split: `training` or `held-out`.
          bad: int64 (images, 2), for each image the first bad number and how many.

        Raises:
          ValueError: there are more than allowed; names the first of them, with the reason.
        """
        for first, count in bad[bad[:, 1] > 0].tolist():
            for number in range(first, first + count):
                self._add(source, split, number % len(source))

    def _add(self, source: Source, split: str, number: int) -> None:
        if (split, number) in self._names:
            return
        line = f"{split} image {_what_is_wrong(source, number)}"
        self._names[split, number] = line
        met = len(self._names)
        if met > self._allowed:
            first = next(iter(self._names.values()))
            others = f" (and {met - 1} more, all named above)" if met > 1 else ""
            raise ValueError(
                f"{first}{others}; config.data.max_bad={self._allowed} such images are allowed, "
                f"mend or remove it, or allow more"
            )
        place = "the next one takes its place" if split == "training" else "it is left out"
        self.say(f"{line}; {place} ({met} of at most {self._allowed} bad images)")


def _what_is_wrong(source: Source, number: int) -> str:
    """Name and reason, found by trying once more."""
    name = f"number {number}"
    try:
        example: Any = source[number]
        name = example.get("name", name)
        decoding.decode(example["encoded"])
    except FAILURES as error:
        return f"{name} cannot be decoded: {error}"
    return f"{name} could not be decoded, although now it can: look for a failing disk"
