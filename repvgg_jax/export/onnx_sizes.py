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


def resample(graph: Graph, operator: ResampleToSize, x: str, like: str, dtype: Any) -> str:
    """Multiplies both spatial axes of `x` (images, channels, height, width) by matrices.

    Args:
      graph: the model.
      operator: what to compute.
      x: the feature maps.
      like: what has the size of the result, unless the operator has it.
      dtype: of `x` and of the result.
    """
    name = operator.name
    rows, columns = (
        graph.cast(
            f"{name}/{side}", _matrix(graph, operator, f"{name}/{side}", axis, x, like), dtype
        )
        for axis, side in ((2, "rows"), (3, "columns"))
    )
    across = graph.node("Transpose", f"{columns}/transposed", columns, perm=(1, 0))
    x = graph.node("MatMul", f"{name}/across", x, across)
    return graph.node("MatMul", name, rows, x)


def _matrix(graph: Graph, operator: ResampleToSize, name: str, axis: int, x: str, like: str) -> str:
    """The float32 matrix (after, before) of an axis."""

    def node(op: str, label: str, *inputs: str, **attributes: Any) -> str:
        return graph.node(op, f"{name}/{label}", *inputs, **attributes)

    def number(label: str, value: Any) -> str:
        return graph.constant(f"{name}/{label}", value)

    def index(label: str, source: str) -> str:
        """0 … n - 1 along an axis of n, int64."""
        length = graph.node("Shape", f"{label}/shape", source, start=axis, end=axis + 1)
        length = graph.node("Squeeze", f"{label}/length", length)
        zero = graph.constant(f"{label}/zero", np.int64(0))
        one = graph.constant(f"{label}/one", np.int64(1))
        return graph.node("Range", label, zero, length, one)

    def last(label: str, source: str) -> str:
        """The index of the last pixel along an axis, float32 (1,)."""
        length = graph.node("Shape", f"{label}/shape", source, start=axis, end=axis + 1)
        length = graph.cast(f"{label}/float", length, np.float32)
        return graph.node("Sub", label, length, graph.constant(f"{label}/one", np.float32(1)))

    if operator.how == "pool":
        windows = np.arange(operator.windows, dtype=np.int64)[:, None]
        length = node("Shape", "shape", x, start=axis, end=axis + 1)
        pixel = index(f"{name}/pixel", x)
        count = number("windows", np.int64(operator.windows))
        starts, ends = (
            node("Mul", f"{label}/scaled", number(label, values), length)
            for label, values in (("index", windows), ("next", windows + 1))
        )
        first = node("Div", "first", starts, count)
        raised = node("Add", "raised", ends, number("up", np.int64(operator.windows - 1)))
        end = node("Div", "end", raised, count)
        reached = node("GreaterOrEqual", "reached", pixel, first)
        inside = node("And", "inside", reached, node("Less", "before", pixel, end))
        width = graph.cast(f"{name}/width", node("Sub", "pixels", end, first), np.float32)
        return node("Div", "share", graph.cast(f"{name}/mask", inside, np.float32), width)

    where = graph.cast(f"{name}/index/float", index(f"{name}/index", like), np.float32)
    limit = last(f"{name}/last", x)
    if operator.how == "corners":
        steps = node("Max", "steps", last(f"{name}/steps/last", like), number("least", _ONE))
        where = node("Mul", "position", where, node("Div", "ratio", limit, steps))
    else:
        where = node("Div", "position", where, number("stride", np.float32(operator.stride)))
    where = node("Unsqueeze", "row", node("Min", "clipped", where, limit), number("axes", _AXIS))
    pixel = graph.cast(f"{name}/pixel/float", index(f"{name}/pixel", x), np.float32)
    distance = node("Abs", "distance", node("Sub", "difference", where, pixel))
    return node("Relu", "weights", node("Sub", "nearness", number("full", _ONE), distance))


_ONE = np.float32(1)
_AXIS = np.array([1], np.int64)
