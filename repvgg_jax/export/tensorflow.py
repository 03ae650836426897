"""The network in TensorFlow's own operators, which SavedModel and LiteRT share.

NHWC, like the JAX model, so nothing is transposed. Plain TensorFlow operators instead of an
embedded XLA module: every converter and server can read and optimise them.
"""

import os
from collections.abc import Mapping
from typing import Any

from repvgg_jax.export.network import Network
from repvgg_jax.export.operators import walk
from repvgg_jax.variants import Layer

SIGNATURE = "serving_default"


def load() -> Any:
    """TensorFlow, quietly and without its hands on the accelerators that JAX is using."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # only counts before the first import
    import tensorflow as tf

    if tf.config.get_visible_devices("GPU"):
        tf.config.set_visible_devices([], "GPU")
    return tf


def build(network: Network) -> Any:
    """A `tf.Module` with the weights as variables and a `tf.function` called `serve`."""
    tf = load()
    module = tf.Module(name="repvgg")
    module.params = tf.nest.map_structure(tf.Variable, network.params)
    operators = _Operators(network, tf)

    def serve(images: Any) -> dict[str, Any]:
        return {network.output_name: walk(network, module.params, operators, images)}

    spec = tf.TensorSpec((None, *network.image_shape), network.images.dtype, network.input_name)
    module.serve = tf.function(serve, input_signature=[spec])
    return module


class _Operators:
    """TensorFlow's operators; what flows between them are tensors."""

    def __init__(self, network: Network, tf: Any):
        self.network = network
        self.tf = tf

    def enter(self, images: Any) -> Any:
        if not self.network.with_preprocessing:
            return images
        metadata = self.network.metadata
        return self.tf.cast(images, self.tf.float32) * metadata.scale + metadata.shift

    def conv(self, x: Any, layer: Layer, params: Mapping[str, Any]) -> Any:
        pad = (layer.dilation, layer.dilation)
        # At stride 1 "SAME" is this very padding, and needs no operator of its own.
        padding = "SAME" if layer.stride == 1 else [(0, 0), pad, pad, (0, 0)]
        x = self.tf.nn.conv2d(
            x, params["kernel"], layer.stride, padding, dilations=layer.dilation, name=layer.name
        )
        return self.tf.nn.bias_add(x, params["bias"])

    def relu(self, x: Any) -> Any:
        return self.tf.nn.relu(x)

    def gate(self, x: Any, layer: Layer, params: Mapping[str, Any]) -> Any:
        # Linear layers on one pixel: as convolutions they need no reshaping.
        gate = self.tf.reduce_mean(x, (1, 2), keepdims=True)
        gate = self.tf.nn.relu(self._pointwise(gate, params["reduce"]))
        return x * self.tf.sigmoid(self._pointwise(gate, params["expand"]))

    def pool(self, x: Any) -> Any:
        return self.tf.reduce_mean(x, (1, 2))

    def classify(self, x: Any, params: Mapping[str, Any]) -> Any:
        return self.tf.nn.bias_add(self.tf.matmul(x, params["kernel"]), params["bias"])

    def softmax(self, x: Any) -> Any:
        return self.tf.nn.softmax(x)

    def _pointwise(self, x: Any, params: Mapping[str, Any]) -> Any:
        kernel = params["kernel"][None, None]
        return self.tf.nn.bias_add(self.tf.nn.conv2d(x, kernel, 1, "VALID"), params["bias"])
