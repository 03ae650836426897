"""The deploy network as a walk over seven operators, for formats that have their own.

A format that takes JAX functions does not need this. The others (ONNX, TensorFlow) say what
a convolution and so on is in their language, and `walk` puts them in order. That is a second
definition of the network beside `repvgg_jax.model`; the proof of every artefact holds the two
together.
"""

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

from repvgg_jax.export.network import Network
from repvgg_jax.variants import Layer

T = TypeVar("T")


class Operators(Protocol[T]):
    """What a format must be able to say. Parameters have Flax's names and shapes."""

    def enter(self, images: T) -> T:
        """From the artefact's input to the stem's: layout, type, preprocessing."""

    def conv(self, x: T, layer: Layer, params: Mapping[str, Any]) -> T:
        """The 3x3 convolution of a block, with its bias, padded by its dilation."""

    def relu(self, x: T) -> T:
        """max(x, 0)."""

    def gate(self, x: T, layer: Layer, params: Mapping[str, Any]) -> T:
        """Squeeze-and-excite: `x` times a gate for every channel."""

    def pool(self, x: T) -> T:
        """Mean over all pixels: (images, channels), in float32."""

    def classify(self, x: T, params: Mapping[str, Any]) -> T:
        """The linear layer, in float32."""

    def softmax(self, x: T) -> T:
        """Logits to probabilities."""


def walk(network: Network, params: Mapping[str, Any], operators: Operators[T], images: T) -> T:
    """Builds the network out of a format's operators.

    Args:
      network: what to build.
      params: its parameters as the operators take them.
      operators: the format's.
      images: the artefact's input.

    Returns:
      The artefact's output.
    """
    x = operators.enter(images)
    se = network.model.variant.se
    for layer in network.model.layers:
        block = params[layer.name]
        x = operators.conv(x, layer, block["reparam"])
        if se is None:
            x = operators.relu(x)
        elif se.after_relu:
            x = operators.gate(operators.relu(x), layer, block["se"])
        else:
            x = operators.relu(operators.gate(x, layer, block["se"]))
    x = operators.pool(x)
    if network.model.num_classes:
        x = operators.classify(x, params["head"])
    return operators.softmax(x) if network.output_name == "probabilities" else x
