"""Counts the multiplications of any JAX function's convolutions from its program."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax


class Multiplications(NamedTuple):
    """Of one call.

    Attributes:
      macs: multiply-accumulates of all convolutions.
      winograd: multiplications if every 3x3 convolution of stride 1 without dilation runs as
        Winograd F(2x2, 3x3).
    """

    macs: int
    winograd: int


def count(function: Callable[..., Any], *args: Any) -> Multiplications:
    """Counts `function(*args)`; arguments may be `jax.ShapeDtypeStruct`."""
    macs = winograd = 0
    for equation in _equations(jax.make_jaxpr(function)(*args).jaxpr):
        if equation.primitive.name != "conv_general_dilated":
            continue
        _, kernel = (variable.aval.shape for variable in equation.invars)
        dimensions = equation.params["dimension_numbers"].rhs_spec  # outputs, inputs, spatial
        size = tuple(kernel[axis] for axis in dimensions[2:])
        per_output = math.prod(kernel) // kernel[dimensions[0]]
        products = math.prod(equation.outvars[0].aval.shape) * per_output
        steps = {*equation.params["window_strides"], *equation.params["rhs_dilation"]}
        macs += products
        winograd += products * 4 // 9 if size == (3, 3) and steps == {1} else products
    return Multiplications(macs, winograd)


def _equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, those of called functions included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (list, tuple)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)
