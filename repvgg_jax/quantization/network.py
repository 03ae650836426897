"""Which tensors of a network are quantized, and a forward pass that reads or changes them.

A runtime computes a convolution in integers if its inputs, its weights and its outputs are
quantized. So the inputs of every layer are, and its outputs where another layer does not follow at
once: before pooling, before a gate, before an activation that is not a ReLU, before a layer that
stays in float, on both ways into a sum. Gates, sums, pooling and interpolation compute in float;
logits stay floats.
"""

import dataclasses
import fnmatch
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import linen as nn

from repvgg_jax.model import RepVGG
from repvgg_jax.segmentation.network import Segmenter
from repvgg_jax.segmentation.resnet import ResNet
from repvgg_jax.text import first_few
from repvgg_jax.variants import SqueezeExcite, residual_starts

HEAD = "head"

Model = RepVGG | Segmenter

Before = Callable[[str, jax.Array], jax.Array]
"""Takes the path of a module and its input, and returns what the module is given."""

After = Callable[[str, jax.Array, nn.Module], jax.Array]
"""Takes the path of a module, its output and itself, and returns what the network goes on with."""


@dataclasses.dataclass(frozen=True)
class QuantizableLayer:
    """A convolution or linear layer, and what takes its output; names are paths of Linen modules.

    Attributes:
      name: of the block, e.g. `stage1_block0`, or of the layer that gives the logits.
      path: of the module that has kernel and bias, e.g. `stage1_block0/reparam`.
      then: the layer that its output goes to, if it goes to no other.
      at_once: whether a ReLU is all there is in between.
      relu: whether a ReLU follows the layer itself, or nothing; and no sum.
      gate: its squeeze-and-excite.
    """

    name: str
    path: str
    then: str | None = None
    at_once: bool = True
    relu: bool = True
    gate: SqueezeExcite | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What of a network is quantized; names are paths of Linen modules.

    Attributes:
      layers: convolutions and linear layers, in order, e.g. `stage1_block0/reparam`.
      inputs: modules whose input is quantized: the layers, and gates.
      outputs: modules whose output is quantized: convolutions and blocks.
      float_layers: those that stay in float by request.
    """

    layers: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    float_layers: tuple[str, ...] = ()

    @property
    def tensors(self) -> tuple[str, ...]:
        """All names of activations that are quantized."""
        return (*self.inputs, *(of_output(name) for name in self.outputs))


def of_output(module: str) -> str:
    """The name of a module's output; that of its input is the module's own."""
    return f"{module}/output"


def is_relu(activation: Any) -> bool:
    """Whether an activation commutes with positive factors."""
    return activation is None or activation is nn.relu or activation is jax.nn.relu


def checked(model: Any) -> Any:
    """A network of this package in deploy form, as it is calibrated.

    Raises:
      ValueError: another model, or one in training form.
    """
    if not isinstance(model, Model):
        raise ValueError(
            f"quantization takes classifiers and segmenters of this package, not "
            f"{type(model).__name__}; quantize another network with the tools of its runtime"
        )
    if not model.deploy:
        raise ValueError(
            f"{model.variant.name} is in training form; quantize its deploy form: "
            "model.clone(deploy=True) with model.fuse(variables)"
        )
    return model.clone(lowering="plain", remat=False, dtype="float32")


def layers_of(model: Model) -> tuple[QuantizableLayer, ...]:
    """All layers of a network in deploy form that can be quantized, in order."""
    if isinstance(model, Segmenter):
        return tuple(_of_segmenter(model))
    return tuple(_of_repvgg(model))


def _of_repvgg(model: RepVGG, above: str = "") -> Iterator[QuantizableLayer]:
    """The layers of a classifier or, below the path `above`, of a backbone."""
    following = [*(f"{above}{layer.name}" for layer in model.layers[1:]), None]
    if model.num_classes:
        following[-1] = HEAD
    branching = {start - 1 for start in residual_starts(model.layers).values()}
    for index, layer in enumerate(model.layers):
        name, then = f"{above}{layer.name}", following[index]
        activation = model.activation if layer.activate else None
        yield QuantizableLayer(
            name,
            f"{name}/{layer.block.deploy}",
            None if index in branching else then,
            at_once=then != HEAD,
            relu=is_relu(activation) and not layer.residual,
            gate=layer.se,
        )
    if model.num_classes:
        head = model.variant.head_layer(model.num_classes)
        yield QuantizableLayer(HEAD, f"{HEAD}/{head.block.deploy}" if head else HEAD)


def _of_segmenter(model: Segmenter) -> Iterator[QuantizableLayer]:
    network, above = model.bind({}), "backbone/"
    backbone: Any = network.backbone
    yield from (
        _of_resnet(backbone, above) if isinstance(backbone, ResNet) else _of_repvgg(backbone, above)
    )
    for name in (*(f"pyramid{windows}" for windows in model.bins), "decoder"):
        then = HEAD if name == "decoder" else None
        yield QuantizableLayer(name, f"{name}/{getattr(network, name).spec.deploy}", then)
    yield QuantizableLayer(HEAD, HEAD)


def _of_resnet(backbone: ResNet, above: str) -> Iterator[QuantizableLayer]:
    def chain(names: list[str], block: Any) -> Iterator[QuantizableLayer]:
        for name, then in zip(names, [*names[1:], None], strict=True):
            yield QuantizableLayer(name, f"{name}/{block.spec.deploy}", then)

    yield from chain([f"{above}stem{index}" for index in range(3)], backbone.stem0)
    for layer in backbone.layers:
        block = getattr(backbone, layer.name)
        if layer.projects:
            yield from chain([f"{above}{layer.name}/shortcut"], block.conv0)
        yield from chain([f"{above}{layer.name}/conv{index}" for index in range(3)], block.conv0)


def commutes(model: Model) -> bool:
    """Whether factors of channels can move from one layer to the next: ReLUs, no residual sums."""
    return all(layer.relu for layer in layers_of(model))


def chains(model: Model) -> tuple[tuple[str, ...], ...]:
    """Layers that follow one another, in the order of the data, for `reparam.equalize`.

    All of a classifier are one chain. A segmenter has several: its backbone (of a ResNet the stem
    and every bottleneck), and decoder and head.

    Raises:
      ValueError: an activation that does not commute with positive factors.
    """
    if not commutes(model):
        name = getattr(model.activation, "__name__", model.activation)
        reason = "residual connections" if is_relu(model.activation) else name
        raise ValueError(
            f"equalization is exact for chains with ReLU, not for {reason}; leave it out: "
            "--equalize=false"
        )
    found: list[list[str]] = []
    wanted = None
    for layer in layers_of(model):
        if layer.name == wanted:
            found[-1].append(layer.name)
        else:
            found.append([layer.name])
        wanted = layer.then
    return tuple(tuple(names) for names in found if len(names) > 1)


def chain(model: RepVGG) -> tuple[str, ...]:
    """The layers of a classifier in the order of its data: the only one of its `chains`.

    Raises:
      ValueError: a segmenter, which has several; or as `chains`.
    """
    found = chains(model)
    if len(found) != 1:
        raise ValueError(f"{len(found)} chains of layers, not one; quantization.chains gives them")
    return found[0]


def plan(model: Model, float_layers: tuple[str, ...] = ()) -> Plan:
    """What of a network is quantized.

    Args:
      model: in deploy form.
      float_layers: names or paths of layers that stay in float, or patterns, e.g. `stage4_*`.

    Raises:
      ValueError: no such layer, or all of them.
    """
    known = layers_of(model)
    names = [layer.name for layer in known]
    kept: list[str] = []
    for pattern in float_layers:
        found = [layer.name for layer in known if fnmatch.filter((layer.name, layer.path), pattern)]
        if not found:
            raise ValueError(
                f"--float-layers={pattern} is no layer of {model.variant.name}; it has "
                f"{first_few(names)}"
            )
        kept += found
    if set(kept) == set(names):
        raise ValueError(f"--float-layers={','.join(float_layers)} leaves nothing to quantize")
    layers, inputs, outputs = [], [], []
    for layer in known:
        if layer.name in kept:
            continue
        layers.append(layer.path)
        inputs.append(layer.path)
        if layer.name == HEAD:
            continue
        if not layer.relu or (layer.gate and not layer.gate.after_relu):
            outputs.append(layer.path)
        elif layer.gate:
            inputs.append(f"{layer.name}/se")
        elif not layer.at_once or layer.then is None or layer.then in kept:
            outputs.append(layer.name)
    return Plan(tuple(layers), tuple(inputs), tuple(outputs), tuple(dict.fromkeys(kept)))


def forward(
    model: Model,
    variables: Any,
    images: jax.Array,
    *,
    before: Mapping[str, Before] | None = None,
    after: Mapping[str, After] | None = None,
) -> jax.Array:
    """A network's logits, with hooks on inputs and outputs of its modules, by path."""
    before, after = before or {}, after or {}

    def interceptor(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        name = "/".join(context.module.path)
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        x, *rest = args
        if hook := before.get(name):
            x = hook(name, x)
        y = call(x, *rest, **kwargs)
        return after[name](name, y, context.module) if name in after else y

    with nn.intercept_methods(interceptor):
        logits: Any = model.apply(variables, images)
    return logits


def layer_of(params: Any, name: str) -> Any:
    """Kernel and bias of a layer, by its path."""
    for key in name.split("/"):
        params = params[key]
    return params


def with_layers(params: Any, changed: Mapping[str, Any]) -> Any:
    """Parameters with other kernels and biases of some layers, by path; nothing is changed."""
    found = dict(params)
    for name, value in changed.items():
        first, _, rest = name.partition("/")
        found[first] = (
            with_layers(found[first], {rest: value}) if rest else {**found[first], **value}
        )
    return found
