"""Which tensors of a network are quantized, and a forward pass that reads or changes them.

A runtime computes a convolution in integers if its inputs, its weights and its outputs are
quantized. So the inputs of every layer are, and its outputs where another layer does not follow at
once: before pooling, before a gate, before an activation that is not a ReLU, before a layer that
stays in float, on both ways into a sum. Gates, sums and pooling compute in float.
"""

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn

from repvgg_jax.model import RepVGG
from repvgg_jax.text import first_few
from repvgg_jax.variants import residual_starts

Before = Callable[[str, jax.Array], jax.Array]
"""Takes the path of a module and its input, and returns what the module is given."""

After = Callable[[str, jax.Array, nn.Module], jax.Array]
"""Takes the path of a module, its output and itself, and returns what the network goes on with."""


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


def checked(model: Any) -> RepVGG:
    """A classifier of this package in deploy form, as it is calibrated.

    Raises:
      ValueError: another model, or one in training form.
    """
    if not isinstance(model, RepVGG):
        raise ValueError(
            f"quantization takes classifiers of this package, not {type(model).__name__}; "
            "quantize another network with the tools of its runtime"
        )
    if not model.deploy:
        raise ValueError(
            f"{model.variant.name} is in training form; quantize its deploy form: "
            "model.clone(deploy=True) with model.fuse(variables)"
        )
    return model.clone(lowering="plain", remat=False, dtype="float32")


def chain(model: RepVGG) -> tuple[str, ...]:
    """The layers of a classifier in the order of its data, for `reparam.equalize`.

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
    return (*(layer.name for layer in model.layers), *(["head"] if model.num_classes else []))


def commutes(model: RepVGG) -> bool:
    """Whether a network is a chain in which factors can move from one layer to the next."""
    return is_relu(model.activation) and not any(layer.residual for layer in model.layers)


def _heads(model: RepVGG) -> tuple[str, ...]:
    """The path of the classifier's layer; nothing without one."""
    if not model.num_classes:
        return ()
    head = model.variant.head_layer(model.num_classes)
    return (f"head/{head.block.deploy}" if head else "head",)


def plan(model: RepVGG, float_layers: tuple[str, ...] = ()) -> Plan:
    """What of a classifier is quantized.

    Args:
      model: in deploy form.
      float_layers: names of layers that stay in float, or patterns, e.g. `stage4_*`.

    Raises:
      ValueError: no such layer, or all of them.
    """
    names = [layer.name for layer in model.layers] + (["head"] if model.num_classes else [])
    kept: list[str] = []
    for pattern in float_layers:
        found = fnmatch.filter(names, pattern)
        if not found:
            raise ValueError(
                f"--float-layers={pattern} is no layer of {model.variant.name}; it has "
                f"{first_few(names)}"
            )
        kept += found
    if set(kept) == set(names):
        raise ValueError(f"--float-layers={','.join(float_layers)} leaves nothing to quantize")
    layers, inputs, outputs = [], [], []
    branching = {start - 1 for start in residual_starts(model.layers).values()}
    for i, layer in enumerate(model.layers):
        if layer.name in kept:
            continue
        conv = f"{layer.name}/{layer.block.deploy}"
        layers.append(conv)
        inputs.append(conv)
        following = model.layers[i + 1].name if i + 1 < len(model.layers) else None
        behind = layer.se and not layer.se.after_relu
        activation = model.activation if layer.activate else None
        if not is_relu(activation) or behind or layer.residual:
            outputs.append(conv)
        elif layer.se:
            inputs.append(f"{layer.name}/se")
        elif following is None or following in kept or i in branching:
            outputs.append(layer.name)
    if "head" not in kept:
        layers += _heads(model)
        inputs += _heads(model)
    return Plan(tuple(layers), tuple(inputs), tuple(outputs), tuple(dict.fromkeys(kept)))


def forward(
    model: RepVGG,
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
