"""The terms of the expression that describes a block in training form, before its activation.

`Linear` is data: convolutions, norms, sums and chains, with the names that they have in a tree
of parameters. Everything else interprets it: `repvgg_jax.reparam.linear` gives names, shapes and
costs, `repvgg_jax.reparam.algebra.affine` the one kernel and bias that it is equal to,
`repvgg_jax.block.ReparamBlock` its values on feature maps. Nothing else in this package lists the
branches of a block.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np

from repvgg_jax.text import one_line

Taps = tuple[tuple[float, ...], ...]


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution, zero-padded so that stride 1 keeps the size.

    Attributes:
      name: of its child in the parameter tree.
      kernel_size: height and width, both odd.
      strided: whether it takes the block's stride. In a chain exactly one term does; terms with
        a larger kernel than 1x1 come no later than that one.
      dilation: as a multiple of the block's.
      groups: channel groups, a multiple of the block's; None for the block's, "depthwise" for
        one group per input channel.
      expansion: output channels as a multiple of the input's; None for the block's features.
      bias: whether it has a bias.
      multiple: of the block's features that it gives if `expansion` is None.
      unit: divide the kernel by its L2 norm per output channel before it is used (DiracNet).
      initial: of the kernel: PyTorch's default, "he" (Kaiming, uniform, of the fan-in), "zeros",
        or "identity". The bias starts as PyTorch's beside PyTorch's kernel, else at zero.
    """

    name: str
    kernel_size: tuple[int, int]
    strided: bool = True
    dilation: int = 1
    groups: int | Literal["depthwise"] | None = None
    expansion: int | None = None
    bias: bool = False
    multiple: int = 1
    unit: bool = False
    initial: Literal["torch", "he", "zeros", "identity"] = "torch"

    def groups_of(self, in_channels: int, block_groups: int) -> int:
        """The number of groups, given the input channels and the block's groups."""
        return in_channels if self.groups == "depthwise" else self.groups or block_groups

    def out_channels(self, in_channels: int, features: int) -> int:
        """The number of output channels, given the input channels and the block's features."""
        if self.expansion is not None:
            return self.expansion * in_channels
        return self.multiple * features


@dataclasses.dataclass(frozen=True)
class Norm:
    """Batch normalization, anywhere: after a convolution, on the input, or after a sum.

    Attributes:
      name: of its child in the parameter tree.
      decay: whether weight decay applies to its scale.
      initial: value of its scale.
    """

    name: str
    decay: bool = False
    initial: float = 1.0


@dataclasses.dataclass(frozen=True)
class AvgPool:
    """Average pooling per channel; padding counts as pixels, as in `Conv`.

    Attributes:
      kernel_size: height and width, both odd.
      strided: as in `Conv`.
    """

    kernel_size: tuple[int, int]
    strided: bool = True


@dataclasses.dataclass(frozen=True)
class Filter:
    """A constant kernel applied to every channel alone, such as Sobel's.

    Attributes:
      taps: rows of the kernel, both sides odd, or a function of the number of channels to an array
        (height, width, channels).
      strided: as in `Conv`.

    Raises:
      ValueError: the taps are not a rectangular array of finite numbers.
    """

    taps: Taps | Callable[[int], np.ndarray]
    strided: bool = True

    def __post_init__(self) -> None:
        if callable(self.taps):
            return
        try:
            taps = np.asarray(self.taps, np.float64)
        except (TypeError, ValueError, OverflowError):
            taps = np.empty(0)
        if taps.ndim != 2 or not taps.size or not np.isfinite(taps).all():
            raise ValueError(
                f"Filter: taps={one_line(self.taps, 80)} must be rows of equal length with finite "
                "numbers"
            )
        # Lists and arrays are not hashable.
        object.__setattr__(self, "taps", tuple(map(tuple, taps.tolist())))

    @property
    def kernel_size(self) -> tuple[int, int]:
        """Height and width."""
        height, width = self.kernel(1).shape[:2]
        return height, width

    def kernel(self, channels: int) -> np.ndarray:
        """The taps in float64, (height, width, 1, channels)."""
        if callable(self.taps):
            return np.asarray(self.taps(channels), np.float64)[:, :, None, :]
        taps = np.asarray(self.taps, np.float64)[:, :, None, None]
        return np.broadcast_to(taps, (*taps.shape[:3], channels))


@dataclasses.dataclass(frozen=True)
class Nonlinearity:
    """A nonlinearity inside the expression, for ablations: such a block trains but cannot be fused.

    Attributes:
      function: its name in `jax.nn`.
    """

    function: str = "relu"


@dataclasses.dataclass(frozen=True)
class Identity:
    """The input itself."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """Multiplication per channel; `Scale(factor=-1.0)` subtracts a term in a sum.

    Attributes:
      name: of its child in the parameter tree, with a leaf `scale`; None for no parameter.
      factor: a constant factor beside the parameter.
      initial: the parameter's initial value.
      bias: whether a leaf `bias` is added behind the multiplication.
      spread: standard deviation of the initial values around `initial`, and of the bias around 0.
    """

    name: str | None = None
    factor: float = 1.0
    initial: float = 1.0
    bias: bool = False
    spread: float = 0.0


class _Terms:
    """Accepts any sequence of terms and keeps a tuple, so that expressions are hashable."""

    terms: tuple["Linear", ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "terms", tuple(self.terms))
        if not self.terms:
            raise ValueError(f"{type(self).__name__} needs at least one term")


@dataclasses.dataclass(frozen=True)
class Chain(_Terms):
    """Terms applied one after another, the first one to the input.

    A convolution or pooling behind a term with a bias pads with that term's response to zero
    instead of zeros (as in Diverse Branch Block). Only then is the chain one convolution at the
    borders, too.
    """

    terms: tuple["Linear", ...]


@dataclasses.dataclass(frozen=True)
class Sum(_Terms):
    """The sum of terms that are all applied to the same input."""

    terms: tuple["Linear", ...]


@dataclasses.dataclass(frozen=True)
class SameShape:
    """A term that exists only in blocks whose input and output have the same shape."""

    term: "Linear"


Linear = Conv | Norm | AvgPool | Filter | Nonlinearity | Identity | Scale | Chain | Sum | SameShape
"""A linear map of feature maps, with parameters in a tree (not linear with a `Nonlinearity`)."""
