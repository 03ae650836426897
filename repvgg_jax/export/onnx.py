"""ONNX, node by node: NCHW, any batch size and, if asked, any image size; no node not needed.

One `Conv` and one `Relu` per block, then `GlobalAveragePool`, `Flatten`, `Gemm`. Weights are
named like the parameter tree, and the network's description is in `metadata_props`. Opset 17
has all that is needed, and every runtime in use supports it.

In float16 the convolutions and squeeze-and-excite compute in float16; preprocessing, the pooled
features and the classifier in float32, as in the JAX model. The artifact's input and output stay
float32.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from repvgg_jax._version import __version__
from repvgg_jax.export import onnx_sizes, operators
from repvgg_jax.export.decompose import decompose
from repvgg_jax.export.format import Format, Run, Runtime
from repvgg_jax.export.network import Network
from repvgg_jax.proof import TOLERANCE

OPSET = 17
IR_VERSION = 8  # the one released with opset 17; older runtimes refuse newer ones


def write(network: Network, path: Path, dtype: str) -> None:
    """Writes and checks a model file."""
    save(Graph(network, np.dtype(dtype)), path)


def save(graph: "Graph", path: Path) -> None:
    """Fills a graph with the operators of its network, writes it and checks it."""
    import onnx

    x = graph.enter(graph.network.input_name)
    for operator in decompose(graph.network):
        x = graph.add(operator, x)
    graph.finish()
    onnx.save(graph.model, path)
    graph.model.Clear()  # the checker reads the file: one copy of the weights at a time
    onnx.checker.check_model(str(path), full_check=True)


class Graph:
    """A model that operators are added to; tensors are represented by their names."""

    def __init__(self, network: Network, dtype: np.dtype):
        import onnx

        self.onnx = onnx
        self.network = network
        self.dtype = dtype
        self._kept: dict[str, str] = {}
        # Built in place: protobuf would copy the weights whenever a message is assigned.
        self.model = onnx.ModelProto(
            ir_version=IR_VERSION, producer_name="repvgg-jax", producer_version=__version__
        )
        self.model.opset_import.add(domain="", version=OPSET)
        self.model.graph.name = network.name

    def enter(self, images: str) -> str:
        """Adds what comes before the first block: normalization, layout, dtype."""
        if not self.network.with_preprocessing:
            return self._cast("images/cast", images, self.dtype, source=np.float32)
        # The cast comes first: TensorRT takes uint8 inputs only if they are cast at once.
        x = self._cast("images/cast", images, np.float32, source=np.uint8)
        x = self.node("Transpose", "images/nchw", x, perm=(0, 3, 1, 2))
        normalize = self.network.normalize
        for name, op, values in (
            ("images/offset", "Sub", normalize.offset),
            ("images/factor", "Mul", normalize.factor),
        ):
            values = values.reshape(1, -1, 1, 1)
            x = self.node(op, name, x, self.weight(f"{name}/value", values, np.float32))
        return self._cast("images/normalized", x, self.dtype, source=np.float32)

    def add(self, operator: operators.Operator, x: str) -> str:
        """Adds an operator that maps `x`; returns its result."""
        match operator:
            case operators.Conv():
                return self.conv(operator, x)
            case operators.Activation(kind):
                return self._activation(kind, x)
            case operators.Gate():
                return self._gate(operator, x)
            case operators.Pool():
                x = self._cast("pool/cast", x, np.float32, source=self.dtype)
                x = self.node("GlobalAveragePool", "pool", x)
                return self.node("Flatten", "pool/flatten", x, axis=1)
            case operators.Linear():
                return self.linear(operator, x)
            case operators.Softmax():
                return self.node("Softmax", "softmax", x, axis=1)
            case operators.Output(name):
                return self._output(name, x)
            case _:
                return self._add_of_segmenter(operator, x)

    def _add_of_segmenter(self, operator: operators.Operator, x: str) -> str:
        match operator:
            case operators.Keep(name):
                self._kept[name] = x
                return x
            case operators.Take(name):
                return self._kept[name]
            case operators.Add(name):
                return self.node("Add", f"{x}/add", x, self._kept[name])
            case operators.Join(names):
                parts = [self._kept[name] for name in names]
                return self.node("Concat", "/".join(names), *parts, axis=1)
            case operators.MaxPool():
                sides = {"kernel_shape": (3, 3), "strides": (2, 2), "pads": (1, 1, 1, 1)}
                return self.node("MaxPool", f"{x}/max", x, **sides)
            case operators.Resample(name, rows, columns):
                dtype = np.float32 if operator.wide else None
                across = self.weight(f"{name}/columns", columns.T, dtype)
                x = self.node("MatMul", f"{name}/across", x, across)
                return self.node("MatMul", name, self.weight(f"{name}/rows", rows, dtype), x)
            case operators.ResampleToSize():
                wanted = np.dtype(np.float32) if operator.wide else self.dtype
                return onnx_sizes.resample(self, operator, x, self._kept[operators.IMAGES], wanted)
            case operators.Widen():
                return self._cast(f"{x}/wide", x, np.float32, source=self.dtype)
        raise AssertionError(operator)

    def _output(self, name: str, x: str) -> str:
        """Names a value as an output; returns what the next operator continues with."""
        if name in self.network.feature_maps and self.dtype != np.float32:
            self._cast(name, x, np.float32, source=self.dtype)
            return x
        self.model.graph.node[-1].output[0] = name
        return name

    def linear(self, linear: operators.Linear, x: str) -> str:
        """Adds the classifier."""
        return self.node("Gemm", linear.name, x, *self.weights(linear, linear.kernel, wide=True))

    def weights(self, layer: Any, kernel: np.ndarray, *, wide: bool) -> tuple[str, str]:
        """Adds a layer's kernel, as its operator takes it, and its bias."""
        dtype = np.float32 if wide else None
        return (
            self.weight(f"{layer.name}/kernel", kernel, dtype),
            self.weight(f"{layer.name}/bias", layer.bias, dtype),
        )

    def conv(self, conv: operators.Conv, x: str) -> str:
        """Adds a convolution."""
        return self.node(
            "Conv",
            conv.name,
            x,
            *self.weights(conv, conv.kernel.transpose(3, 2, 0, 1), wide=conv.wide),
            kernel_shape=conv.kernel_size,
            strides=(conv.stride,) * 2,
            pads=conv.padding * 2,
            dilations=(conv.dilation,) * 2,
            group=conv.groups,
        )

    def _activation(self, kind: str, x: str) -> str:
        if kind == "relu":
            return self.node("Relu", f"{x}/relu", x)
        # Opset 17 has no operators for these.
        if kind == "silu":
            return self.node("Mul", f"{x}/silu", x, self.node("Sigmoid", f"{x}/sigmoid", x))
        assert kind == "gelu", kind
        root, one, half = (
            self.weight(f"{x}/gelu/{name}", np.asarray(value))
            for name, value in (("root", 2**0.5), ("one", 1.0), ("half", 0.5))
        )
        share = self.node("Erf", f"{x}/gelu/erf", self.node("Div", f"{x}/gelu/scaled", x, root))
        twice = self.node(
            "Mul", f"{x}/gelu/twice", x, self.node("Add", f"{x}/gelu/sum", share, one)
        )
        return self.node("Mul", f"{x}/gelu", twice, half)

    def _gate(self, gate: operators.Gate, x: str) -> str:
        y = self.node("GlobalAveragePool", f"{gate.name}/mean", x)
        for linear, activation in ((gate.reduce, "Relu"), (gate.expand, "Sigmoid")):
            # A linear layer on a single pixel: as a convolution it needs no reshape.
            kernel = linear.kernel.T[:, :, None, None]
            y = self.node(
                "Conv",
                linear.name,
                y,
                self.weight(f"{linear.name}/kernel", kernel),
                self.weight(f"{linear.name}/bias", linear.bias),
                kernel_shape=(1, 1),
            )
            y = self.node(activation, f"{linear.name}/{activation.lower()}", y)
        return self.node("Mul", gate.name, x, y)

    def finish(self) -> None:
        """Declares input and output, and adds the description to the model."""
        helper, types = self.onnx.helper, self.onnx.TensorProto
        network = self.network
        inside = network.with_preprocessing
        height, width, channels = network.image_shape
        size = ("height", "width") if network.dynamic_size else (height, width)
        shape = (*size, channels) if inside else (channels, *size)
        graph = self.model.graph
        graph.input.append(
            helper.make_tensor_value_info(
                network.input_name, types.UINT8 if inside else types.FLOAT, ("batch", *shape)
            )
        )
        for name, shape in network.outputs.items():
            if len(shape) == 3:
                height, width, channels = shape
                mapped = (f"{name}_height", f"{name}_width")
                shape = (channels, *(mapped if network.dynamic_size else (height, width)))
            graph.output.append(helper.make_tensor_value_info(name, types.FLOAT, ("batch", *shape)))
        for key, text in network.header(ONNX.input_layout(network)).items():
            self.model.metadata_props.add(key=key, value=text)

    def node(self, op: str, name: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node of that name with one output of the same name."""
        self.model.graph.node.append(
            self.onnx.helper.make_node(op, inputs, [name], name=name, **attributes)
        )
        return name

    def _cast(self, name: str, x: str, target: Any, *, source: Any) -> str:
        if np.dtype(target) == np.dtype(source):
            return x
        return self.cast(name, x, target)

    def cast(self, name: str, x: str, target: Any) -> str:
        """`x` in another dtype."""
        to = self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(target))
        return self.node("Cast", name, x, to=to)

    def weight(self, name: str, values: np.ndarray, dtype: Any = None) -> str:
        """Adds weights in the graph's dtype, or in another one."""
        dtype = self.dtype if dtype is None else np.dtype(dtype)
        if (largest := np.abs(values).max()) > np.finfo(dtype).max:
            raise ValueError(
                f"{name} holds {largest:.3g}, beyond the largest {dtype}, {np.finfo(dtype).max:g}; "
                "export this network in float32"
            )
        return self.constant(name, values.astype(dtype, copy=False))

    def constant(self, name: str, values: Any) -> str:
        """Adds an array, or a number, in its own dtype."""
        values = np.asarray(values)
        tensor = self.model.graph.initializer.add(name=name, dims=values.shape)
        tensor.data_type = self.onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
        little_endian = values.dtype.newbyteorder("<")
        tensor.raw_data = values.astype(little_endian, copy=False).tobytes()
        return name


def _nchw(images: np.ndarray, network: Network) -> np.ndarray:
    if network.with_preprocessing:
        return images
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def _answers(outputs: list[np.ndarray], network: Network) -> Any:
    """A runtime's outputs as the JAX model's: one array, or feature maps by name, NHWC."""
    if network.is_segmenter:
        return outputs[0].transpose(0, 2, 3, 1)
    if not network.feature_maps:
        return outputs[0]
    pairs = zip(network.outputs, outputs, strict=True)
    return {name: value.transpose(0, 2, 3, 1) for name, value in pairs}


def _open_onnxruntime(path: Path, network: Network) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name, outputs = network.input_name, list(network.outputs)
    return lambda images: _answers(session.run(outputs, {name: _nchw(images, network)}), network)


def _open_openvino(path: Path, network: Network) -> Run:
    # Importing openvino sends telemetry from a forked process, which is unsafe beside JAX's
    # threads. It does not if this optional module is missing.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    core = openvino.Core()
    # The default is a lower precision on processors that support one.
    compiled = core.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    name, outputs = network.input_name, list(network.outputs)

    def run(images: np.ndarray) -> Any:
        found = compiled({name: _nchw(images, network)})
        return _answers([np.array(found[output]) for output in outputs], network)

    return run


ONNX = Format(
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
    segmenters=True,
    maps_and_sizes=True,
    extra="onnx",
)
