"""The deploy network as a list of operators, for formats that have operators of their own.

This is the only place where exporters learn what a block is made of. Formats that take a JAX
function do not need it. ONNX and TensorFlow translate each operator; the proof of every
artifact checks that list and JAX model agree.

All values are NHWC; kernels are HWIO, as in Flax.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from repvgg_jax.block import ReparamBlock
from repvgg_jax.export.network import Network
from repvgg_jax.layers import ACTIVATIONS as FUNCTIONS
from repvgg_jax.segmentation.network import make_backbone
from repvgg_jax.segmentation.resize import adaptive_average_pool, resize_bilinear, upsample
from repvgg_jax.segmentation.resnet import ResNet
from repvgg_jax.variants import Layer, residual_starts

ACTIVATIONS: dict[str | None, Callable | None] = {
    None: None,
    **dict(FUNCTIONS.items()),
}
"""Activations of blocks that exports know, by the name in `Activation.kind`."""


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
    """As `Resample`, by matrices that the artifact computes, for images of any size.

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
    """From here on in float32."""


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


def operators(network: Network) -> list[Operator]:
    """What maps a network's normalized images to its output, in order.

    Raises:
      ValueError: a block has an activation that exports do not know.
    """
    if network.is_segmenter:
        return list(_segmenter(network))
    found: list[Operator] = []
    model = network.model.bind({"params": network.params})
    layers = network.model.layers
    last = {layer.stage: layer.name for layer in layers}
    wanted = {last[stage]: stage for stage in network.feature_maps}
    for layer, of_layer in _layers(model, network.params):
        found += of_layer
        if stage := wanted.pop(layer.name, None):
            found.append(Output(stage))
            if not wanted:
                return found
    found.append(Pool())
    if network.model.num_classes:
        found.append(_head(network.params["head"]))
    if network.output_name == "probabilities":
        found.append(Softmax())
    found.append(Output(network.output_name))
    return found


def _layers(model: Any, params: Any, above: str = "") -> Iterator[tuple[Layer, list[Operator]]]:
    """The layers of a bound classifier or, below a path, backbone, each with its operators."""
    starts = residual_starts(model.layers)
    for index, layer in enumerate(model.layers):
        found: list[Operator] = []
        if index in starts.values():
            found.append(Keep(f"{above}{layer.name}/input"))
        found += _block(f"{above}{layer.name}", getattr(model, layer.name), params[layer.name])
        if layer.residual:
            found.append(Add(f"{above}{model.layers[starts[index]].name}/input"))
        yield layer, found


def _head(params: Any) -> Linear:
    """The classifier, which may be a block on a single pixel."""
    if "kernel" in params:
        return _linear("head", params)
    ((name, fused),) = params.items()
    return Linear(f"head/{name}", fused["kernel"][0, 0], fused["bias"])


def _segmenter(network: Network) -> Iterator[Operator]:
    """The operators of a segmenter, for images of the network's size or of any."""
    params, model = network.params, network.model.bind({"params": network.params})
    yield Keep(IMAGES)
    yield from _backbone(model.backbone, params["backbone"])
    dynamic, size, stride = network.dynamic_size, _map_size(network), network.model.output_stride
    yield Keep("maps")
    names = ["maps"]
    for windows in network.model.bins:
        name = f"pyramid{windows}"
        yield Take("maps")
        if dynamic:
            yield ResampleToSize(f"{name}/pool", "pool", stride, windows)
        else:
            yield _resample(f"{name}/pool", adaptive_average_pool, size, (windows, windows))
        yield from _block(name, getattr(model, name), params[name])
        if dynamic:
            yield ResampleToSize(f"{name}/resize", "corners", stride, windows)
        else:
            resize = functools.partial(resize_bilinear, align_corners=True)
            yield _resample(f"{name}/resize", resize, (windows, windows), size)
        yield Keep(name)
        names.append(name)
    yield Join(tuple(names))
    yield from _block("decoder", model.decoder, params["decoder"])
    yield Widen()
    head = params["head"]
    yield Conv("head", head["kernel"], head["bias"], stride=1, dilation=1, groups=1, wide=True)

    def enlarge(x: jax.Array, after: tuple[int, int]) -> jax.Array:
        return upsample(x, stride, after)

    if dynamic:
        yield ResampleToSize("head/resize", "stride", stride, wide=True)
    else:
        yield _resample("head/resize", enlarge, size, network.image_shape[:2], wide=True)
    if network.output_name == "probabilities":
        yield Softmax()
    yield Output(network.output_name)


def _map_size(network: Network) -> tuple[int, int]:
    """Height and width of a segmenter's last feature map, for images of the network's size."""
    backbone, params = make_backbone(network.model), network.params["backbone"]
    maps = jax.eval_shape(
        lambda image: backbone.apply({"params": params}, image, method="features"),
        jax.ShapeDtypeStruct((1, *network.image_shape), np.float32),
    )
    height, width = maps[backbone.layers[-1].stage].shape[1:3]
    return height, width


def _backbone(backbone: Any, params: Any) -> Iterator[Operator]:
    """The operators of a segmenter's backbone."""
    if not isinstance(backbone, ResNet):
        for _, of_layer in _layers(backbone, params, "backbone/"):
            yield from of_layer
        return
    for name in ("stem0", "stem1", "stem2"):
        yield from _block(f"backbone/{name}", getattr(backbone, name), params[name])
    yield MaxPool()
    for layer in backbone.layers:
        name, block, of_layer = (
            f"backbone/{layer.name}",
            getattr(backbone, layer.name),
            params[layer.name],
        )

        def conv(
            part: str, name: str = name, block: Any = block, of_layer: Any = of_layer
        ) -> Iterator[Operator]:
            return _block(f"{name}/{part}", getattr(block, part), of_layer[part])

        source, shortcut = f"{name}/input", f"{name}/shortcut"
        yield Keep(source)
        if "shortcut" in of_layer:
            yield from conv("shortcut")
            yield Keep(shortcut)
            yield Take(source)
        for part in ("conv0", "conv1", "conv2"):
            yield from conv(part)
        yield Add(shortcut if "shortcut" in of_layer else source)
        yield Activation("relu")


def _resample(
    name: str,
    function: Callable[[jax.Array, tuple[int, int]], jax.Array],
    before: tuple[int, int],
    after: tuple[int, int],
    *,
    wide: bool = False,
) -> Resample:
    """A function that is linear along each axis, as the two matrices that it multiplies by."""

    def matrix(length: int, wanted: int) -> np.ndarray:
        impulses = jnp.eye(length, dtype=jnp.float32).reshape(1, length, 1, length)
        with jax.default_matmul_precision("highest"):
            return np.asarray(function(impulses, (wanted, 1)))[0, :, 0]

    rows, columns = (matrix(*pair) for pair in zip(before, after, strict=True))
    return Resample(name, rows, columns, wide)


def _block(name: str, block: ReparamBlock, params: Any) -> Iterator[Operator]:
    """The operators of a block in deploy form."""
    fused = params[block.spec.deploy]
    yield Conv(
        name=f"{name}/{block.spec.deploy}",
        kernel=fused["kernel"],
        bias=fused["bias"],
        stride=block.stride,
        dilation=block.dilation,
        groups=block.groups,
    )
    kind = activation_kind(block.activation, name)
    activation: list[Operator] = [] if kind is None else [Activation(kind)]
    if block.se is None:
        yield from activation
        return
    dense = {child: _linear(f"{name}/se/{child}", params["se"][child]) for child in params["se"]}
    gate = Gate(f"{name}/se", dense["reduce"], dense["expand"])
    yield from (*activation, gate) if block.se.after_relu else (gate, *activation)


def activation_kind(function: Callable | None, where: str) -> str | None:
    """What exports call an activation function; None for no activation.

    Raises:
      ValueError: it is not one of `ACTIVATIONS`.
    """
    for kind, known in ACTIVATIONS.items():
        if function is known:
            return kind
    label = getattr(function, "__name__", function)
    raise ValueError(
        f"{where}: exports know the activations nn.relu, nn.silu, repvgg_jax.layers.gelu and None, "
        f"not {label}"
    )


def _linear(name: str, params: Any) -> Linear:
    return Linear(name, params["kernel"], params["bias"])
