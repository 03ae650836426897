"""LiteRT in int8: the graph of `tensorflow.py` with fake quantization, which the converter removes.

The converter would calibrate by itself, with the largest values only. Given operators that round to
stated ranges, it takes those: a .tflite file has the same ranges as the ONNX file.
"""

from pathlib import Path
from typing import Any

import numpy as np

from repvgg_jax.export import operators
from repvgg_jax.export.network import Network
from repvgg_jax.export.onnx_int8 import SETTINGS
from repvgg_jax.export.tensorflow import (
    TFLITE,
    Translated,
    build,
    converter_of,
    describe,
    load,
    translate_operator,
    variables_of,
)
from repvgg_jax.quantization.network import of_output
from repvgg_jax.quantization.quantize import Quantized


def write(network: Network, quantized: Quantized, path: Path) -> None:
    """Writes a .tflite file; see `onnx_int8.write`."""
    tf = load()
    converter = converter_of(build(network, _Rounding(quantized)), tf)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    path.write_bytes(converter.convert())
    description = network.description(TFLITE.layout)
    describe(path, network, {**description, SETTINGS: quantized.settings.as_dict()})


class _Rounding:
    """Operators with the rounding that belongs before and behind them."""

    def __init__(self, quantized: Quantized):
        self.quantized = quantized
        self._block = ""  # whose output is not rounded yet

    def __call__(self, operator: operators.Operator, tf: Any, kept: dict[str, Any]) -> Translated:
        """An operator as a function and its variables."""
        before, after = [], []
        if not isinstance(operator, (operators.Activation, operators.Gate)):
            before.append(of_output(self._block))
            self._block = ""
        if isinstance(operator, (operators.Conv, operators.Gate, operators.Linear)):
            before.append(operator.name)
        if isinstance(operator, operators.Conv):
            after.append(of_output(operator.name))
            self._block = operator.name.rpartition("/")[0]
        function, variables = (
            _classifier(operator, tf)
            if isinstance(operator, operators.Linear)
            else translate_operator(operator, tf, kept)
        )

        def rounded(x: Any, *variables: Any) -> Any:
            for name in before:
                x = self._rounded(tf, name, x)
            x = function(x, *self._weights(tf, operator, variables))
            for name in after:
                x = self._rounded(tf, name, x)
            return x

        return rounded, variables

    def _rounded(self, tf: Any, tensor: str, x: Any) -> Any:
        grid = self.quantized.activations.get(tensor)
        if grid is None:
            return x
        return tf.quantization.fake_quant_with_min_max_args(x, *grid.range)

    def _weights(self, tf: Any, operator: Any, variables: Any) -> Any:
        """Variables, a kernel rounded per output channel; the bias follows from both scales."""
        grid = self.quantized.weights.get(getattr(operator, "name", ""))
        if grid is None:
            return variables
        kernel, *rest = variables
        high = grid.scale * grid.highest
        round_per_channel = tf.quantization.fake_quant_with_min_max_vars_per_channel
        return round_per_channel(kernel, -high, high, narrow_range=True), *rest


def _classifier(linear: operators.Linear, tf: Any) -> Translated:
    """A linear layer as a convolution: of matrices the converter rounds no single columns."""

    def function(x: Any, kernel: Any, bias: Any) -> Any:
        x = tf.reshape(x, (-1, 1, 1, len(linear.kernel)))
        x = tf.nn.bias_add(tf.nn.conv2d(x, kernel, 1, "VALID", name=linear.name), bias)
        return tf.reshape(x, (-1, len(linear.bias)))

    return function, variables_of(tf, linear.kernel[None, None], linear.bias)


def float_layers(path: Path) -> tuple[str, ...]:
    """Layers that LiteRT computes in float."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=1)
    tensors = {tensor["index"]: tensor for tensor in interpreter.get_tensor_details()}
    found = []
    for operation in interpreter._get_ops_details():
        image, *_ = operation["inputs"]
        if operation["op_name"] in _LAYERS and tensors[image]["dtype"] == np.float32:
            found.append(tensors[operation["outputs"][0]]["name"])
    return tuple(found)


_LAYERS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
