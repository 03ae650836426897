"""Pooling and interpolation in ONNX for images of any size: matrices that the graph computes.

The arithmetic is that of `repvgg_jax.segmentation.resize`, in nodes that every runtime has; ONNX's
own `Resize` knows neither where feature maps lie on the image nor adaptive pooling. Positions are
float32, whatever the network computes in.
"""

from typing import Any, Protocol

import numpy as np

from repvgg_jax.export.operators import ResampleToSize


class Graph(Protocol):
    """What is needed of a graph; tensors are represented by their names."""

    def node(self, op: str, name: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node, and returns its output."""
        ...

    def constant(self, name: str, values: Any) -> str:
        """A constant in the dtype of `values`, its name."""
        ...

    def cast(self, name: str, x: str, target: Any) -> str:
        """`x` in another dtype."""
        ...


def resample(graph: Graph, operator: ResampleToSize, x: str, images: str, dtype: Any) -> str:
    """Multiplies both spatial axes of `x` (images, channels, height, width) by matrices.

    Args:
      graph: the model.
      operator: what to compute.
      x: the feature maps, or the means over windows.
      images: what the feature maps are of.
      dtype: of `x` and of the result.
    """
    name = operator.name
    rows, columns = (
        graph.cast(
            f"{name}/{side}", _matrix(graph, operator, f"{name}/{side}", axis, images), dtype
        )
        for axis, side in ((2, "rows"), (3, "columns"))
    )
    across = graph.node("Transpose", f"{columns}/transposed", columns, perm=(1, 0))
    x = graph.node("MatMul", f"{name}/across", x, across)
    return graph.node("MatMul", name, rows, x)


def _matrix(graph: Graph, operator: ResampleToSize, name: str, axis: int, images: str) -> str:
    """The float32 matrix (after, before) of an axis.

    All lengths follow from the images': OpenVINO (2026.4) loses the bias of an int8 convolution
    whose result is asked for its shape.
    """

    def node(op: str, label: str, *inputs: str, **attributes: Any) -> str:
        return graph.node(op, f"{name}/{label}", *inputs, **attributes)

    def number(label: str, value: Any) -> str:
        return graph.constant(f"{name}/{label}", value)

    def index(label: str, length: str) -> str:
        """0 … n - 1, int64, for a length (1,)."""
        end = node("Squeeze", f"{label}/end", length)
        first, step = (number(f"{label}/{k}", np.int64(k)) for k in (0, 1))
        return node("Range", label, first, end, step)

    image = node("Shape", "image", images, start=axis, end=axis + 1)
    raised = node("Add", "image/raised", image, number("image/up", np.int64(operator.stride - 1)))
    maps = node("Div", "maps", raised, number("image/stride", np.int64(operator.stride)))
    if operator.how == "pool":
        windows = np.arange(operator.windows, dtype=np.int64)[:, None]
        pixel, count = index("pixel", maps), number("windows", np.int64(operator.windows))
        starts, ends = (
            node("Mul", f"{label}/scaled", number(label, values), maps)
            for label, values in (("index", windows), ("next", windows + 1))
        )
        first = node("Div", "first", starts, count)
        raised = node("Add", "raised", ends, number("up", np.int64(operator.windows - 1)))
        end = node("Div", "end", raised, count)
        reached = node("GreaterOrEqual", "reached", pixel, first)
        inside = node("And", "inside", reached, node("Less", "before", pixel, end))
        width = graph.cast(f"{name}/width", node("Sub", "pixels", end, first), np.float32)
        return node("Div", "share", graph.cast(f"{name}/mask", inside, np.float32), width)

    last = graph.cast(f"{name}/maps/float", maps, np.float32)
    last = node("Sub", "maps/last", last, number("maps/one", _ONE))
    after = image if operator.how == "stride" else maps
    where = graph.cast(f"{name}/index/float", index("index", after), np.float32)
    if operator.how == "corners":
        limit = number("windows/last", np.array([operator.windows - 1], np.float32))
        pixel = number("pixel", np.arange(operator.windows, dtype=np.float32))
        steps = node("Max", "steps", last, number("least", _ONE))
        where = node("Mul", "position", where, node("Div", "ratio", limit, steps))
    else:
        limit = last
        pixel = graph.cast(f"{name}/pixel/float", index("pixel", maps), np.float32)
        where = node("Div", "position", where, number("stride", np.float32(operator.stride)))
    where = node("Unsqueeze", "row", node("Min", "clipped", where, limit), number("axes", _AXIS))
    distance = node("Abs", "distance", node("Sub", "difference", where, pixel))
    return node("Relu", "weights", node("Sub", "nearness", number("full", _ONE), distance))


_ONE = np.float32(1)
_AXIS = np.array([1], np.int64)
