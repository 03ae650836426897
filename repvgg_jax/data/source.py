"""A source: random access to labelled images, wherever they are."""

from collections.abc import Mapping
from typing import Any, Protocol


class Source(Protocol):
    """Random access to labelled images; goes to worker processes, so it can be pickled.

    `source[i]` is `{"image": uint8 (height, width, channels), "label": int}` or
    `{"encoded": bytes, "label": int, "name": str}`: all images of a source are of one kind.
    """

    def __len__(self) -> int:
        """How many images there are."""
        ...

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Image and label number `index`.

        Raises:
          OSError: it cannot be read.
        """
        ...
