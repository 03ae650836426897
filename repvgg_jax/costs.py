"""What a network costs: parameters and multiplications, counted from its layers."""

import dataclasses
import math

from repvgg_jax.reparam import Conv, leaves, macs
from repvgg_jax.text import positive_integer
from repvgg_jax.variants import Variant, get_variant


@dataclasses.dataclass(frozen=True)
class Cost:
    """Costs of one image through one network: exact integers, counted from the `Variant`.

    They reproduce the paper's Tables 4 and 5, which print them truncated.

    A multiply-accumulate (MAC) of a convolution, of squeeze-and-excite or of the classifier
    counts one; what the paper calls FLOPs. Additions, ReLU, BN and pooling count nothing.

    Attributes:
      params_train: trainable parameters of the training form (running statistics are
        not parameters), without auxiliary heads.
      params_deploy: parameters of the fused form.
      params_auxiliary: parameters of the auxiliary heads, which exist in training only.
      macs_train: MACs of a forward pass in the training form, without auxiliary heads.
      macs_deploy: MACs of a forward pass in the fused form.
      winograd_muls: multiplications of the fused form when every 3x3 convolution of stride 1
        runs as Winograd F(2x2, 3x3), which needs 4/9 of them (paper, section 4.1).
    """

    params_train: int
    params_deploy: int
    params_auxiliary: int
    macs_train: int
    macs_deploy: int
    winograd_muls: int


def cost(
    variant: str | Variant,
    *,
    image_size: int | tuple[int, int] = 224,
    in_channels: int = 3,
    num_classes: int = 1000,
    output_stride: int | None = None,
) -> Cost:
    """Counts a variant's parameters and multiplications.

    Args:
      variant: a name in `VARIANTS` or `FAMILY`, or a `Variant`.
      image_size: of the images, in pixels: the side of squares, or (height, width).
      in_channels: channels of the images.
      num_classes: classes of the classifier; 0 for none.
      output_stride: as in `create_model`.

    Raises:
      ValueError: unknown variant, an output stride it cannot have, or no size.
    """
    variant = get_variant(variant)
    size = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    height, width = (positive_integer("cost", "image_size", side) for side in size)
    size = height, width
    params_train = params_deploy = params_auxiliary = 0
    macs_train = macs_deploy = winograd = 0
    head = variant.head_layer(num_classes)
    for layer in (*variant.layers(output_stride), *([head] if head else [])):
        if layer is head:
            size = 1, 1
        geometry, expression = layer.geometry(in_channels), layer.block.train
        for leaf in leaves(expression, geometry):
            if leaf.collection == "params":
                params_train += math.prod(leaf.shape)
        macs_train += macs(expression, geometry, *size)
        height, width = layer.block.kernel_size(geometry)
        deploy = Conv(layer.block.deploy, (height, width), bias=True)
        params_deploy += sum(math.prod(leaf.shape) for leaf in leaves(deploy, geometry))
        products = macs(deploy, geometry, *size)
        macs_deploy += products
        is_winograd = (height, width) == (3, 3) and layer.stride == 1
        winograd += products * 4 // 9 if is_winograd else products
        size = -(-size[0] // layer.stride), -(-size[1] // layer.stride)
        if layer.se is not None:
            squeezed = layer.se.squeezed(layer.features)
            weights = 2 * layer.features * squeezed
            params_train += weights + squeezed + layer.features
            params_deploy += weights + squeezed + layer.features
            macs_train, macs_deploy, winograd = (
                n + weights for n in (macs_train, macs_deploy, winograd)
            )
        if layer.name in variant.auxiliary:
            width = layer.features
            params_auxiliary += 9 * width * width + 2 * width + (width + 1) * num_classes
    classes = 0 if head else num_classes
    classifier = variant.features * classes
    return Cost(
        params_train=params_train + classifier + classes,
        params_deploy=params_deploy + classifier + classes,
        params_auxiliary=params_auxiliary,
        macs_train=macs_train + classifier,
        macs_deploy=macs_deploy + classifier,
        winograd_muls=winograd + classifier,
    )
