"""`save_weights` and `to_state_dict`: variables as a checkpoint of any project."""

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from repvgg_jax.files import replacing
from repvgg_jax.variants import Variant, get_variant
from repvgg_jax.weights.detect import detect
from repvgg_jax.weights.names import FLAX, naming_for
from repvgg_jax.weights.tensor import Tensor, describe

_WRITABLE = ("float16", "float32", "float64")


def to_state_dict(
    variables: Mapping[str, Any],
    *,
    family: str = "official",
    variant: str | Variant | None = None,
) -> dict[str, np.ndarray]:
    """Variables under a project's names and in its layouts.

    `load_weights` of the result returns bitwise identical variables. PyTorch's
    `num_batches_tracked`, which has no counterpart here, is written as 0.

    Args:
      variables: of a RepVGG in training form or deploy form.
      family: `official`, `timm`, `mmpretrain`, or `flax` for our own names joined by slashes.
      variant: the architecture, if it is one of your own; None detects the official ones.

    Raises:
      ValueError: not the complete variables of a RepVGG, or the family has no names for it.
    """
    ours = _described(variables)
    found = detect(
        {key: tensor.shape for key, tensor in ours.items()},
        variant=None if variant is None else get_variant(variant),
        namings=(FLAX,),
    )
    naming = naming_for(family, found.variant)
    state: dict[str, np.ndarray] = {}
    for entry in naming.entries(
        found.variant,
        deploy=found.deploy,
        num_classes=found.num_classes,
        in_channels=found.in_channels,
    ):
        if entry.leaf is None:
            state[entry.key] = np.zeros((), np.int64)
            continue
        key = "/".join(entry.leaf.path)
        if ours[key].dtype not in _WRITABLE:
            raise ValueError(
                f"{key} has dtype {ours[key].dtype}; checkpoints take {', '.join(_WRITABLE)}: "
                "jax.tree.map(lambda a: a.astype('float32'), variables)"
            )
        state[entry.key] = np.ascontiguousarray(entry.from_ours(ours[key].read()))
    return state


def save_weights(
    path: str | os.PathLike,
    variables: Mapping[str, Any],
    *,
    family: str = "official",
    variant: str | Variant | None = None,
) -> None:
    """Writes variables as `.safetensors`, `.npz` or, if PyTorch is installed, `.pth`.

    The file is written atomically; missing parent directories are created.

    Args:
      path: its suffix selects the format.
      variables: as in `to_state_dict`.
      family: as in `to_state_dict`.
      variant: as in `to_state_dict`.

    Raises:
      ValueError: unknown suffix, `path` cannot be written, `.pth` without PyTorch, or as
        `to_state_dict`.
    """
    path = pathlib.Path(path)
    write = _WRITERS.get(path.suffix)
    if write is None:
        raise ValueError(f"{path}: the suffix must be one of {', '.join(_WRITERS)}")
    state = to_state_dict(variables, family=family, variant=variant)
    try:
        with replacing(path) as temporary:
            # Created here so that a directory without write permission is an OSError.
            temporary.touch(exist_ok=False)
            write(temporary, state)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}") from error


def _write_safetensors(path: pathlib.Path, state: dict[str, np.ndarray]) -> None:
    import safetensors.numpy

    # PyTorch projects refuse a file without this metadata.
    try:
        safetensors.numpy.save_file(state, path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:  # also for a full disk
        raise OSError(str(error)) from error


def _write_npz(path: pathlib.Path, state: dict[str, np.ndarray]) -> None:
    with open(path, "wb") as file:  # given a name, NumPy would append a suffix
        np.savez(file, **state)  # type: ignore[arg-type]


def _write_pth(path: pathlib.Path, state: dict[str, np.ndarray]) -> None:
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            ".pth files are written by PyTorch, which is not installed: "
            "pip install 'repvgg-jax[torch]', or write .safetensors, which PyTorch projects read"
        ) from error
    try:
        torch.save({key: torch.from_numpy(array) for key, array in state.items()}, path)
    except RuntimeError as error:  # PyTorch's zip writer if the disk is full
        raise OSError(str(error).splitlines()[0]) from error


_WRITERS: dict[str, Callable[[pathlib.Path, dict[str, np.ndarray]], None]] = {
    ".safetensors": _write_safetensors,
    ".npz": _write_npz,
    ".pth": _write_pth,
    ".pt": _write_pth,
}


def _described(variables: Any) -> dict[str, Tensor]:
    """The arrays of a tree by their paths, joined by slashes."""
    if not isinstance(variables, Mapping):
        raise ValueError(
            f"variables must be a mapping {{'params': …}}, not a {type(variables).__name__}"
        )
    found = {}
    for key, leaf in flatten_dict(variables, sep="/").items():
        if (tensor := describe(leaf)) is None:
            raise ValueError(f"variables: {key} is a {type(leaf).__name__}, not an array")
        found[key] = tensor
    return found
