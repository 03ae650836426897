"""What a converted network is on disk: one directory, written whole or not at all.

metadata.json        architecture, classes, normalisation, source, versions
proof.json           how its logits compare with those of the network it came from
model.safetensors    the deploy variables, flat: params/stage1_block0/reparam/kernel, …
orbax/               the same, for Orbax
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.metadata
import importlib.util
import json
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from repvgg_jax._version import __version__
from repvgg_jax.export import FORMATS, Artefact, Network, export
from repvgg_jax.export.artefact import checksum
from repvgg_jax.model import RepVGG, create_model
from repvgg_jax.variants import Variant
from repvgg_jax.weights import load_weights, save_weights

KIND = "repvgg_jax deployment"

_TORCH = {"torch-official": "official", "torch-timm": "timm"}


@dataclasses.dataclass(frozen=True)
class Deployment:
    """A converted network, read back.

    Attributes:
      model: in deploy form.
      variables: `{"params": …}`, NumPy arrays.
      metadata: what `metadata.json` says; `classes`, `mean`, `std` and `image_shape` among it.
      proof: what `proof.json` says.
    """

    model: RepVGG
    variables: dict[str, Any]
    metadata: dict[str, Any]
    proof: dict[str, Any]


def load_deployed(path: str | pathlib.Path) -> Deployment:
    """Reads a directory that `convert.py` wrote.

    Raises:
      ValueError: it is none, or its arrays are not those of the architecture it names.
    """
    path = pathlib.Path(path)
    if not is_deployment(path):
        raise ValueError(f"{path} is no converted network: it has no metadata.json of ours")
    metadata = json.loads((path / "metadata.json").read_text())
    variant = Variant(**metadata["variant"])
    weights = path / FORMATS["safetensors"].filename
    if not weights.exists():
        raise ValueError(
            f"{path} was converted without safetensors; convert again with --format safetensors"
        )
    model = create_model(variant, num_classes=metadata["num_classes"], deploy=True)
    loaded = load_weights(weights, variant=variant, num_classes=metadata["num_classes"] or None)
    proof = json.loads((path / "proof.json").read_text())
    return Deployment(model, loaded.variables, metadata, proof)


def is_deployment(path: pathlib.Path) -> bool:
    """Whether a directory is one that we wrote."""
    try:
        return json.loads((path / "metadata.json").read_text()).get("kind") == KIND
    except (OSError, ValueError, AttributeError):
        return False


def check_free(path: pathlib.Path) -> None:
    """Checks that a deployment may be written there.

    Raises:
      ValueError: something else is there already.
    """
    if not path.exists() or is_deployment(path):
        return
    if not path.is_dir():
        raise ValueError(f"{path} is a file; give another --output, a directory to make")
    if others := sorted(entry.name for entry in path.iterdir()):
        raise ValueError(
            f"{path} already holds {', '.join(others[:5])}{', …' if len(others) > 5 else ''}, "
            "which is no earlier conversion; give another --output"
        )


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A directory to write to, which becomes `path` at the end, and only if nothing failed.

    An earlier deployment at `path` is replaced.
    """
    check_free(path)
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.replace(old)
        temporary.replace(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def formats() -> tuple[str, ...]:
    """Every format by name; those of `repvgg_jax.export` take a type too, `onnx:float16`."""
    return ("orbax", *FORMATS, *_TORCH)


def check_formats(names: Sequence[str]) -> None:
    """Checks names of formats before any work is done.

    Raises:
      ValueError: none at all, an unknown one, or a type that one does not have.
    """
    if not names:
        raise ValueError(f"no format was asked for; there are: {', '.join(formats())}")
    for text in names:
        name, _, dtype = text.partition(":")
        if name not in formats():
            near = difflib.get_close_matches(name, formats(), n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"unknown format {name!r}; {hint}There are: {', '.join(formats())}")
        if name in FORMATS:
            FORMATS[name].dtype(dtype or None)
        elif dtype:
            raise ValueError(f"format {name} is float32 and takes no type, {text!r} has one")


def write(text: str, network: Network, directory: pathlib.Path) -> Artefact | Copy:
    """Writes one format of a network into a directory, and reads it back.

    Args:
      text: one of `formats()`, with a type perhaps.
      network: where it has preprocessing, only formats that hold a graph do.
      directory: where to.

    Raises:
      ValueError: what was read back is not what was to be written, or a package is missing.
    """
    name, _, dtype = text.partition(":")
    if name in FORMATS:
        form = FORMATS[name]
        if not form.holds_graph:
            network = network.without_preprocessing()
        path = directory / form.filename_in(form.dtype(dtype or None))
        return export(name, network, path, dtype=dtype or None)
    if name == "orbax":
        return _write_orbax(network, directory / "orbax")
    return _write_torch(name, network, directory)


@dataclasses.dataclass(frozen=True)
class Copy:
    """Weights in another container; what was read back is the same to the last bit.

    Attributes:
      format: its name.
      files: what was written.
    """

    format: str
    files: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.format}: {', '.join(self.files)} (read back, same bits)"

    def as_dict(self) -> dict[str, Any]:
        """Everything, for `proof.json`."""
        return {**dataclasses.asdict(self), "status": "proven", "same_bits": True}


def _write_orbax(network: Network, path: pathlib.Path) -> Copy:
    """For `orbax.checkpoint.StandardCheckpointer().restore`."""
    import orbax.checkpoint as ocp

    tree = {"params": network.params}
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), tree
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), tree)
        checkpointer.wait_until_finished()
        _check_same("orbax", tree, checkpointer.restore(path.absolute(), abstract))
    return Copy("orbax", (path.name,))


def _write_torch(name: str, network: Network, directory: pathlib.Path) -> Copy:
    """A state dict under the names of another project; `.pth` too where PyTorch is there."""
    family, variant = _TORCH[name], network.model.variant
    suffixes = [".safetensors", *([".pth"] if importlib.util.find_spec("torch") else [])]
    files = tuple(f"model.{family}{suffix}" for suffix in suffixes)
    tree = {"params": network.params}
    for file in files:
        save_weights(directory / file, tree, family=family, variant=variant)
        read = load_weights(directory / file, variant=variant)
        _check_same(f"{name} ({file})", tree, read.variables)
    return Copy(name, files)


def _check_same(name: str, written: Any, read: Any) -> None:
    expected, found = (dict(jax.tree_util.tree_flatten_with_path(t)[0]) for t in (written, read))
    same = expected.keys() == found.keys() and all(
        np.array_equal(expected[path], found[path]) for path in expected
    )
    if not same:
        raise ValueError(f"{name}: what was read back is not what was written; wrote nothing")


def write_metadata(directory: pathlib.Path, network: Network, source: Mapping[str, Any]) -> None:
    """Writes `metadata.json`."""
    content = {
        "kind": KIND,
        "variant": dataclasses.asdict(network.model.variant),
        "num_classes": network.model.num_classes,
        "classes": list(network.metadata.labels),
        "image_shape": list(network.image_shape),
        "mean": list(network.metadata.mean),
        "std": list(network.metadata.std),
        "with_preprocessing": network.with_preprocessing,
        "source": dict(source),
        "versions": versions(),
    }
    (directory / "metadata.json").write_text(json.dumps(content, indent=2) + "\n")


def write_proof(directory: pathlib.Path, proofs: Mapping[str, Any]) -> None:
    """Writes `proof.json`, with a SHA-256 of every file that is there by then."""
    files = sorted(entry for entry in directory.rglob("*") if entry.is_file())
    sums = {file.relative_to(directory).as_posix(): checksum(file) for file in files}
    content = {**proofs, "sha256": sums, "versions": versions()}
    (directory / "proof.json").write_text(json.dumps(content, indent=2) + "\n")


def versions() -> dict[str, str]:
    """Of this package and of those that its numbers depend on."""
    names = ("jax", "jaxlib", "flax", "numpy")
    return {"repvgg-jax": __version__} | {name: importlib.metadata.version(name) for name in names}
