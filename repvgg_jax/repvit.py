"""RepViT (Wang et al., CVPR 2024): a mobile network that deploys as plain convolutions.

A block mixes pixels with a depthwise mixer (`reparam.repvit`), gates channels in every other block
of a stage, and mixes channels with two 1x1 convolutions beside a residual. Every convolution with
its norm is a `ReparamBlock`, and so are the two classifiers, each behind a norm, whose mean is the
result: `RepViT.fuse` folds all of them. Widths are those of the authors' code;
`repvgg_jax.weights.repvit` reads its weights as timm names them.
"""

import dataclasses
import functools
import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from repvgg_jax.batch_stats import AxisName
from repvgg_jax.block import Activation, ReparamBlock
from repvgg_jax.fuse_module import fuse_model
from repvgg_jax.layers import SqueezeExciteGate
from repvgg_jax.reparam import EPSILON, BlockSpec, conv_bn, repvit
from repvgg_jax.reparam.linear import Chain, Conv, Norm, Scale, Sum
from repvgg_jax.text import did_you_mean

EXPANSION = 2
"""Channels between the two 1x1 convolutions of a block per channel of the block."""


@dataclasses.dataclass(frozen=True)
class RepViTVariant:
    """An architecture.

    Attributes:
      name: e.g. `repvit_m0_9`.
      depths: blocks of every stage.
      channels: of every stage.
    """

    name: str
    depths: tuple[int, ...]
    channels: tuple[int, ...]


def _variants() -> dict[str, RepViTVariant]:
    sizes = {
        "m0_9": ((2, 2, 14, 2), 48),
        "m1_0": ((2, 2, 14, 2), 56),
        "m1_1": ((2, 2, 12, 2), 64),
        "m1_5": ((4, 4, 24, 4), 64),
        "m2_3": ((6, 6, 34, 2), 80),
    }
    return {
        f"repvit_{size}": RepViTVariant(
            f"repvit_{size}", depths, tuple(width * 2**stage for stage in range(4))
        )
        for size, (depths, width) in sizes.items()
    }


REPVITS: Mapping[str, RepViTVariant] = types.MappingProxyType(_variants())
"""The authors' networks (table 4)."""


def create_repvit(
    name: str | RepViTVariant, *, num_classes: int = 1000, deploy: bool = False, **options: Any
) -> "RepViT":
    """Builds a RepViT.

    Args:
      name: `repvit_m0_9`, `m1_0`, `m1_1`, `m1_5`, `m2_3`, or a `RepViTVariant` of your own.
      num_classes: 0 for pooled features.
      deploy: the fused form, whose variables come from `RepViT.fuse`.
      **options: other attributes of `RepViT`.

    Raises:
      ValueError: an unknown name.
    """
    if isinstance(name, str):
        if name not in REPVITS:
            raise ValueError(
                f"unknown RepViT {name!r}; {did_you_mean(name, REPVITS)}there are: "
                f"{', '.join(REPVITS)}"
            )
        name = REPVITS[name]
    return RepViT(name, num_classes=num_classes, deploy=deploy, **options)


PROJECTION = BlockSpec(
    "conv-BN 1x1, from zero", Chain((Conv("conv_single", (1, 1)), Norm("bn_single", initial=0.0)))
)
"""The last convolution beside a residual: its norm starts at zero, as the authors'."""

_exact_gelu = functools.partial(nn.gelu, approximate=False)


def head_spec(distillation: bool) -> BlockSpec:
    """The classifiers as a block on a single pixel: norm and linear layer, or the mean of two."""

    def linear(name: str) -> Chain:
        return Chain((Norm(f"bn_{name}"), Conv(name, (1, 1), bias=True)))

    if not distillation:
        return BlockSpec("RepViT head", linear("head"))
    both = Sum((linear("head"), linear("head_dist")))
    return BlockSpec("RepViT heads", Chain((both, Scale(factor=0.5))))


class RepViT(nn.Module):
    """The network; `create_repvit` builds it.

    Attributes:
      variant: the architecture.
      num_classes: 0 for pooled features.
      distillation: two classifiers, the second for a teacher's labels; their mean is the result.
      deploy: the fused form instead of the training form.
      bn_group_size: images that share batch statistics in training; None for the whole batch.
      dtype: of the convolutions; parameters, statistics and norms stay float32.
      param_dtype: of the parameters.
      epsilon: of batch normalization.
      momentum: share of the old running statistics that every training step keeps.
      axis_name: as in `ReparamBlock`.
    """

    variant: RepViTVariant
    num_classes: int = 1000
    distillation: bool = True
    deploy: bool = False
    bn_group_size: int | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    epsilon: float = EPSILON
    momentum: float = 0.9
    axis_name: AxisName | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits (images, num_classes) of normalized images (images, height, width, channels).

        Args:
          images: floating point numbers.
          train: use and update batch statistics; pass `mutable=["batch_stats"]`.
        """
        width = self.variant.channels[0]
        x = images.astype(self.dtype)
        x = self._conv("stem0", 3, width // 2, stride=2, activation=_exact_gelu)(x, train)
        x = self._conv("stem1", 3, width, stride=2)(x, train)
        for stage, depth in enumerate(self.variant.depths):
            if stage:
                x = self._downsample(f"stage{stage}_down", x, self.variant.channels[stage], train)
            for index in range(depth):
                x = self._mix(f"stage{stage}_block{index}", x, train, gated=index % 2 == 0)
        pooled = x.mean(axis=(1, 2), keepdims=True, dtype=jnp.promote_types(x.dtype, jnp.float32))
        if not self.num_classes:
            return pooled[:, 0, 0]
        spec = head_spec(self.distillation)
        # In at least float32: it costs nothing and decides everything.
        head = self._block("head", spec, self.num_classes, dtype=pooled.dtype)
        return head(pooled, train)[:, 0, 0]

    def fuse(self, variables: Any, image_shape: tuple[int, int, int] = (64, 64, 3)) -> Any:
        """The variables of `self.clone(deploy=True)`.

        Args:
          variables: of the training form.
          image_shape: height, width and channels of any images that the network takes.

        Raises:
          ValueError: as `fuse_model`.
        """
        return fuse_model(self, variables, jnp.zeros((1, *image_shape), self.dtype))

    def _mix(self, name: str, x: jax.Array, train: bool, *, gated: bool) -> jax.Array:
        """Mixes pixels, gates channels, mixes channels."""
        channels = x.shape[-1]
        x = self._block(f"{name}_mixer", repvit(), channels, groups=channels)(x, train)
        if gated:
            gate = SqueezeExciteGate(
                4, self.dtype, self.param_dtype, squeezed=_squeezed(channels), name=f"{name}_se"
            )
            x = gate(x)
        return self._feed_forward(name, x, train)

    def _downsample(self, name: str, x: jax.Array, features: int, train: bool) -> jax.Array:
        """Half the height and width."""
        channels = x.shape[-1]
        x = self._mix(f"{name}_block", x, train, gated=False)
        x = self._block(f"{name}_spatial", conv_bn(3), channels, stride=2, groups=channels)(
            x, train
        )
        x = self._conv(f"{name}_channel", 1, features)(x, train)
        return self._feed_forward(name, x, train)

    def _feed_forward(self, name: str, x: jax.Array, train: bool) -> jax.Array:
        channels = x.shape[-1]
        inner = self._conv(f"{name}_expand", 1, EXPANSION * channels, activation=_exact_gelu)
        return x + self._block(f"{name}_project", PROJECTION, channels)(inner(x, train), train)

    def _conv(
        self,
        name: str,
        size: int,
        features: int,
        *,
        stride: int = 1,
        activation: Activation | None = None,
    ) -> ReparamBlock:
        return self._block(name, conv_bn(size), features, stride=stride, activation=activation)

    def _block(self, name: str, spec: BlockSpec, features: int, **options: Any) -> ReparamBlock:
        return ReparamBlock(
            features=features,
            spec=spec,
            name=name,
            **{
                "activation": None,
                "deploy": self.deploy,
                "bn_group_size": self.bn_group_size,
                "axis_name": self.axis_name,
                "dtype": self.dtype,
                "param_dtype": self.param_dtype,
                "epsilon": self.epsilon,
                "momentum": self.momentum,
                **options,
            },
        )


def _squeezed(channels: int) -> int:
    """Channels inside squeeze-and-excite: a quarter, to the nearest multiple of 8."""
    return max(8, int(channels / 4 + 4) // 8 * 8)
