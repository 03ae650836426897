"""A layer of a network: one block, its place, and everything that fixes its shapes."""

import dataclasses
import math
from collections.abc import Sequence

from repvgg_jax.reparam import REPVGG, BlockSpec, Geometry
from repvgg_jax.text import one_line, positive_integer


@dataclasses.dataclass(frozen=True)
class SqueezeExcite:
    """Squeeze-and-excite of every block of a variant.

    Attributes:
      reduction: the squeezed width is `channels // reduction`.
      after_relu: False multiplies before the ReLU (D2se), True after it (plus-L2pse).
      multiple: the squeezed width is `channels / reduction` to the nearest multiple of this
        number, at least one.
    """

    reduction: int = 16
    after_relu: bool = False
    multiple: int = 1

    def __post_init__(self) -> None:
        for field in ("reduction", "multiple"):
            number = positive_integer("SqueezeExcite", field, getattr(self, field))
            object.__setattr__(self, field, number)

    def squeezed(self, channels: int) -> int:
        """The width inside, for that many channels."""
        if self.multiple == 1:
            return channels // self.reduction
        nearest = int(channels / self.reduction + self.multiple / 2) // self.multiple
        return max(1, nearest) * self.multiple


@dataclasses.dataclass(frozen=True)
class Layer:
    """One block and its place in the network; everything that fixes its shapes.

    Attributes:
      name: the block's name in the parameter tree, `stem` or `stage1_block0`; a second layer of
        the stem is `stem_block1`.
      in_channels: channels in; None for the stem, which follows the images.
      features: channels out.
      stride: spatial stride of the block.
      dilation: dilation of kernels and poolings larger than 1x1, which are padded by as much.
      groups: channel groups of convolutions that have no groups of their own.
      identity: whether the block has the terms for equal input and output shape.
      block: what the block computes.
      se: its squeeze-and-excite, or None.
      activate: whether the network's activation follows.
      residual: layers that a residual connection around this one and those before it spans: the
        first one's input is added to this one's output; 0 for no such connection.
      wide: whether it computes in at least float32, whatever the network computes in.
    """

    name: str
    in_channels: int | None
    features: int
    stride: int
    dilation: int
    groups: int
    identity: bool
    block: BlockSpec = REPVGG
    se: SqueezeExcite | None = None
    activate: bool = True
    residual: int = 0
    wide: bool = False

    def __post_init__(self) -> None:
        for field in ("features", "stride", "dilation", "groups"):
            number = positive_integer(f"layer {self.name}", field, getattr(self, field))
            object.__setattr__(self, field, number)
        if self.residual != 0:
            number = positive_integer(f"layer {self.name}", "residual", self.residual)
            object.__setattr__(self, "residual", number)
        for field, kind in (("block", BlockSpec), ("se", SqueezeExcite)):
            value = getattr(self, field)
            if not isinstance(value, kind) and (field, value) != ("se", None):
                raise ValueError(
                    f"layer {self.name}: {field}={one_line(repr(value), 60)} must be a "
                    f"{kind.__name__}"
                )

    def geometry(self, image_channels: int = 3) -> Geometry:
        """The shapes of its block, for images of that many channels."""
        return Geometry(
            in_channels=self.in_channels or image_channels,
            features=self.features,
            stride=self.stride,
            dilation=self.dilation,
            groups=self.groups,
            same_shape=self.identity,
        )

    @property
    def stage(self) -> str:
        """Stage of the block: `stem`, `stage1`, `stage2` and so on."""
        return self.name.partition("_")[0]

    @property
    def index(self) -> int:
        """Index of the block in its stage, from 0."""
        return int(self.name.partition("_block")[2] or 0)


def residual_starts(layers: Sequence[Layer]) -> dict[int, int]:
    """Maps the index of each layer that ends a residual connection to that of its first layer."""
    return {end: end + 1 - layer.residual for end, layer in enumerate(layers) if layer.residual}


def check_layers(layers: Sequence[Layer], *, features: int, total_stride: int) -> None:
    """Checks the layers of a network, in order, with their own strides.

    Args:
      layers: all of them.
      features: channels that the last one has to give.
      total_stride: the product that their strides have to have.

    Raises:
      ValueError: the first layer that does not fit, and why.
    """
    if not layers:
        raise ValueError("it has no layers")
    given = None
    for position, layer in enumerate(layers):
        if layer.in_channels != given:
            why = "is the first layer: those of the images (None)"
            if given is not None:
                why = f"{layers[position - 1].name} gives {given}"
            raise ValueError(
                f"{layer.name} takes {layer.in_channels} channels (in_channels), but {why}"
            )
        given = layer.features
        _check_alone(layer)
        if layer.residual:
            _check_residual(layers, position)
    if given != features:
        raise ValueError(
            f"{layers[-1].name}, the last layer, gives {given} channels (features), not {features}"
        )
    if (stride := math.prod(layer.stride for layer in layers)) != total_stride:
        raise ValueError(
            f"the strides of its layers multiply to {stride}, not to {total_stride} as "
            "stem_stride and strides say"
        )


def _check_alone(layer: Layer) -> None:
    for what, channels in (("in", layer.in_channels), ("out", layer.features)):
        if channels is not None and channels % layer.groups:
            raise ValueError(
                f"{layer.name} has {channels} channels {what}, which {layer.groups} groups do not "
                "divide"
            )
    if layer.dilation != 1:
        raise ValueError(
            f"{layer.name} has dilation={layer.dilation}, but dilations follow from the output "
            "stride; leave it at 1, or give the convolutions of its block a dilation"
        )
    if layer.in_channels is None and layer.groups > 1:
        raise ValueError(
            f"{layer.name}, the first layer, has {layer.groups} groups; it must have 1, since "
            "images have any number of channels"
        )
    same = layer.in_channels in (None, layer.features)  # None: images may have as many
    if layer.identity and (layer.stride > 1 or not same):
        raise ValueError(
            f"{layer.name} has identity=True, but {layer.in_channels} channels in, "
            f"{layer.features} out, and stride {layer.stride}; these have to be equal, and 1"
        )


def _check_residual(layers: Sequence[Layer], position: int) -> None:
    """Checks the residual connection that ends at a layer."""
    layer = layers[position]
    number = layer.residual
    if number > position:
        raise ValueError(
            f"{layer.name} has residual={number}; it must be 0, or the number of layers that a "
            f"residual connection spans, up to {position} here (the stem's first is not spanned)"
        )
    spanned = layers[position + 1 - number : position + 1]
    stride = math.prod(other.stride for other in spanned)
    if stride > 1 or spanned[0].in_channels != layer.features:
        raise ValueError(
            f"{layer.name} has residual={number}: {spanned[0].name} takes "
            f"{spanned[0].in_channels} channels and {layer.name} gives {layer.features} at a "
            f"stride of {stride}; they have to be equal, and the stride 1"
        )
