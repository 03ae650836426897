"""ONNX, node by node: NCHW, any batch size, nothing in the graph that need not be there.

One `Conv` and one `Relu` a block, then `GlobalAveragePool`, `Flatten`, `Gemm`. Weights are
named like the parameter tree, and the network's description is in `metadata_props`. Opset 17
is old enough for every runtime in use and has all that is needed.

In float16 the convolutions and squeeze-and-excite compute in float16 and the pooled features
and the classifier in float32, as in the JAX model; the artefact's input and output stay float32.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from repvgg_jax._version import __version__
from repvgg_jax.export.format import Format, Run, Runtime
from repvgg_jax.export.network import Network
from repvgg_jax.export.operators import walk
from repvgg_jax.proof import TOLERANCE
from repvgg_jax.variants import Layer

OPSET = 17
IR_VERSION = 8  # the one that came with opset 17; older runtimes refuse newer ones


def write(network: Network, path: Path, dtype: str) -> None:
    """Writes and checks a model file."""
    import onnx

    graph = _Graph(network, np.dtype(dtype))
    output = walk(network, network.params, graph, network.input_name)
    graph.finish(output)
    onnx.save(graph.model, path)
    del graph  # the checker reads the file: one copy of the weights at a time
    onnx.checker.check_model(str(path), full_check=True)


class _Graph:
    """Operators that append nodes; what flows between them is the name of a tensor."""

    def __init__(self, network: Network, dtype: np.dtype):
        import onnx

        self.onnx = onnx
        self.network = network
        self.dtype = dtype
        # Built in place: protobuf would copy the weights at every hand-over.
        self.model = onnx.ModelProto(
            ir_version=IR_VERSION, producer_name="repvgg-jax", producer_version=__version__
        )
        self.model.opset_import.add(domain="", version=OPSET)
        self.model.graph.name = network.model.variant.name

    def enter(self, images: str) -> str:
        if not self.network.with_preprocessing:
            return self._cast("images/cast", images, self.dtype, source=np.float32)
        # The cast comes first: TensorRT takes uint8 from outside, and wants it cast at once.
        x = self._cast("images/cast", images, self.dtype, source=np.uint8)
        x = self._node("Transpose", "images/nchw", x, perm=(0, 3, 1, 2))
        metadata = self.network.metadata
        for name, op, values in (
            ("images/scale", "Mul", metadata.scale),
            ("images/shift", "Add", metadata.shift),
        ):
            x = self._node(op, name, x, self._weight(f"{name}/value", values.reshape(1, -1, 1, 1)))
        return x

    def conv(self, x: str, layer: Layer, params: Mapping[str, Any]) -> str:
        name = f"{layer.name}/reparam"
        return self._node(
            "Conv",
            name,
            x,
            self._weight(f"{name}/kernel", params["kernel"].transpose(3, 2, 0, 1)),
            self._weight(f"{name}/bias", params["bias"]),
            kernel_shape=(3, 3),
            strides=(layer.stride,) * 2,
            pads=(layer.dilation,) * 4,
            dilations=(layer.dilation,) * 2,
            group=layer.groups,
        )

    def relu(self, x: str) -> str:
        return self._node("Relu", f"{x}/relu", x)

    def gate(self, x: str, layer: Layer, params: Mapping[str, Any]) -> str:
        name = f"{layer.name}/se"
        gate = self._node("GlobalAveragePool", f"{name}/mean", x)
        for dense, activation in (("reduce", "Relu"), ("expand", "Sigmoid")):
            # A linear layer on one pixel: as a convolution it needs no reshaping.
            kernel = params[dense]["kernel"].T[:, :, None, None]
            gate = self._node(
                "Conv",
                f"{name}/{dense}",
                gate,
                self._weight(f"{name}/{dense}/kernel", kernel),
                self._weight(f"{name}/{dense}/bias", params[dense]["bias"]),
                kernel_shape=(1, 1),
            )
            gate = self._node(activation, f"{name}/{dense}/{activation.lower()}", gate)
        return self._node("Mul", name, x, gate)

    def pool(self, x: str) -> str:
        x = self._cast("pool/cast", x, np.float32, source=self.dtype)
        x = self._node("GlobalAveragePool", "pool", x)
        return self._node("Flatten", "pool/flatten", x, axis=1)

    def classify(self, x: str, params: Mapping[str, Any]) -> str:
        kernel = self._weight("head/kernel", params["kernel"], np.float32)
        bias = self._weight("head/bias", params["bias"], np.float32)
        return self._node("Gemm", "head", x, kernel, bias)

    def softmax(self, x: str) -> str:
        return self._node("Softmax", "softmax", x, axis=1)

    def finish(self, output: str) -> None:
        """Names input and output, and writes the description into the model."""
        helper, types = self.onnx.helper, self.onnx.TensorProto
        network = self.network
        inside = network.with_preprocessing
        height, width, channels = network.image_shape
        shape = (height, width, channels) if inside else (channels, height, width)
        graph = self.model.graph
        graph.node[-1].output[0] = network.output_name
        graph.input.append(
            helper.make_tensor_value_info(
                network.input_name, types.UINT8 if inside else types.FLOAT, ("batch", *shape)
            )
        )
        graph.output.append(
            helper.make_tensor_value_info(
                network.output_name, types.FLOAT, ("batch", network.outputs)
            )
        )
        for key, text in network.header(FORMAT.input_layout(network)).items():
            self.model.metadata_props.add(key=key, value=text)

    def _node(self, op: str, name: str, *inputs: str, **attributes: Any) -> str:
        self.model.graph.node.append(
            self.onnx.helper.make_node(op, inputs, [name], name=name, **attributes)
        )
        return name

    def _cast(self, name: str, x: str, target: Any, *, source: Any) -> str:
        if np.dtype(target) == np.dtype(source):
            return x
        to = self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(target))
        return self._node("Cast", name, x, to=to)

    def _weight(self, name: str, values: np.ndarray, dtype: Any = None) -> str:
        dtype = self.dtype if dtype is None else np.dtype(dtype)
        if (largest := np.abs(values).max()) > np.finfo(dtype).max:
            raise ValueError(
                f"{name} holds {largest:.3g}, but {dtype} ends at {np.finfo(dtype).max:g}; "
                "export this network in float32"
            )
        tensor = self.model.graph.initializer.add(name=name, dims=values.shape)
        tensor.data_type = self.onnx.helper.np_dtype_to_tensor_dtype(dtype)
        tensor.raw_data = values.astype(dtype.newbyteorder("<"), copy=False).tobytes()
        return name


def _nchw(images: np.ndarray, network: Network) -> np.ndarray:
    if network.with_preprocessing:
        return images
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def _open_onnxruntime(path: Path, network: Network) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name, output = network.input_name, network.output_name
    return lambda images: session.run([output], {name: _nchw(images, network)})[0]


def _open_openvino(path: Path, network: Network) -> Run:
    # Importing openvino reports to its makers, from a forked process, which JAX's threads do
    # not allow. Without this module, which is optional, it does neither.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    core = openvino.Core()
    # Processors with bfloat16 or float16 units would use them unasked.
    compiled = core.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    name, output = network.input_name, network.output_name
    return lambda images: compiled({name: _nchw(images, network)})[output]


FORMAT = Format(
    name="onnx",
    filename="model.onnx",
    layout="NCHW",
    write=write,
    packages=("onnx",),
    runtimes=(
        Runtime("onnxruntime", _open_onnxruntime),
        Runtime("openvino", _open_openvino),
    ),
    tolerances={"float32": TOLERANCE, "float16": 1e-2},
    extra="onnx",
)
