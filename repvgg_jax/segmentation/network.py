"""PSPNet (Zhao et al., CVPR 2017) on a RepVGG or a ResNet: one class per pixel.

The backbone runs at an output stride of 8: strides beyond it become dilation of the 3x3
convolutions, layer by layer (`dilations`). The 1x1 branch of a RepVGG block keeps dilation 1, and
whether the block has an identity branch is still decided by its stride in the classifier, so that
classification weights load and every block fuses as it does there. On the last feature map comes
a pyramid of average poolings, each with a 1x1 convolution; on maps and pyramid together a 3x3
convolution, channel dropout, and a 1x1 convolution that gives the classes. An auxiliary head on
the stage before the last one helps training, and is dropped by `fuse_params`.

Every convolution with a norm is a block of `repvgg_jax.reparam`, so the whole network fuses at
once. Widths and rates are those of the RepVGG authors' example and of hszhao/semseg.
"""

import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from repvgg_jax.block import Activation, TrainForm, check_options
from repvgg_jax.cpu_conv import Lowering
from repvgg_jax.layers import BatchNorm, check_classes, conv_bn, torch_bias_init, torch_kernel_init
from repvgg_jax.meshes import on_auto_axes
from repvgg_jax.model import RematPolicy, RepVGG, create_model, resolve_activation
from repvgg_jax.reparam import CONV_BN, EPSILON, fuse_params
from repvgg_jax.segmentation.resize import adaptive_average_pool, resize_bilinear, upsample
from repvgg_jax.segmentation.resnet import RESNETS, ResNet, ResNetVariant, conv_bn_block
from repvgg_jax.variants import Variant, get_variant

OUTPUT_STRIDE = 8
FAST_LAYERS = 4
"""Layers of the stage before the last one that "fast" dilates; all of the last stage are."""


def create_segmenter(
    name: str | Variant | ResNetVariant,
    num_classes: int,
    *,
    fast: bool = False,
    output_stride: int = OUTPUT_STRIDE,
    deploy: bool = False,
    bins: tuple[int, ...] = (1, 2, 3, 6),
    width: int = 512,
    auxiliary_width: int = 256,
    dropout: float = 0.1,
    bn_group_size: int | None = None,
    train_form: TrainForm = "auto",
    lowering: Lowering = "auto",
    remat: bool | RematPolicy = False,
    dtype: jnp.dtype = jnp.float32,
    param_dtype: jnp.dtype = jnp.float32,
    activation: Activation | Literal["auto"] | None = "auto",
    epsilon: float = EPSILON,
    momentum: float = 0.9,
) -> "Segmenter":
    """Builds a PSPNet.

    Args:
      name: of the backbone: any RepVGG as in `create_model`, `ResNet-50` or `ResNet-101`; or a
        `Variant` of your own.
      num_classes: classes of a pixel.
      fast: dilate only the last four layers of the stage before the last one, and the last
        stage, which is faster (paper, Table 8). RepVGG only.
      output_stride: pixels of the images per pixel of the last feature map.
      deploy: the fused form, whose variables come from `fuse_params`.
      bins: windows of the pyramid's poolings along each axis; each level has an equal share of
        the backbone's channels.
      width: channels of the 3x3 convolution after the pyramid.
      auxiliary_width: channels of the auxiliary head; 0 for no such head.
      dropout: fraction of channels that training drops before each classifier. It needs
        `rngs={"dropout": key}`.
      bn_group_size: images that share batch statistics in training; None for the whole batch.
      train_form: of the backbone, as in `create_model`.
      lowering: as in `create_model`.
      remat: of the backbone, as in `create_model`.
      dtype: of the convolutions. Parameters, statistics, norms and classifiers stay float32.
      param_dtype: of the parameters; float64 is for proofs.
      activation: of the backbone's blocks, as in `create_model`.
      epsilon: of batch normalization. `fuse_params` needs the same one.
      momentum: share of the old running statistics that every training step keeps.

    Raises:
      ValueError: an unknown backbone, an output stride it cannot have, or numbers that no
        segmenter has.
    """
    variant = name if isinstance(name, ResNetVariant) else _backbone_variant(name)
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes} must be 2 or more to tell pixels apart")
    if not bins or min(bins) < 1 or len(set(bins)) < len(bins):
        raise ValueError(f"bins={bins} must be different numbers of windows, 1 or more")
    if variant.features < len(bins):
        raise ValueError(f"{variant.name} has {variant.features} channels for {len(bins)} bins")
    if width < 1 or auxiliary_width < 0:
        raise ValueError(f"width={width} and auxiliary_width={auxiliary_width} must be positive")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} must be at least 0 and below 1")
    if len(variant.depths) < 2:
        raise ValueError(f"{variant.name} has one stage; the auxiliary head needs one before it")
    activation = resolve_activation(variant.activation, activation)
    check_options(train_form, lowering, activation, epsilon, momentum)
    segmenter = Segmenter(
        variant=variant,
        num_classes=num_classes,
        fast=fast,
        output_stride=output_stride,
        deploy=deploy,
        bins=tuple(bins),
        width=width,
        auxiliary_width=auxiliary_width,
        dropout=dropout,
        bn_group_size=bn_group_size,
        train_form=train_form,
        lowering=lowering,
        remat=remat,
        dtype=dtype,
        param_dtype=param_dtype,
        activation=activation,
        epsilon=epsilon,
        momentum=momentum,
    )
    make_backbone(segmenter)  # raises for what the backbone cannot be
    return segmenter


def dilations(
    variant: Variant, output_stride: int = OUTPUT_STRIDE, *, fast: bool = False
) -> tuple[int, ...]:
    """Dilation of the 3x3 branch of every block after the stem.

    Plain dilates all layers of the stages whose stride is removed: 2 in stage 3 and 4 in stage 4
    of an official variant at stride 8. Fast leaves the layers of stage 3 before its last four at
    1; no stride comes back. The paper says which layers, and the authors' example the rates.

    Args:
      variant: the architecture.
      output_stride: pixels of the images per pixel of the last feature map.
      fast: dilate only the last four layers of the stage before the last, and the last stage.
    """
    layers = variant.layers(output_stride)[1:]
    last = sum(layer.stage == layers[-1].stage for layer in layers)
    dilated_from = len(layers) - last - FAST_LAYERS
    return tuple(
        1 if fast and index < dilated_from else layer.dilation for index, layer in enumerate(layers)
    )


class Segmenter(nn.Module):
    """The network; `create_segmenter` documents the attributes."""

    variant: Variant | ResNetVariant
    num_classes: int
    fast: bool = False
    output_stride: int = OUTPUT_STRIDE
    deploy: bool = False
    bins: tuple[int, ...] = (1, 2, 3, 6)
    width: int = 512
    auxiliary_width: int = 256
    dropout: float = 0.1
    bn_group_size: int | None = None
    train_form: TrainForm = "auto"
    lowering: Lowering = "auto"
    remat: bool | RematPolicy = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    activation: Activation | None = nn.relu
    epsilon: float = EPSILON
    momentum: float = 0.9

    def setup(self) -> None:
        """Makes the backbone, the pyramid and the heads."""
        # Attributes become the names of the tree: backbone, pyramid1, …, decoder, head.
        self.backbone = make_backbone(self)
        for windows in self.bins:
            level = conv_bn_block(self, 1, self.variant.features // len(self.bins))
            setattr(self, f"pyramid{windows}", level)
        self.decoder = conv_bn_block(self, 3, self.width)
        self.head = _pixel_classifier(self.num_classes, self.width, self.param_dtype)
        self.drop = _channel_dropout(self.dropout)
        if self.auxiliary_width and not self.deploy:
            width = self.auxiliary_width
            logits = _pixel_classifier(self.num_classes, width, self.param_dtype)
            self.aux_backbone = PixelHead(*conv_bn(self, width), logits, self.dropout)

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Class scores of every pixel.

        Args:
          images: (images, height, width, channels), normalized floating point numbers. Any size
            works; those of `output_stride * k + 1` pixels are the ones that feature maps cover
            from corner to corner.
          train: use and update batch statistics; pass `mutable=["batch_stats"]` and
            `rngs={"dropout": key}`, and `"auxiliary"` among the mutable ones to train the
            auxiliary head: its logits come back in that collection as `aux_backbone`.

        Returns:
          float32 logits (images, height, width, num_classes).

        Raises:
          ValueError: images of another rank, layout or type, or variables of the other form or of
            another number of classes.
        """
        if not self.is_initializing():
            head: dict[str, Any] = self.get_variable("params", "head", {})
            check_classes(f"PSPNet on {self.variant.name}", head, self.num_classes)
        maps = self.backbone.features(images, train)
        *_, before, last = maps
        x = maps[last]
        levels = [x]
        for windows in self.bins:
            pooled = adaptive_average_pool(x, (windows, windows))
            level = getattr(self, f"pyramid{windows}")(pooled, train)
            levels.append(resize_bilinear(level, x.shape[1:3], align_corners=True))
        x = self.decoder(jnp.concatenate(levels, axis=-1), train)
        logits = self._full_size(self.head(self.drop(_wide(x), not train)), images)
        wanted = train and self.is_mutable_collection("auxiliary")
        if self.auxiliary_width and not self.deploy and (wanted or self.is_initializing()):
            auxiliary = self.aux_backbone(maps[before], train)
            if not self.is_initializing():
                self.put_variable("auxiliary", "aux_backbone", self._full_size(auxiliary, images))
        return logits

    @nn.nowrap
    def fuse(self, variables: Any) -> Any:
        """The variables of `self.clone(deploy=True)`: `fuse_params` with this model's blocks.

        Raises:
          ValueError: as `fuse_params`; every block of the model must be there.
        """
        backbone = make_backbone(self)
        if isinstance(backbone, RepVGG):
            blocks, expect = {layer.block for layer in backbone.layers}, len(backbone.layers)
            geometries = backbone.geometries(variables["params"]["backbone"])
        else:
            blocks, expect, geometries = set(), backbone.variant.convolutions, None
        return fuse_params(
            variables,
            blocks=(*blocks, *CONV_BN),
            expect=expect + len(self.bins) + 1,
            epsilon=self.epsilon,
            geometries=geometries,
        )

    def _full_size(self, logits: jax.Array, images: jax.Array) -> jax.Array:
        return upsample(logits, self.output_stride, images.shape[1:3])


class PixelHead(nn.Module):
    """A classifier of pixels on an inner feature map, for training only.

    3x3 convolution, batch normalization, ReLU, channel dropout, 1x1 convolution. `fuse_params`
    drops it.
    """

    conv: nn.Conv
    bn: BatchNorm
    logits: nn.Conv
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits (images, height, width, classes) of feature maps of the same size."""
        x = nn.relu(self.bn(self.conv(x), train))
        return self.logits(_channel_dropout(self.dropout)(x, not train))


class Dropout(nn.Dropout):
    """Flax's, also on meshes with axes of type Explicit."""

    @nn.compact
    def __call__(
        self, inputs: jax.Array, deterministic: bool | None = None, rng: jax.Array | None = None
    ) -> jax.Array:
        """Drops some of the inputs, or none where `deterministic`."""
        if deterministic or not self.rate:
            return inputs
        rng = self.make_rng(self.rng_collection) if rng is None else rng
        drop = nn.Dropout(self.rate, self.broadcast_dims, deterministic=False, parent=None)
        return on_auto_axes(lambda x, rng: drop.apply({}, x, rng=rng), inputs, rng)


def make_backbone(segmenter: Segmenter) -> RepVGG | ResNet:
    """The backbone of a segmenter, whose variables are `backbone` in the segmenter's.

    Raises:
      ValueError: an output stride it cannot have, or `fast` for a ResNet.
    """
    if isinstance(segmenter.variant, ResNetVariant):
        if segmenter.fast:
            raise ValueError(
                f"fast=True dilates layers of a RepVGG, not of {segmenter.variant.name}"
            )
        segmenter.variant.layers(segmenter.output_stride)  # raises where it cannot be had
        return ResNet(
            segmenter.variant,
            output_stride=segmenter.output_stride,
            deploy=segmenter.deploy,
            bn_group_size=segmenter.bn_group_size,
            lowering=segmenter.lowering,
            remat=segmenter.remat,
            dtype=segmenter.dtype,
            param_dtype=segmenter.param_dtype,
            epsilon=segmenter.epsilon,
            momentum=segmenter.momentum,
        )
    return create_model(
        segmenter.variant,
        num_classes=0,
        deploy=segmenter.deploy,
        output_stride=segmenter.output_stride,
        dilations=dilations(segmenter.variant, segmenter.output_stride, fast=segmenter.fast),
        bn_group_size=segmenter.bn_group_size,
        train_form=segmenter.train_form,
        lowering=segmenter.lowering,
        remat=segmenter.remat,
        dtype=segmenter.dtype,
        param_dtype=segmenter.param_dtype,
        activation=segmenter.activation,
        epsilon=segmenter.epsilon,
        momentum=segmenter.momentum,
    )


def _backbone_variant(name: Any) -> Variant | ResNetVariant:
    if isinstance(name, str):
        key = re.sub(r"[^a-z0-9]", "", name.lower())
        for canonical, variant in RESNETS.items():
            if key == canonical.lower().replace("-", ""):
                return variant
    try:
        return get_variant(name)
    except ValueError as error:
        raise ValueError(f"{error}; segmenters also have {', '.join(RESNETS)}") from None


def _channel_dropout(rate: float) -> nn.Dropout:
    """Drops whole channels of an image, as PyTorch's `Dropout2d`."""
    return Dropout(rate, broadcast_dims=(1, 2))


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _pixel_classifier(num_classes: int, fan_in: int, param_dtype: jnp.dtype) -> nn.Conv:
    """A 1x1 convolution in at least float32: it costs little and decides everything."""
    return nn.Conv(
        num_classes,
        (1, 1),
        padding="VALID",
        kernel_init=torch_kernel_init,
        bias_init=torch_bias_init(fan_in),
        param_dtype=param_dtype,
    )
