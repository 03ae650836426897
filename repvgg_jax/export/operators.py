"""The deploy network as a list of operators, for formats that have operators of their own.

This is the only place where exporters learn what a block is made of. Formats that take a JAX
function do not need it. ONNX and TensorFlow translate each operator; the proof of every
artifact checks that list and JAX model agree.

All values are NHWC; kernels are HWIO, as in Flax.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from flax import linen as nn

from repvgg_jax.block import ReparamBlock
from repvgg_jax.export.network import Network

ACTIVATIONS: dict[str | None, Callable | None] = {
    None: None,
    "relu": nn.relu,
    "silu": nn.silu,
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
    """

    name: str
    kernel: np.ndarray
    bias: np.ndarray
    stride: int
    dilation: int
    groups: int

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
      kind: "relu" or "silu".
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


Operator = Conv | Activation | Linear | Gate | Pool | Softmax | Output


def operators(network: Network) -> list[Operator]:
    """What maps a network's normalized images to its output, in order.

    Raises:
      ValueError: a block has an activation that exports do not know.
    """
    found: list[Operator] = []
    model = network.model.bind({"params": network.params})
    layers = network.model.layers
    last = {layer.stage: layer.name for layer in layers}
    wanted = {last[stage]: stage for stage in network.feature_maps}
    for layer in layers:
        found += _block(layer.name, getattr(model, layer.name), network.params[layer.name])
        if stage := wanted.pop(layer.name, None):
            found.append(Output(stage))
            if not wanted:
                return found
    found.append(Pool())
    if network.model.num_classes:
        found.append(_linear("head", network.params["head"]))
    if network.output_name == "probabilities":
        found.append(Softmax())
    found.append(Output(network.output_name))
    return found


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
      ValueError: it is not one of ReLU, SiLU and none.
    """
    for kind, known in ACTIVATIONS.items():
        if function is known:
            return kind
    label = getattr(function, "__name__", function)
    raise ValueError(
        f"{where}: exports know the activations nn.relu, nn.silu and None, not {label}"
    )


def _linear(name: str, params: Any) -> Linear:
    return Linear(name, params["kernel"], params["bias"])
