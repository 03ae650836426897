"""Operators that formats with operators of their own translate, one by one.

`repvgg_jax.export.decompose` makes a list of them of a network. All values are NHWC; kernels are
HWIO, as in Flax.
"""

import dataclasses
from typing import Literal

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Conv:
    """A convolution with a bias.

    Attributes:
      name: of its parameters, e.g. `stage1_block0/reparam`.
      kernel: (height, width, channels in per group, channels out).
      bias: (channels out,).
      stride: of both axes.
      dilation: of both axes.
      groups: of channels.
      wide: computes in float32, whatever the network computes in.
    """

    name: str
    kernel: np.ndarray
    bias: np.ndarray
    stride: int
    dilation: int
    groups: int
    wide: bool = False

    @property
    def kernel_size(self) -> tuple[int, int]:
        """Height and width."""
        return self.kernel.shape[0], self.kernel.shape[1]

    @property
    def padding(self) -> tuple[int, int]:
        """Zeros on either side of height and width, which center the kernel."""
        height, width = self.kernel_size
        return self.dilation * (height // 2), self.dilation * (width // 2)


@dataclasses.dataclass(frozen=True, eq=False)
class Activation:
    """An elementwise function.

    Attributes:
      kind: "relu", "silu" or "gelu", which is exact.
    """

    kind: str


@dataclasses.dataclass(frozen=True, eq=False)
class Linear:
    """A linear layer, computed in float32 if it is the classifier.

    Attributes:
      name: of its parameters, e.g. `head`.
      kernel: (channels in, channels out).
      bias: (channels out,).
    """

    name: str
    kernel: np.ndarray
    bias: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Gate:
    """Squeeze-and-excite: multiplies by sigmoid(expand(relu(reduce(mean over pixels)))).

    Attributes:
      name: of its parameters, e.g. `stage1_block0/se`.
      reduce: the first linear layer.
      expand: the second.
    """

    name: str
    reduce: Linear
    expand: Linear


@dataclasses.dataclass(frozen=True, eq=False)
class Pool:
    """Mean over all pixels, (images, channels), in float32."""


@dataclasses.dataclass(frozen=True, eq=False)
class Softmax:
    """Logits to probabilities."""


@dataclasses.dataclass(frozen=True, eq=False)
class Output:
    """What has been computed so far is an output, in float32.

    Attributes:
      name: of the output.
    """

    name: str


@dataclasses.dataclass(frozen=True, eq=False)
class Keep:
    """Remembers what has been computed so far, and goes on with it.

    Attributes:
      name: to remember it under.
    """

    name: str


@dataclasses.dataclass(frozen=True, eq=False)
class Take:
    """Goes on with what was remembered.

    Attributes:
      name: of a `Keep`.
    """

    name: str


@dataclasses.dataclass(frozen=True, eq=False)
class Add:
    """Adds what was remembered.

    Attributes:
      name: of a `Keep`.
    """

    name: str


@dataclasses.dataclass(frozen=True, eq=False)
class Join:
    """Channels of everything that was remembered under these names, in order.

    Attributes:
      names: of `Keep`s.
    """

    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class MaxPool:
    """Largest of 3x3 pixels, at stride 2 and with a border of 1."""


@dataclasses.dataclass(frozen=True, eq=False)
class Resample:
    """Pools or interpolates: both spatial axes are multiplied by matrices.

    Attributes:
      name: of the result.
      rows: (height after, height before).
      columns: (width after, width before).
      wide: in float32, whatever the network computes in.
    """

    name: str
    rows: np.ndarray
    columns: np.ndarray
    wide: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class ResampleToSize:
    """Resampling as `Resample`, for images of any size: the artifact computes the matrices.

    Attributes:
      name: of the result.
      how: "pool", feature maps to means over windows; "corners", such means to feature maps,
        corners on corners; or "stride", feature maps to the images' size, pixel i to pixel
        `stride * i`, see `repvgg_jax.segmentation.resize`.
      stride: pixels of the images per pixel of the feature maps.
      windows: along each axis; 0 for "stride".
      wide: in float32, whatever the network computes in.
    """

    name: str
    how: Literal["pool", "corners", "stride"]
    stride: int
    windows: int = 0
    wide: bool = False


RESAMPLING = (Resample, ResampleToSize)

IMAGES = "images"
"""The `Keep` of a segmenter's normalized images."""


@dataclasses.dataclass(frozen=True, eq=False)
class Widen:
    """Everything after this computes in float32."""


Operator = (
    Conv
    | Activation
    | Linear
    | Gate
    | Pool
    | Softmax
    | Output
    | Keep
    | Take
    | Add
    | Join
    | MaxPool
    | Resample
    | ResampleToSize
    | Widen
)
