"""Evaluation of whole images: in one pass or in overlapping windows, mirrored, at several scales.

The protocols are those that results on Cityscapes are reported with. Everything below is one
compiled program per image size; windows are visited by a loop inside it.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from repvgg_jax.segmentation.resize import resize_bilinear

Network = Callable[[jax.Array], jax.Array]
"""Normalized images (n, height, width, channels) to logits (n, height, width, classes)."""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How class scores of an image are computed.

    Attributes:
      window: height and width of the windows, in pixels; None for the whole image at once.
      stride: pixels from one window to the next; the last one is moved back to the image's edge.
        None for two thirds of a window.
      flip: average with the mirrored image.
      scales: of the image; the scores of all are averaged at its own size.
      average: what is averaged, `probabilities` or `logits`.
      absent: what a class that occurs nowhere counts in the mean IoU; None leaves it out.

    Raises:
      ValueError: numbers that no evaluation has.
    """

    window: int | None = None
    stride: int | None = None
    flip: bool = False
    scales: tuple[float, ...] = (1.0,)
    average: Literal["probabilities", "logits"] = "probabilities"
    absent: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple(self.scales))
        if self.window is not None and not 0 < self.step <= self.window:
            raise ValueError(
                f"windows of {self.window} pixels every {self.step}: both must be positive, and "
                "the stride at most a window"
            )
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"scales={self.scales} must be one or more positive factors")
        if self.average not in ("probabilities", "logits"):
            raise ValueError(f"average={self.average!r} must be 'probabilities' or 'logits'")

    @property
    def step(self) -> int:
        """Pixels from one window to the next."""
        assert self.window is not None
        return math.ceil(self.window * 2 / 3) if self.stride is None else self.stride

    def starts(self, length: int) -> tuple[int, ...]:
        """Where windows begin along an axis of that many pixels, at least a window."""
        assert self.window is not None
        last = length - self.window
        return (*range(0, last, self.step), last)


WHOLE = Protocol()
"""One pass over the whole image."""

SEMSEG = Protocol(window=713, flip=True, absent=0.0)
"""hszhao/semseg on Cityscapes: 2x4 windows of 1024x2048 pixels, always mirrored, too."""

MMSEG = Protocol(window=769, stride=513, average="logits")
"""mmsegmentation with crops of 769 pixels."""

PROTOCOLS = {"whole": WHOLE, "semseg": SEMSEG, "mmseg": MMSEG}


def scores(
    network: Network, images: jax.Array, num_classes: int, protocol: Protocol = WHOLE
) -> jax.Array:
    """Averaged class scores of every pixel; under `jax.jit`, one program per size of the images.

    Beside what the network needs for a window (two if mirrored), the program holds the scores of
    the images once per scale, 4 bytes per pixel and class: 159 MB for an image of Cityscapes.

    Args:
      network: maps normalized images to logits, such as a deployed segmenter with its variables.
      images: normalized, (n, height, width, channels).
      num_classes: of the network.
      protocol: windows, mirror images, scales.

    Returns:
      (n, height, width, classes), probabilities or logits, in at least float32.
    """
    size = images.shape[1:3]
    total: Any = 0.0
    for scale in protocol.scales:
        scaled_size = tuple(max(1, round(side * scale)) for side in size)
        same = scaled_size == size
        scaled = images if same else resize_bilinear(images, scaled_size, align_corners=False)
        found = _windows(network, scaled, num_classes, protocol)
        total += found if same else resize_bilinear(found, size, align_corners=False)
    return total / len(protocol.scales)


def predict(
    network: Network, images: jax.Array, num_classes: int, protocol: Protocol = WHOLE
) -> jax.Array:
    """The class of every pixel, int32 (n, height, width); arguments as in `scores`."""
    return scores(network, images, num_classes, protocol).argmax(-1).astype(jnp.int32)


def _windows(
    network: Network, images: jax.Array, num_classes: int, protocol: Protocol
) -> jax.Array:
    """Scores of images of one size, averaged where windows overlap."""
    if protocol.window is None:
        return _mirrored(network, images, protocol)
    count, height, width, channels = images.shape
    window = protocol.window
    # Smaller images get a border of the mean color, half of it on each side.
    missing = (max(0, window - height), max(0, window - width))
    before = tuple(pixels // 2 for pixels in missing)
    border = [(first, pixels - first) for first, pixels in zip(before, missing, strict=True)]
    padded = jnp.pad(images, ((0, 0), *border, (0, 0)))
    rows, columns = (protocol.starts(side) for side in padded.shape[1:3])
    corners = np.array([(row, column) for row in rows for column in columns])

    def add(total: jax.Array, corner: jax.Array) -> tuple[jax.Array, None]:
        start = (0, corner[0], corner[1], 0)
        part = jax.lax.dynamic_slice(padded, start, (count, window, window, channels))
        found = _mirrored(network, part, protocol)
        if (scores := found.shape[-1]) != num_classes:
            raise ValueError(
                f"num_classes={num_classes}, but the network gives {scores} scores per pixel"
            )
        old = jax.lax.dynamic_slice(total, start, (count, window, window, num_classes))
        return jax.lax.dynamic_update_slice(total, old + found, start), None

    dtype = jnp.promote_types(images.dtype, jnp.float32)
    # Made of the images, so that it is sharded and varies over the axes of a mesh as they do.
    zero = jnp.zeros_like(padded[..., :1], dtype)
    zero = jnp.broadcast_to(zero, (*padded.shape[:3], num_classes))
    total, _ = jax.lax.scan(add, zero, jnp.asarray(corners))
    times = np.outer(
        _cover(rows, window, padded.shape[1]), _cover(columns, window, padded.shape[2])
    )
    average = total / jnp.asarray(times, dtype).reshape(1, *times.shape, 1)
    top, left = before
    return average[:, top : top + height, left : left + width]


def _cover(starts: Sequence[int], window: int, length: int) -> np.ndarray:
    """How many windows cover each pixel along an axis."""
    pixel = np.arange(length)
    return np.sum([(pixel >= start) & (pixel < start + window) for start in starts], axis=0)


def _mirrored(network: Network, images: jax.Array, protocol: Protocol) -> jax.Array:
    """Scores of images, averaged with those of their mirror images if the protocol says so."""

    def of(images: jax.Array) -> jax.Array:
        logits = network(images)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        return jax.nn.softmax(logits) if protocol.average == "probabilities" else logits

    if not protocol.flip:
        return of(images)
    both = of(jnp.concatenate([images, images[:, :, ::-1]]))
    straight, mirrored = jnp.split(both, 2)
    return (straight + mirrored[:, :, ::-1]) / 2
