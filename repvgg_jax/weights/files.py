"""Checkpoint files: reads safetensors, `.npz` and `.pth`, and writes variables to them.

Reading detects a format by the contents, writing selects it by the suffix.
"""

import functools
import math
import os
import pathlib
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from repvgg_jax.files import open_regular, replacing
from repvgg_jax.text import first_few, how_to_install, one_line
from repvgg_jax.variants import Variant, get_variant
from repvgg_jax.weights import torch_pickle
from repvgg_jax.weights.archive import open_zip
from repvgg_jax.weights.detect import detect, differences
from repvgg_jax.weights.names import FLAX, naming_for
from repvgg_jax.weights.tensor import Tensor, describe
from repvgg_jax.weights.unpickle import Contents

_WRITABLE = ("float16", "float32", "float64")
_SAVED = (*_WRITABLE, "int32", "int64", "uint32")  # of other modules' variables
_MAX_ARRAYS = 10_000  # of an .npz or safetensors file; a RepVGG has at most 1500
_MAX_HEADER = 8 << 20  # bytes of a safetensors header


def read(path: str | os.PathLike) -> Contents:
    """The contents of a file with a `Tensor` for every array; no array is read yet.

    Returns:
      A mapping from keys to `Tensor`; for `.pth` files whatever was saved.

    Raises:
      ValueError: no such file, unknown format, damaged, or asking for more than weights need. The
        message is one line and starts with the path.
    """
    path = pathlib.Path(path)
    try:
        contents = _reader(path)(path)
        return contents if isinstance(contents, Contents) else Contents(contents, ())
    except Exception as error:
        # Whatever a hostile or damaged file makes the parsers below raise, it means one thing.
        reason = error.strerror if isinstance(error, OSError) else None
        text = one_line(reason or error, 400) or type(error).__name__
        raise ValueError(f"{path}: {text}") from error


def contents_of(source: str | os.PathLike | Mapping[str, Any]) -> tuple[Contents, str]:
    """The contents of a file or of a state dict in memory, and what messages call it.

    Raises:
      ValueError: as `read`.
    """
    if isinstance(source, Mapping):
        return Contents(source, ()), "the state dict"
    return read(source), os.fspath(source)


def _reader(path: pathlib.Path) -> Callable[[pathlib.Path], Any]:
    """The reader for a file's format."""
    if not path.exists():
        raise ValueError("no such file")
    if path.is_dir():
        raise ValueError("a directory; give one .safetensors, .npz or .pth file")
    with open_regular(path) as file:
        size, head = os.fstat(file.fileno()).st_size, file.read(512)
    if not head:
        raise ValueError("the file is empty")
    if head.startswith(b"PK\x03\x04"):
        with open_zip(path) as archive:
            names = archive.namelist()
        if any(name.endswith("/data.pkl") for name in names):
            return torch_pickle.read_zip
        if names and all(name.endswith(".npy") for name in names):
            return _read_npz
        raise ValueError(f"a zip archive but not a checkpoint; it contains {first_few(names)}")
    header = int.from_bytes(head[:8], "little")
    if len(head) > 8 and head[8:9] == b"{" and header <= size - 8:
        if header > _MAX_HEADER:
            raise ValueError(f"its header has {header:,} bytes, at most {_MAX_HEADER:,}")
        return _read_safetensors
    if head[0] == 0x80 and len(head) > 2:
        return torch_pickle.read_legacy
    for signature, what in _NOT_CHECKPOINTS:
        if head.lstrip()[: len(signature)].lower() == signature:
            raise ValueError(f"{what}, not a checkpoint")
    raise ValueError(
        f"not a safetensors, .npz or .pth file: the first bytes are {head[:8].hex(' ')}; "
        "it may be damaged or truncated"
    )


_NOT_CHECKPOINTS = (
    (b"<!doctype", "a web page (does the download need a confirmation?)"),
    (b"<html", "a web page (does the download need a confirmation?)"),
    (b"version https://git-lfs", "a Git LFS pointer (run git lfs pull)"),
    (b"\x89hdf", "an HDF5 file"),
    (b"\x1f\x8b", "a gzip archive (decompress it first)"),
    (b"\x93numpy", "a single .npy array"),
)


def _read_safetensors(path: pathlib.Path) -> dict[str, Tensor]:
    import safetensors

    # The library checks the header against the length of the file.
    file = safetensors.safe_open(os.fspath(path), framework="np")
    keys = file.keys()
    if len(keys) > _MAX_ARRAYS:
        raise ValueError(f"{len(keys):,} arrays, at most {_MAX_ARRAYS:,}")
    found = {}
    for key in keys:
        array = file.get_slice(key)
        dtype = _SAFETENSORS.get(array.get_dtype(), array.get_dtype())
        read_it = functools.partial(file.get_tensor, key)
        found[key] = Tensor(tuple(array.get_shape()), dtype, read_it)
    return found


_SAFETENSORS = {
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
    "I32": "int32",
    "U8": "uint8",
    "BOOL": "bool",
}


def _read_npz(path: pathlib.Path) -> dict[str, Tensor]:
    archive = open_zip(path)  # stays open for the arrays, which are read later
    records = archive.infolist()
    if len(records) > _MAX_ARRAYS:
        raise ValueError(f"{len(records):,} arrays, at most {_MAX_ARRAYS:,}")
    return {info.filename.removesuffix(".npy"): _npy(archive, info) for info in records}


def _npy(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Tensor:
    """One array of an `.npz` file; its header must agree with the size of its record."""
    # Other compressions expand a little input without limit.
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"record {info.filename!r} is compressed in a way that NumPy never does")
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, _, dtype = np.lib.format.read_array_header_2_0(file)
        else:
            raise ValueError(f"record {info.filename!r} has .npy version {version}")
        length = file.tell() + math.prod(shape) * dtype.itemsize
    if dtype.hasobject or length != info.file_size or any(n < 0 for n in shape):
        raise ValueError(f"record {info.filename!r} is not an array of shape {shape}, {dtype}")

    def read() -> np.ndarray:
        with archive.open(info) as file:
            return np.lib.format.read_array(file, allow_pickle=False)

    return Tensor(tuple(shape), dtype.name, read)


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
    writer = _writer(path)
    state = to_state_dict(variables, family=family, variant=variant)
    _write(path, state, writer)


_Writer = Callable[[pathlib.Path, dict[str, np.ndarray]], None]


def _writer(path: str | os.PathLike) -> _Writer:
    writer = _WRITERS.get(pathlib.Path(path).suffix)
    if writer is None:
        raise ValueError(f"{path}: the suffix must be one of {', '.join(_WRITERS)}")
    return writer


def _write(path: str | os.PathLike, state: dict[str, np.ndarray], writer: _Writer) -> None:
    try:
        with replacing(pathlib.Path(path)) as temporary:
            # Created here so that a directory without write permission is an OSError.
            temporary.touch(exist_ok=False)
            writer(temporary, state)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}") from error


def save_variables(path: str | os.PathLike, variables: Mapping[str, Any]) -> None:
    """Writes the variables of any Linen module, in either form, as `save_weights` does a RepVGG's.

    Arrays are named by their paths, joined by slashes, and keep their dtypes; `load_variables`
    reads them.

    Args:
      path: its suffix selects the format: `.safetensors`, `.npz` or, if PyTorch is installed,
        `.pth`.
      variables: nested mappings of NumPy or JAX arrays, e.g. `{"params": …, "batch_stats": …}`.

    Raises:
      ValueError: unknown suffix, `path` cannot be written, something that is not an array, an
        empty key, or a dtype that such files do not have.
    """
    writer = _writer(path)
    state = {}
    for key, tensor in _described(variables).items():
        if "" in key.split("/"):
            raise ValueError(
                f"variables: {key!r} has an empty part; the keys of nested mappings, joined by "
                "slashes, name an array"
            )
        if tensor.dtype not in _SAVED:
            raise ValueError(
                f"variables: {key} has dtype {tensor.dtype}; files take {', '.join(_SAVED)}"
            )
        state[key] = np.asarray(tensor.read(), order="C")
    _write(path, state, writer)


def load_variables(
    path: str | os.PathLike, *, like: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Reads what `save_variables` wrote, or the `safetensors` export of a module of your own.

    Args:
      path: the file; like `load_weights`, this executes nothing in it.
      like: variables, or `jax.eval_shape` of them, that must have the same names and shapes.

    Returns:
      Nested dictionaries of NumPy arrays.

    Raises:
      ValueError: in one line: not such a file, damaged, or not like `like`.
    """
    tensors = read(path).value
    if not isinstance(tensors, dict) or not all(
        isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in tensors.items()
    ):
        raise ValueError(f"{path}: not a flat mapping of arrays; save_variables writes one")
    if like is not None:
        wanted = {key: tuple(leaf.shape) for key, leaf in flatten_dict(like, sep="/").items()}
        found = {key: tensor.shape for key, tensor in tensors.items()}
        if any(wrong := differences(wanted, found)):
            raise ValueError(f"{path}: {wrong}")
    arrays = {}
    for key, tensor in tensors.items():
        try:
            arrays[key] = np.array(tensor.read())
        except Exception as error:  # of whichever library reads this format
            raise ValueError(f"{path}: {key} cannot be read: {one_line(error)}") from error
    try:
        return unflatten_dict(arrays, sep="/")
    except (TypeError, AttributeError, IndexError) as error:  # one path is the beginning of another
        raise ValueError(f"{path}: its keys do not form a tree: {first_few(arrays)}") from error


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
            f"{how_to_install(extra='torch')}, or write .safetensors, which PyTorch projects read"
        ) from error
    try:
        # a copy of what is read-only, e.g. an array of JAX, about which PyTorch would warn
        writable = {key: np.require(array, requirements="W") for key, array in state.items()}
        torch.save({key: torch.from_numpy(array) for key, array in writable.items()}, path)
    except RuntimeError as error:  # PyTorch's zip writer if the disk is full
        raise OSError(str(error).splitlines()[0]) from error


_WRITERS: dict[str, _Writer] = {
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
