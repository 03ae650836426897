"""The size of training images by epoch."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class TrainSizes:
    """Epoch, counted from 0 -> height and width of all its training images, in pixels.

    It travels to the processes that read, so it knows nothing but numbers.

    Attributes:
      changes: (epoch, size) pairs, from which epoch on which size; epochs go up from 0.
      otherwise: the size where nothing changes.
    """

    changes: tuple[tuple[int, int], ...]
    otherwise: int

    def __call__(self, epoch: int) -> int:
        """The size in that epoch."""
        begun = [size for first, size in self.changes if first <= epoch]
        return begun[-1] if begun else self.otherwise
