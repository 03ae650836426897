"""The deploy directory: what a converted network is on disk, written completely or not at all.

metadata.json        architecture, classes, normalization, source, versions
proof.json           how its logits compare with those of its source; SHA-256 of every file
model.safetensors    the deploy variables, params/stage1_block0/…
orbax/               the same, for Orbax
model.onnx, …        what `--format` asks for
"""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from repvgg_jax import files
from repvgg_jax._version import __version__
from repvgg_jax.convert.earlier import WEIGHTS, Kept, take_over, weights_digest
from repvgg_jax.export import FORMATS, Artifact, Network
from repvgg_jax.export.operators import ACTIVATIONS, activation_kind
from repvgg_jax.model import RepVGG, create_model
from repvgg_jax.proof import Proof
from repvgg_jax.text import first_few, versions
from repvgg_jax.variants import Variant
from repvgg_jax.weights import load_weights

KIND = "repvgg_jax deployment"

# Keys of the two files; files on disk have them, so spellings stay.
_ARTIFACTS = "artefacts"


@dataclasses.dataclass(frozen=True)
class Deployment:
    """A converted network, read back and verified.

    Attributes:
      model: in deploy form.
      variables: `{"params": …}`, NumPy arrays.
      metadata: `metadata.json`, e.g. `classes`, `mean`, `std` and `image_shape`.
      proof: `proof.json`.
    """

    model: RepVGG
    variables: dict[str, Any]
    metadata: dict[str, Any]
    proof: dict[str, Any]


def load_deployed(path: str | pathlib.Path) -> Deployment:
    """Reads a directory that `convert.py` wrote.

    Every file in it that `proof.json` lists is compared with its checksum there. Files that are
    not needed here, e.g. `model.onnx`, may be missing.

    Raises:
      ValueError: not such a directory; a damaged or missing file; or weights that are not those
        of the architecture in `metadata.json`.
    """
    path = pathlib.Path(path)
    if not is_deployment(path):
        raise ValueError(f"{path} is not a converted model (no metadata.json of convert.py)")
    metadata, proof = _read_json(path / "metadata.json"), _read_json(path / "proof.json")
    weights = path / FORMATS["safetensors"].filename
    if not weights.exists():
        raise ValueError(f"{path} has no {weights.name}; convert again with --format safetensors")
    _verify(path, proof, needed=("metadata.json", weights.name))
    try:
        variant = Variant(**metadata["variant"])
        num_classes = metadata["num_classes"]
        activation = ACTIVATIONS[metadata.get("activation", "relu")]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path / 'metadata.json'} describes no known network: {error}") from error
    model = create_model(variant, num_classes=num_classes, deploy=True, activation=activation)
    loaded = load_weights(weights, variant=variant, num_classes=num_classes)
    if not loaded.deploy:
        raise ValueError(f"{weights} is in training form, but a converted model is in deploy form")
    return Deployment(model, loaded.variables, metadata, proof)


def is_deployment(path: pathlib.Path) -> bool:
    """Whether `convert.py` wrote this directory."""
    try:
        return json.loads((path / "metadata.json").read_text()).get("kind") == KIND
    except (OSError, ValueError, AttributeError):
        return False


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}; convert again") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} has a {type(content).__name__}, expected an object; convert again"
        )
    return content


def _verify(path: pathlib.Path, proof: Mapping[str, Any], *, needed: Sequence[str]) -> None:
    """Compares files with their checksums; those not needed may be missing, but not differ."""
    listed = proof.get("sha256")
    if not isinstance(listed, Mapping):
        raise ValueError(f"{path / 'proof.json'} has no checksums; convert again")
    if unlisted := [name for name in needed if name not in listed]:
        raise ValueError(f"{path / 'proof.json'} has no checksum of {first_few(unlisted)}")
    damaged = [
        name
        for name, expected in listed.items()
        if (path / name).is_file() and files.sha256(path / name) != expected
    ]
    if damaged:
        raise ValueError(
            f"{path}: {len(damaged)} of {len(listed)} files differ from their checksums in "
            f"proof.json: {first_few(damaged)}; convert again"
        )
    if (proof.get("fused") or {}).get("holds") is False:
        raise ValueError(
            f"{path / 'proof.json'} records that the fused network differs; convert again"
        )


@dataclasses.dataclass(frozen=True)
class Output:
    """Where a conversion may write: nothing there yet, or an earlier conversion to replace.

    Raises:
      ValueError: something else is there.
    """

    path: pathlib.Path

    def __post_init__(self) -> None:
        path = self.path
        if not path.exists() or is_deployment(path):
            return
        if not path.is_dir():
            raise ValueError(f"{path} is a file; --output must be a directory to create")
        if others := sorted(entry.name for entry in path.iterdir()):
            raise ValueError(
                f"{path} contains {first_few(others)}, which is not an earlier conversion; "
                "choose another --output"
            )

    @contextlib.contextmanager
    def writing(self) -> Iterator[pathlib.Path]:
        """A temporary directory that takes its place if nothing fails.

        Raises:
          OSError: it cannot be written.
        """
        with files.replacing(self.path) as temporary:
            temporary.mkdir()
            yield temporary


def write_description(
    directory: pathlib.Path,
    network: Network,
    artifacts: Sequence[Artifact],
    *,
    proof: Proof | None,
    source: Mapping[str, Any],
    earlier: pathlib.Path | None = None,
) -> Kept:
    """Writes `metadata.json` and `proof.json` next to the artifacts.

    Args:
      directory: the deploy directory.
      network: what was written.
      artifacts: what was written there.
      proof: that it computes what its source does; None if the source is in deploy form.
      source: where the network comes from.
      earlier: the directory whose place this one takes.

    Returns:
      What was taken over from `earlier`.

    Raises:
      ValueError: a file there that would be lost, see `earlier.take_over`.
    """
    installed = {"repvgg-jax": __version__, **versions("jax", "jaxlib", "flax", "numpy")}
    metadata = {
        "kind": KIND,
        "variant": dataclasses.asdict(network.model.variant),
        "num_classes": network.model.num_classes,
        "activation": activation_kind(network.model.activation, network.model.variant.name),
        "classes": list(network.labels),
        "image_shape": list(network.image_shape),
        "mean": list(network.normalize.mean),
        "std": list(network.normalize.std),
        "with_preprocessing": network.with_preprocessing,
        WEIGHTS: weights_digest(network.params),
        "source": dict(source),
        "versions": installed,
    }
    path = directory / "metadata.json"
    text = json.dumps(metadata, indent=2) + "\n"
    kept = Kept()
    if earlier is not None:
        kept = take_over(earlier, directory, json.loads(text), artifacts)
    path.write_text(text)
    checksums = {path.name: files.sha256(path), **kept.checksums}
    for artifact in artifacts:
        checksums |= artifact.checksums
    content = {
        "fused": None if proof is None else proof.as_dict(),
        _ARTIFACTS: [*(artifact.as_dict() for artifact in artifacts), *kept.artifacts],
        "sha256": dict(sorted(checksums.items())),
        "versions": installed,
    }
    (directory / "proof.json").write_text(json.dumps(content, indent=2) + "\n")
    return kept
