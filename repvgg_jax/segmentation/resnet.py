"""ResNet-50 and -101 as backbones of segmenters: what RepVGG's Table 8 compares with.

As hszhao/semseg trains them: the first convolution is three of 3x3, and the 3x3 convolution of a
bottleneck takes its stride (He et al., CVPR 2016; the stem of Inception-v3). Every convolution and
its norm is a `ReparamBlock` of one branch, so they fuse as RepVGG does.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from repvgg_jax.block import Activation, ReparamBlock
from repvgg_jax.cpu_conv import Lowering
from repvgg_jax.model import RematPolicy
from repvgg_jax.reparam import EPSILON, conv_bn

EXPANSION = 4
"""Channels out of a bottleneck per channel inside it."""


@dataclasses.dataclass(frozen=True)
class ResNetVariant:
    """An architecture; those of the paper are in `RESNETS`.

    Attributes:
      name: what messages and metadata call it.
      depths: bottlenecks of every stage.
      channels: channels inside the bottlenecks of every stage.
      stem_channels: channels of the three convolutions before them.
    """

    name: str
    depths: tuple[int, ...]
    channels: tuple[int, ...] = (64, 128, 256, 512)
    stem_channels: tuple[int, int, int] = (64, 64, 128)

    activation = "relu"
    """Name of the activation, as `Variant.activation`; the same for all ResNets."""

    @property
    def total_stride(self) -> int:
        """Images' pixels per pixel of the last feature map: 32 for the usual four stages."""
        return 4 * 2 ** (len(self.depths) - 1)

    @property
    def features(self) -> int:
        """Channels of the last feature map."""
        return EXPANSION * self.channels[-1]

    @property
    def convolutions(self) -> int:
        """Number of convolutions, each with its norm."""
        return 3 + sum(3 + layer.projects for layer in self.layers())

    def layers(self, output_stride: int | None = None) -> tuple["Bottleneck", ...]:
        """Every bottleneck in order.

        Args:
          output_stride: replaces the strides beyond it by dilation; None keeps them.

        Raises:
          ValueError: no stage ends at that stride.
        """
        limit = self.total_stride if output_stride is None else output_stride
        found, reached = [], {4 * 2**stage for stage in range(len(self.depths))}
        if limit not in reached:
            valid = ", ".join(map(str, sorted(reached)))
            raise ValueError(
                f"{self.name} cannot have output_stride={output_stride}: its stages end at "
                f"strides {valid}"
            )
        in_channels, stride_so_far, dilation = self.stem_channels[-1], 4, 1
        for stage, (depth, width) in enumerate(zip(self.depths, self.channels, strict=True)):
            for index in range(depth):
                stride = 2 if stage and not index else 1
                if stride_so_far * stride > limit:
                    dilation *= stride
                    stride = 1
                stride_so_far *= stride
                name = f"stage{stage + 1}_block{index}"
                found.append(Bottleneck(name, in_channels, width, stride, dilation, not index))
                in_channels = EXPANSION * width
        return tuple(found)


@dataclasses.dataclass(frozen=True)
class Bottleneck:
    """One bottleneck and its place in the network.

    Attributes:
      name: in the parameter tree, `stage1_block0`.
      in_channels: channels in.
      width: channels of the two inner convolutions; `EXPANSION` times as many come out.
      stride: of the 3x3 convolution.
      dilation: of the 3x3 convolution.
      projects: whether its shortcut is a 1x1 convolution.
    """

    name: str
    in_channels: int
    width: int
    stride: int
    dilation: int
    projects: bool

    @property
    def stage(self) -> str:
        """The stage it belongs to: `stage1` and so on."""
        return self.name.partition("_")[0]


RESNETS: Mapping[str, ResNetVariant] = MappingProxyType(
    {
        "ResNet-50": ResNetVariant("ResNet-50", (3, 4, 6, 3)),
        "ResNet-101": ResNetVariant("ResNet-101", (3, 4, 23, 3)),
    }
)
"""The two ResNets of Table 8 by name."""


class ResNet(nn.Module):
    """Feature maps of a ResNet, without a classifier.

    Attributes:
      variant: the architecture.
      output_stride: replaces the strides beyond it by dilation; None keeps them.
      deploy: the fused form instead of the training form.
      bn_group_size: images that share batch statistics in training; None for the whole batch.
      lowering: as in `repvgg_jax.create_model`.
      remat: recompute every bottleneck's activations, as in `repvgg_jax.create_model`.
      dtype: of the convolutions.
      param_dtype: of the parameters.
      epsilon: of batch normalization.
      momentum: share of the old running statistics that every training step keeps.
    """

    variant: ResNetVariant
    output_stride: int | None = None
    deploy: bool = False
    bn_group_size: int | None = None
    lowering: Lowering = "auto"
    remat: bool | RematPolicy = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    epsilon: float = EPSILON
    momentum: float = 0.9

    def setup(self) -> None:
        """Makes the convolutions."""
        for index, features in enumerate(self.variant.stem_channels):
            block = conv_bn_block(self, 3, features, stride=1 if index else 2)
            setattr(self, f"stem{index}", block)
        policy = self.remat if callable(self.remat) else None
        module = _Bottleneck
        if self.remat:
            module = nn.remat(_Bottleneck, static_argnums=(2,), policy=policy)
        for layer in self.layers:
            convs: dict[str, Any] = {
                "conv0": conv_bn_block(self, 1, layer.width),
                "conv1": conv_bn_block(
                    self, 3, layer.width, stride=layer.stride, dilation=layer.dilation
                ),
                "conv2": conv_bn_block(self, 1, EXPANSION * layer.width, activation=None),
            }
            if layer.projects:
                convs["shortcut"] = conv_bn_block(
                    self, 1, EXPANSION * layer.width, stride=layer.stride, activation=None
                )
            setattr(self, layer.name, module(**convs))

    @property
    def layers(self) -> tuple[Bottleneck, ...]:
        """Every bottleneck in order."""
        return self.variant.layers(self.output_stride)

    def features(self, images: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        """The last feature map of the stem and of every stage.

        Args:
          images: (images, height, width, channels), normalized.
          train: use and update batch statistics; pass `mutable=["batch_stats"]`.

        Returns:
          `{"stem": …, "stage1": …, …}`, each (images, height, width, channels) in `dtype`.
        """
        x = images.astype(self.dtype)
        for index in range(3):
            x = getattr(self, f"stem{index}")(x, train)
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        maps = {"stem": x}
        for layer in self.layers:
            x = getattr(self, layer.name)(x, train)
            maps[layer.stage] = x
        return maps

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """The last feature map."""
        return self.features(images, train)[self.layers[-1].stage]


class _Bottleneck(nn.Module):
    """ReLU of three convolutions and a shortcut, summed."""

    conv0: ReparamBlock
    conv1: ReparamBlock
    conv2: ReparamBlock
    shortcut: ReparamBlock | None = None

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        y = self.conv2(self.conv1(self.conv0(x, train), train), train)
        return nn.relu(y + (x if self.shortcut is None else self.shortcut(x, train)))


def conv_bn_block(
    network: Any,
    size: int,
    features: int,
    *,
    stride: int = 1,
    dilation: int = 1,
    activation: Activation | None = nn.relu,
) -> ReparamBlock:
    """A convolution and its norm, as a block of one branch, with the settings of a network.

    Args:
      network: a module with the fields `deploy`, `dtype`, …, that `ReparamBlock` has, too.
      size: height and width of the kernel.
      features: channels out.
      stride: of both axes.
      dilation: of both axes.
      activation: after the norm.
    """
    return ReparamBlock(
        features=features,
        stride=stride,
        dilation=dilation,
        deploy=network.deploy,
        bn_group_size=network.bn_group_size,
        lowering=network.lowering,
        dtype=network.dtype,
        param_dtype=network.param_dtype,
        activation=activation,
        epsilon=network.epsilon,
        momentum=network.momentum,
        spec=conv_bn(size),
    )
