"""What is fixed about a block, and what goes in and out of it."""

import dataclasses
from collections.abc import Mapping

import jax

Params = Mapping[str, Mapping[str, jax.Array]]
Statistics = dict[str, tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Form:
    """What is fixed about a block; most of it as in `RepVGGBlock`.

    Attributes:
      stride: spatial stride.
      dilation: dilation of the 3x3 kernel, which is padded by as much.
      groups: channel groups of both convolutions, k below.
      identity: whether there is an identity branch.
      relu: whether the result goes through the ReLU.
      image_groups: parts of the batch, in order, with statistics of their own, G below.
      epsilon: added to the variances.
    """

    stride: int
    dilation: int
    groups: int
    identity: bool
    relu: bool
    image_groups: int
    epsilon: float
