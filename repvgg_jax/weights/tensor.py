"""One array of a checkpoint, described before it is read."""

from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from repvgg_jax.weights.wording import brief

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

READABLE = ("float16", "bfloat16", "float32", "float64")
"""What weights may be stored as."""


class Tensor(NamedTuple):
    """A description and a way to get the numbers; reading is put off until all shapes fit.

    Attributes:
      shape: its shape.
      dtype: of its elements, by NumPy's name for it.
      read: fetches the elements, checking what can be checked about them.
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
    # PyTorch does not hand bfloat16 to NumPy; float32 holds the same numbers.
    return (value.float() if dtype == "bfloat16" else value).numpy()


def load(tensor: Tensor, where: str) -> np.ndarray:
    """Reads weights, whose elements must be finite.

    Returns:
      float32. float16 and bfloat16 are widened exactly, float64 is rounded.

    Raises:
      ValueError: not floating point, or a NaN or an infinity among the elements.
    """
    if tensor.dtype not in READABLE:
        raise ValueError(
            f"{where} is {tensor.dtype}; weights are {', '.join(READABLE)} "
            "(quantised checkpoints cannot be read)"
        )
    try:
        stored = tensor.read()
    except Exception as error:  # of whichever library reads this format
        raise ValueError(f"{where} cannot be read: {brief(error)}") from error
    with np.errstate(over="ignore"):  # beyond float32's range: an infinity, reported below
        array = stored.astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        bad = int(array.size - np.isfinite(array).sum())
        raise ValueError(
            f"{where}: {bad} of {array.size} elements are NaN or infinite; "
            "the checkpoint is damaged or its training diverged"
        )
    return array
