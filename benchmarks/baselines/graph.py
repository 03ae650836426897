"""Folded networks as ONNX files, with the same parameters."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from baselines.network import (
    Affine,
    Average,
    Conv,
    Dense,
    Flatten,
    Gate,
    MaxPool,
    Network,
    Sum,
    evaluate,
)
from repvgg_jax.export.onnx import IR_VERSION, OPSET

INPUT, OUTPUT = "images", "logits"


def write(network: Network, params: Mapping[str, Any], path: pathlib.Path, image_size: int) -> None:
    """Writes a model that maps (batch, channels, height, width) to logits, and checks it.

    Args:
      network: what to write.
      params: of the deploy form, NumPy arrays.
      path: the file.
      image_size: height and width of the images, in pixels.
    """
    graph = _Graph(params)
    result = evaluate(network.parts, INPUT, graph)
    graph.node("Identity", OUTPUT, result)
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    image = ("batch", network.channels, image_size, image_size)
    model = onnx.ModelProto(ir_version=IR_VERSION, graph=onnx.GraphProto(name=network.name))
    model.opset_import.add(domain="", version=OPSET)
    model.graph.node.extend(graph.nodes)
    model.graph.initializer.extend(graph.weights)
    model.graph.input.append(helper.make_tensor_value_info(INPUT, kind, image))
    model.graph.output.append(helper.make_tensor_value_info(OUTPUT, kind, ("batch", "classes")))
    onnx.save(model, path)
    onnx.checker.check_model(str(path))


class _Graph:
    """Adds nodes; tensors are represented by their names."""

    def __init__(self, params: Mapping[str, Any]):
        self.params = params
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def conv(self, part: Conv, x: str) -> str:
        own = self.params[part.name]
        own = own.get("reparam", own)
        y = self.node(
            "Conv",
            part.name,
            x,
            self.weight(f"{part.name}/kernel", own["kernel"].transpose(3, 2, 0, 1)),
            self.weight(f"{part.name}/bias", own["bias"]),
            kernel_shape=(part.size,) * 2,
            strides=(part.stride,) * 2,
            pads=(part.size // 2,) * 4,
            group=part.groups,
        )
        return self.activation(part.activation, y)

    def affine(self, part: Affine, x: str) -> str:
        scale, bias = (
            self.weight(f"{part.name}/{leaf}", self.params[part.name][leaf].reshape(1, -1, 1, 1))
            for leaf in ("scale", "bias")
        )
        y = self.node("Mul", f"{part.name}/scaled", x, scale)
        return self.node("Add", part.name, y, bias)

    def max_pool(self, part: MaxPool, x: str) -> str:
        return self.node(
            "MaxPool",
            f"{x}/pool",
            x,
            kernel_shape=(part.size,) * 2,
            strides=(part.stride,) * 2,
            pads=(part.padding,) * 4,
        )

    def gate(self, part: Gate, x: str) -> str:
        y = self.node("GlobalAveragePool", f"{part.name}/mean", x)
        # A linear layer on a single pixel: as a convolution it needs no reshape.
        for name, last in ((f"{part.name}_reduce", False), (f"{part.name}_expand", True)):
            kernel = self.weight(f"{name}/kernel", self.params[name]["kernel"].T[:, :, None, None])
            y = self.node("Conv", name, y, kernel, self.weight(f"{name}/bias", self._bias(name)))
            y = (
                self.node("Sigmoid", f"{name}/sigmoid", y)
                if last
                else self.activation(part.activation, y)
            )
        return self.node("Mul", part.name, x, y)

    def add(self, part: Sum, terms: list[str]) -> str:
        total, *others = terms
        for term in others:
            total = self.node("Add", f"sum{len(self.nodes)}", total, term)
        return self.activation(part.activation, total)

    def average(self, _: Average, x: str) -> str:
        return self.node("Flatten", "mean/flat", self.node("GlobalAveragePool", "mean", x), axis=1)

    def flatten(self, _: Flatten, x: str) -> str:
        x = self.node("Transpose", "nhwc", x, perm=(0, 2, 3, 1))
        return self.node("Flatten", "flat", x, axis=1)

    def dense(self, part: Dense, x: str) -> str:
        kernel = self.weight(f"{part.name}/kernel", self.params[part.name]["kernel"])
        bias = self.weight(f"{part.name}/bias", self._bias(part.name))
        return self.activation(part.activation, self.node("Gemm", part.name, x, kernel, bias))

    def activation(self, kind: str | None, x: str) -> str:
        if kind is None:
            return x
        if kind == "relu":
            return self.node("Relu", f"{x}/relu", x)
        assert kind == "silu", kind
        return self.node("Mul", f"{x}/silu", x, self.node("Sigmoid", f"{x}/sigmoid", x))

    def node(self, operation: str, name: str, *inputs: str, **attributes: Any) -> str:
        self.nodes.append(onnx.helper.make_node(operation, inputs, [name], name=name, **attributes))
        return name

    def weight(self, name: str, values: np.ndarray) -> str:
        self.weights.append(onnx.numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def _bias(self, name: str) -> np.ndarray:
        return self.params[name]["bias"]
