"""What a converted network is on disk: one directory, written whole or not at all.

metadata.json        architecture, classes, normalisation, source, versions
proof.json           how its logits compare with those of the network it came from
model.safetensors    the deploy variables, flat: stage1_block0/reparam/kernel, …
orbax/               the same, for Orbax
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax
import jax
import numpy as np

from repvgg_jax.model import RepVGG, create_model
from repvgg_jax.variants import Variant

KIND = "repvgg_jax deployment"
SEPARATOR = "/"


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
    from safetensors.numpy import load_file

    path = pathlib.Path(path)
    if not is_deployment(path):
        raise ValueError(f"{path} is no converted network: it has no metadata.json of ours")
    metadata = json.loads((path / "metadata.json").read_text())
    model = create_model(
        variant_from_json(metadata["variant"]), num_classes=len(metadata["classes"]), deploy=True
    )
    images = jax.ShapeDtypeStruct((1, *metadata["image_shape"]), np.float32)
    expected = flatten(jax.eval_shape(model.init, jax.random.key(0), images)["params"])
    found = load_file(path / "model.safetensors")
    wrong = [
        name
        for name in sorted(expected.keys() | found.keys())
        if name not in found
        or name not in expected
        or (found[name].shape, found[name].dtype) != (expected[name].shape, expected[name].dtype)
    ]
    if wrong:
        raise ValueError(
            f"{path / 'model.safetensors'} does not hold a {metadata['variant']['name']}: "
            f"{len(wrong)} arrays are missing, unexpected or misshapen, the first: {wrong[0]}"
        )
    params = flax.traverse_util.unflatten_dict(found, sep=SEPARATOR)
    proof = json.loads((path / "proof.json").read_text())
    return Deployment(model, {"params": params}, metadata, proof)


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


def write_metadata(directory: pathlib.Path, variant: Variant, metadata: Mapping[str, Any]) -> None:
    """Writes `metadata.json`."""
    content = {
        "kind": KIND,
        "variant": dataclasses.asdict(variant),
        **metadata,
        "versions": versions(),
    }
    (directory / "metadata.json").write_text(json.dumps(content, indent=2) + "\n")


def write_proof(directory: pathlib.Path, proofs: Mapping[str, Any]) -> None:
    """Writes `proof.json`, with a SHA-256 of every file that is there by then."""
    files = sorted(entry for entry in directory.rglob("*") if entry.is_file())
    sums = {
        str(f.relative_to(directory)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files
    }
    content = {**proofs, "sha256": sums, "versions": versions()}
    (directory / "proof.json").write_text(json.dumps(content, indent=2) + "\n")


def write_safetensors(directory: pathlib.Path, variables: Any, variant: Variant) -> None:
    """Writes `model.safetensors`."""
    from safetensors.numpy import save_file

    arrays = {k: np.ascontiguousarray(v) for k, v in flatten(variables["params"]).items()}
    save_file(arrays, directory / "model.safetensors", metadata={"variant": variant.name})


def write_orbax(directory: pathlib.Path, variables: Any, variant: Variant) -> None:
    """Writes `orbax/`, for `orbax.checkpoint.StandardCheckpointer().restore`."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((directory / "orbax").absolute(), variables)


FORMATS: Mapping[str, Callable[[pathlib.Path, Any, Variant], None]] = {
    "safetensors": write_safetensors,
    "orbax": write_orbax,
}


def flatten(params: Any) -> dict[str, Any]:
    """Arrays by path, `stage1_block0/reparam/kernel`."""
    return flax.traverse_util.flatten_dict(params, sep=SEPARATOR)


def variant_from_json(fields: Mapping[str, Any]) -> Variant:
    """The architecture that `metadata.json` spells out."""
    return Variant(**fields)


def versions() -> dict[str, str]:
    """Of this package and of those that its numbers depend on."""
    names = ("repvgg-jax", "jax", "jaxlib", "flax", "numpy")
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
