"""ONNX in int8: the graph of `onnx.py` with QuantizeLinear and DequantizeLinear in it.

A pair of both stands at every activation that is rounded; weights are int8 and biases int32 behind
a DequantizeLinear. Runtimes compute in integers whatever is between pairs. What a runtime leaves in
float still computes the same, only slower; `float_layers_…` names it.
"""

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from repvgg_jax.export import operators
from repvgg_jax.export.network import Network
from repvgg_jax.export.onnx import Graph, save
from repvgg_jax.quantization.network import of_output
from repvgg_jax.quantization.quantize import Quantized

SETTINGS = "quantization"
"""Key of the settings in `metadata_props`."""

_INTEGER = ("QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulInteger")
_FLOAT = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")


def write(network: Network, quantized: Quantized, path: Path) -> None:
    """Writes and checks a model file.

    Args:
      network: of `quantized.params`.
      quantized: how it is rounded.
      path: the file.
    """
    graph = _Int8Graph(network, quantized)
    graph.model.metadata_props.add(key=SETTINGS, value=json.dumps(quantized.settings.as_dict()))
    save(graph, path)


class _Int8Graph(Graph):
    """A graph whose layers take and hold rounded values."""

    def __init__(self, network: Network, quantized: Quantized):
        super().__init__(network, np.dtype(np.float32))
        self.quantized = quantized
        self._block = ""  # whose output is not rounded yet

    def add(self, operator: operators.Operator, x: str) -> str:
        """Adds an operator, behind the rounding that belongs before it."""
        if not isinstance(operator, (operators.Activation, operators.Gate)):
            x = self._rounded(of_output(self._block), x)
            self._block = ""
        if isinstance(operator, operators.Gate):
            x = self._rounded(operator.name, x)
        return super().add(operator, x)

    def conv(self, conv: operators.Conv, x: str) -> str:
        """Adds a convolution and, if that is rounded, its output."""
        self._block = conv.name.rpartition("/")[0]
        y = super().conv(conv, self._rounded(conv.name, x))
        return self._rounded(of_output(conv.name), y)

    def linear(self, linear: operators.Linear, x: str) -> str:
        """Adds the classifier, whose output stays in float."""
        return super().linear(linear, self._rounded(linear.name, x))

    def weights(self, layer: Any, kernel: np.ndarray, *, wide: bool) -> tuple[str, str]:
        """Adds integer weights of a layer that is quantized."""
        name, quantized = layer.name, self.quantized
        if name not in quantized.weights:
            return super().weights(layer, kernel, wide=wide)
        numbers = quantized.weights[name].numbers(layer.kernel).astype(np.int8)
        axis = 1  # of the output channels
        if numbers.ndim == 4:
            numbers, axis = np.ascontiguousarray(numbers.transpose(3, 2, 0, 1)), 0
        step = quantized.bias_scale(name)
        bias = np.round(layer.bias.astype(np.float64) / step).astype(np.int32)
        return (
            self._real(f"{name}/kernel", numbers, quantized.weights[name].scale, axis),
            self._real(f"{name}/bias", bias, step, 0),
        )

    def _real(self, name: str, numbers: np.ndarray, scale: np.ndarray, axis: int) -> str:
        """Adds integers that are dequantized per output channel."""
        return self.node(
            "DequantizeLinear",
            name,
            self.constant(f"{name}/numbers", numbers),
            self.constant(f"{name}/scale", scale.astype(np.float32)),
            self.constant(f"{name}/zero", np.zeros(scale.shape, numbers.dtype)),
            axis=axis,
        )

    def _rounded(self, tensor: str, x: str) -> str:
        """Adds the rounding of an activation, if it is rounded."""
        grid = self.quantized.activations.get(tensor)
        if grid is None:
            return x
        where = f"{tensor}/quantized"
        scale = self.constant(f"{where}/scale", np.asarray(grid.scale, np.float32))
        zero = self.constant(f"{where}/zero", np.asarray(grid.zero_point, grid.dtype))
        nodes = self.model.graph.node
        if nodes and nodes[-1].op_type == "Concat" and nodes[-1].output[0] == x:
            # Integers are joined. OpenVINO (2026.4) moves the rounding of joined floats before the
            # concatenation, and if they become int8, it rounds them to whole numbers then.
            parts = nodes.pop().input
            joined = [self.node("QuantizeLinear", f"{p}/joined", p, scale, zero) for p in parts]
            numbers = self.node("Concat", where, *joined, axis=1)
        else:
            numbers = self.node("QuantizeLinear", where, x, scale, zero)
        return self.node("DequantizeLinear", f"{tensor}/rounded", numbers, scale, zero)


def float_layers_onnxruntime(path: Path) -> tuple[str, ...]:
    """Layers that ONNX Runtime computes in float, in the graph that it runs on this machine."""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as directory:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(Path(directory, "optimized.onnx"))
        options.log_severity_level = 3  # that such a file is of this machine is what is wanted
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(options.optimized_model_filepath).graph
    return tuple(node.name or node.output[0] for node in graph.node if node.op_type in _FLOAT)


def float_layers_openvino(path: Path) -> tuple[str, ...]:
    """Layers that OpenVINO computes in float on this machine."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = []
    for operation in compiled.get_runtime_model().get_ordered_ops():
        about = operation.get_rt_info()
        kind, precision = (_text(about, key) for key in ("layerType", "runtimePrecision"))
        if kind in ("Convolution", "FullyConnected", "MatMul") and precision not in ("i8", "u8"):
            found.append(operation.get_friendly_name())
    return tuple(found)


def _text(about: Any, key: str) -> str:
    with contextlib.suppress(KeyError, RuntimeError):
        value = about[key]
        return str(getattr(value, "astype", lambda _: value)(str))
    return ""
