"""A source whose images are all in memory."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Images (n, height, width, channels) uint8 and labels (n,) as a source."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Image and label number `index`."""
        return {"image": self.images[index], "label": np.int32(self.labels[index])}
