"""The deploy network as a list of operators, for formats that have operators of their own.

This is the only place where exporters learn what a block is made of. Formats that take a JAX
function do not need it. ONNX and TensorFlow translate each operator; the proof of every
artifact checks that list and JAX model agree.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repvgg_jax import activations
from repvgg_jax.block import ReparamBlock
from repvgg_jax.export.network import Network
from repvgg_jax.export.operators import (
    IMAGES,
    Activation,
    Add,
    Conv,
    Gate,
    Join,
    Keep,
    Linear,
    MaxPool,
    Operator,
    Output,
    Pool,
    Resample,
    ResampleToSize,
    Softmax,
    Take,
    Widen,
)
from repvgg_jax.segmentation.network import make_backbone
from repvgg_jax.segmentation.resize import adaptive_average_pool, resize_bilinear, upsample
from repvgg_jax.segmentation.resnet import ResNet
from repvgg_jax.variants import Layer, residual_starts


def decompose(network: Network) -> list[Operator]:
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
    kind = activations.name_of(block.activation, name)
    activation: list[Operator] = [] if kind is None else [Activation(kind)]
    if block.se is None:
        yield from activation
        return
    dense = {child: _linear(f"{name}/se/{child}", params["se"][child]) for child in params["se"]}
    gate = Gate(f"{name}/se", dense["reduce"], dense["expand"])
    yield from (*activation, gate) if block.se.after_relu else (gate, *activation)


def _linear(name: str, params: Any) -> Linear:
    return Linear(name, params["kernel"], params["bias"])
