"""Variables of ours become a checkpoint of whichever project."""

import contextlib
import os
import pathlib
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from repvgg_jax.variants import Variant, get_variant
from repvgg_jax.weights.names import FLAX, naming_for
from repvgg_jax.weights.recognise import recognise
from repvgg_jax.weights.tensor import Tensor, describe

_WRITABLE = ("float16", "float32", "float64")


def to_state_dict(
    variables: Mapping[str, Any],
    *,
    family: str = "official",
    variant: str | Variant | None = None,
) -> dict[str, np.ndarray]:
    """Variables under another project's names and in its layouts.

    `load_weights` of the result gives back the very same numbers. PyTorch's counts of batches,
    which we do not keep, are written as 0.

    Args:
      variables: of a RepVGG, training form or deploy form.
      family: `official`, `timm`, `mmpretrain`, or `flax` for our own names joined by slashes.
      variant: the architecture, where it is one of your own; None recognises official ones.

    Raises:
      ValueError: not a whole RepVGG's variables, or a network for which the family has no
        names.
    """
    ours = _described(variables)
    found = recognise(
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
                f"{key} is {ours[key].dtype}; checkpoints take {', '.join(_WRITABLE)}: "
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
    """Writes variables as `.safetensors`, `.npz` or, with PyTorch installed, `.pth`.

    The file appears whole or not at all.

    Args:
      path: its suffix chooses the format.
      variables: as in `to_state_dict`.
      family: as in `to_state_dict`.
      variant: as in `to_state_dict`.

    Raises:
      ValueError: unknown suffix, a place that cannot be written, no PyTorch for `.pth`, or as
        `to_state_dict`.
    """
    path = pathlib.Path(path)
    write = _WRITERS.get(path.suffix)
    if write is None:
        raise ValueError(f"{path}: the suffix must be one of {', '.join(_WRITERS)}")
    state = to_state_dict(variables, family=family, variant=variant)
    with _replacing(path) as temporary:
        write(temporary, state)


@contextlib.contextmanager
def _replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A name beside `path` to write to, which takes its place when all went well."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        # Created here, so that the libraries below meet no problem that this does not show.
        temporary.touch(exist_ok=False)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _write_safetensors(path: pathlib.Path, state: dict[str, np.ndarray]) -> None:
    import safetensors.numpy

    # PyTorch projects ask for this mark before they load a file.
    try:
        safetensors.numpy.save_file(state, path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:  # also for a full disk
        raise OSError(str(error)) from error


def _write_npz(path: pathlib.Path, state: dict[str, np.ndarray]) -> None:
    with open(path, "wb") as file:  # by name, NumPy would append a suffix
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
    except RuntimeError as error:  # PyTorch's zip writer, when the disk is full
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
        raise ValueError(f"variables are {{'params': …}}, not a {type(variables).__name__}")
    found = {}
    for key, leaf in flatten_dict(variables, sep="/").items():
        if (tensor := describe(leaf)) is None:
            raise ValueError(f"variables: {key} is a {type(leaf).__name__}, no array")
        found[key] = tensor
    return found
