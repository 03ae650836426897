"""One array of a checkpoint, described before it is read."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from repvgg_jax.text import one_line

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

READABLE = ("float16", "bfloat16", "float32", "float64")
"""The dtypes that weights may be stored in."""

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of arrays by their keys."""


class Tensor(NamedTuple):
    """Shape and dtype of an array and a way to read it; nothing is read until all shapes fit.

    Attributes:
      shape: its shape.
      dtype: NumPy's name of its dtype.
      read: returns the elements, verified as far as the format allows.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def describe(value: Any) -> Tensor | None:
    """A NumPy, JAX or PyTorch array as a `Tensor`; None for anything else."""
    if isinstance(value, Tensor):
        return value
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is None or dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if hasattr(value, "detach"):
        return Tensor(tuple(shape), name, lambda: _from_torch(value, name))
    return Tensor(tuple(shape), name, lambda: np.asarray(value))


def _from_torch(value: Any, dtype: str) -> np.ndarray:
    value = value.detach().cpu()
    # PyTorch cannot convert bfloat16 to NumPy; the conversion to float32 is exact.
    return (value.float() if dtype == "bfloat16" else value).numpy()


def read_float32(tensor: Tensor, name: str) -> np.ndarray:
    """Reads an array of weights as float32 and checks that every element is finite.

    float16 and bfloat16 are widened exactly, float64 is rounded.

    Args:
      tensor: the array.
      name: what messages call it.

    Raises:
      ValueError: another dtype, damaged, or NaN or infinite elements.
    """
    if tensor.dtype not in READABLE:
        raise ValueError(
            f"{name} has dtype {tensor.dtype}; weights must be {', '.join(READABLE)} "
            "(quantized checkpoints are not supported)"
        )
    try:
        stored = tensor.read()
    except Exception as error:  # of whichever library reads this format
        raise ValueError(f"{name} cannot be read: {one_line(error)}") from error
    with np.errstate(over="ignore"):  # beyond float32's range: an infinity, reported below
        array = stored.astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        bad = int(array.size - np.isfinite(array).sum())
        raise ValueError(
            f"{name}: {bad} of {array.size} elements are NaN or infinite; "
            "the checkpoint is damaged or its training diverged"
        )
    return array
