"""The baselines of the paper's Tables 4 and 5 as data.

In ResNet-50, -101 and -152 the first 1x1 convolution of a stage takes the stride, as in the
original (He et al., CVPR 2016): with it they have the 3.9, 7.6 and 11.3 G multiply-accumulates and
the Winograd counts that the paper prints. `resnet(50, strided="3x3")` is torchvision's, with 4.1 G.
"""

import itertools
import math
import types
from collections.abc import Mapping
from typing import Literal

from baselines.network import (
    Activation,
    Average,
    Conv,
    Dense,
    Flatten,
    Gate,
    MaxPool,
    Network,
    Part,
    Sum,
)

_BASIC = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
_BOTTLENECK_FEATURES = (256, 512, 1024, 2048)
_BOTTLENECK = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def resnet(depth: int, *, strided: Literal["1x1", "3x3"] = "1x1") -> Network:
    """ResNet (He et al., CVPR 2016), of 18, 34, 50, 101 or 152 layers.

    Args:
      depth: number of layers.
      strided: which convolution of a bottleneck takes the stride.
    """
    name, widths = f"ResNet-{depth}", (64, 128, 256, 512)
    if depth in _BASIC:
        return residual(name, _BASIC[depth], widths, widths, strided=None)
    return residual(name, _BOTTLENECK[depth], widths, _BOTTLENECK_FEATURES, strided=strided)


def resnext(depth: int) -> Network:
    """ResNeXt 32x4d (Xie et al., CVPR 2017), of 50 or 101 layers; the 3x3 takes the stride."""
    widths = (128, 256, 512, 1024)
    return residual(f"ResNeXt-{depth}", _BOTTLENECK[depth], widths, _BOTTLENECK_FEATURES, groups=32)


def residual(
    name: str,
    depths: tuple[int, ...],
    widths: tuple[int, ...],
    features: tuple[int, ...],
    *,
    groups: int = 1,
    strided: Literal["1x1", "3x3"] | None = "3x3",
) -> Network:
    """Any ResNet or ResNeXt.

    Args:
      name: of the network.
      depths: blocks of every stage.
      widths: channels of the 3x3 convolutions of every stage.
      features: channels out of every stage.
      groups: of the 3x3 convolutions.
      strided: which convolution of a bottleneck takes the stride; None for blocks of two 3x3
        convolutions instead of bottlenecks.
    """
    parts: list[Part] = [Conv("stem", 64, 7, 2), MaxPool(3, 2, padding=1)]
    inputs = 64
    for stage, (depth, width, outputs) in enumerate(
        zip(depths, widths, features, strict=True), start=1
    ):
        for index in range(depth):
            block = f"stage{stage}_block{index}"
            stride = 2 if stage > 1 and index == 0 else 1
            if strided is None:
                body = (
                    Conv(f"{block}_conv1", width, 3, stride),
                    Conv(f"{block}_conv2", width, 3, activation=None),
                )
                parts.append(_with_shortcut(block, body, inputs, outputs, stride))
            else:
                parts.append(_bottleneck(block, inputs, width, outputs, stride, groups, strided))
            inputs = outputs
    return Network(name, (*parts, Average(), Dense("head", 1000)))


def vgg16(*, norm: bool) -> Network:
    """VGG-16 (Simonyan and Zisserman, ICLR 2015), with or without batch normalization."""
    parts: list[Part] = []
    for stage, (features, depth) in enumerate(
        ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)), start=1
    ):
        for index in range(depth):
            name = f"stage{stage}_conv{index}"
            parts.append(Conv(name, features, norm=norm, bias=norm))
        parts.append(MaxPool(2, 2))
    head = [Dense("hidden0", 4096, "relu"), Dense("hidden1", 4096, "relu"), Dense("head", 1000)]
    return Network("VGG-16-BN" if norm else "VGG-16", (*parts, Flatten(), *head))


def efficientnet(
    name: str, *, width: float = 1.0, depth: float = 1.0, image_size: int = 224
) -> Network:
    """EfficientNet (Tan and Le, ICML 2019), with PyTorch's padding.

    Args:
      name: of the network.
      width: multiplier of the channels.
      depth: multiplier of the blocks per stage.
      image_size: pixels of the paper's row.
    """
    channels = _rounded(32 * width)
    parts: list[Part] = [Conv("stem", channels, 3, 2, activation="silu")]
    for stage, (expansion, size, stride, base, blocks) in enumerate(
        (
            (1, 3, 1, 16, 1),
            (6, 3, 2, 24, 2),
            (6, 5, 2, 40, 2),
            (6, 3, 2, 80, 3),
            (6, 5, 1, 112, 3),
            (6, 5, 2, 192, 4),
            (6, 3, 1, 320, 1),
        ),
        start=1,
    ):
        features = _rounded(base * width)
        for index in range(math.ceil(blocks * depth)):
            own = stride if index == 0 else 1
            block = _inverted_bottleneck(
                f"stage{stage}_block{index}", channels, features, expansion, size, own
            )
            same = own == 1 and channels == features
            parts += [Sum((block, ()))] if same else block
            channels = features
    parts.append(Conv("last", _rounded(1280 * width), 1, activation="silu"))
    return Network(name, (*parts, Average(), Dense("head", 1000)), image_size)


def regnetx(name: str, depths: tuple[int, ...], widths: tuple[int, ...], group: int) -> Network:
    """RegNetX (Radosavovic et al., CVPR 2020).

    Args:
      name: of the network.
      depths: blocks of every stage.
      widths: channels of every stage.
      group: channels per group of the 3x3 convolutions.
    """
    parts: list[Part] = [Conv("stem", 32, 3, 2)]
    inputs = 32
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True), start=1):
        for index in range(depth):
            block = _bottleneck(
                f"stage{stage}_block{index}",
                inputs,
                width,
                width,
                2 if index == 0 else 1,
                width // group,
                "3x3",
            )
            parts.append(block)
            inputs = width
    return Network(name, (*parts, Average(), Dense("head", 1000)))


def _bottleneck(
    name: str, inputs: int, width: int, features: int, stride: int, groups: int, strided: str
) -> Sum:
    first, second = (stride, 1) if strided == "1x1" else (1, stride)
    body = (
        Conv(f"{name}_conv1", width, 1, first),
        Conv(f"{name}_conv2", width, 3, second, groups),
        Conv(f"{name}_conv3", features, 1, activation=None),
    )
    return _with_shortcut(name, body, inputs, features, stride)


def _with_shortcut(
    name: str, body: tuple[Part, ...], inputs: int, features: int, stride: int
) -> Sum:
    if inputs == features and stride == 1:
        return Sum((body, ()), "relu")
    projection = Conv(f"{name}_shortcut", features, 1, stride, activation=None)
    return Sum((body, (projection,)), "relu")


def _inverted_bottleneck(
    name: str, inputs: int, features: int, expansion: int, size: int, stride: int
) -> tuple[Part, ...]:
    silu: Activation = "silu"
    width = inputs * expansion
    expand = (Conv(f"{name}_expand", width, 1, activation=silu),) if expansion > 1 else ()
    return (
        *expand,
        Conv(f"{name}_depthwise", width, size, stride, width, silu),
        Gate(f"{name}_se", inputs // 4, silu),  # a quarter of the block's input, not of `width`
        Conv(f"{name}_project", features, 1, activation=None),
    )


def _rounded(channels: float) -> int:
    """The nearest multiple of eight that is at least nine tenths of it."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


_NETWORKS = (
    *(resnet(depth) for depth in itertools.chain(_BASIC, _BOTTLENECK)),
    resnext(50),
    resnext(101),
    vgg16(norm=False),
    vgg16(norm=True),
    efficientnet("EfficientNet-B0"),
    efficientnet("EfficientNet-B3", width=1.2, depth=1.4, image_size=300),
    regnetx("RegNetX-3.2GF", (2, 6, 15, 2), (96, 192, 432, 1008), 48),
    regnetx("RegNetX-12GF", (2, 5, 11, 1), (224, 448, 896, 2240), 112),
)

BASELINES: Mapping[str, Network] = types.MappingProxyType({n.name: n for n in _NETWORKS})
"""The thirteen baselines by the names of the paper's tables."""
