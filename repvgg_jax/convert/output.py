"""Writing a deploy directory: completely or not at all."""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from repvgg_jax import activations, files
from repvgg_jax._version import __version__
from repvgg_jax.convert.earlier import ARTIFACTS, WEIGHTS, Kept, take_over, weights_digest
from repvgg_jax.convert.metadata import FORMAT, KIND, Crop, SegmenterForm, is_deployment
from repvgg_jax.export import Artifact, Network
from repvgg_jax.proof import Proof
from repvgg_jax.segmentation.network import Segmenter
from repvgg_jax.text import first_few, versions
from repvgg_jax.variants import Variant


@dataclasses.dataclass(frozen=True)
class Output:
    """Where a conversion may write: nothing there yet, or an earlier conversion to replace.

    Raises:
      ValueError: something else is there.
    """

    path: pathlib.Path

    def __post_init__(self) -> None:
        if self.path.is_symlink():  # what it names is replaced, and not the link
            object.__setattr__(self, "path", self.path.resolve())
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
        with files.replacing(self.path) as temporary, contextlib.ExitStack() as stack:
            for left in files.leftovers(self.path.absolute()):
                with _locked(left) as dead:
                    if dead:
                        files.remove(left)
            temporary.mkdir()
            stack.enter_context(_locked(temporary))
            yield temporary


@contextlib.contextmanager
def _locked(directory: pathlib.Path) -> Iterator[bool]:
    """A context in which other processes see that a directory is being written.

    Yields:
      False if another process holds it, or if it cannot be locked.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _architecture(model: Any) -> dict[str, Any]:
    variant = model.variant
    if not isinstance(model, Segmenter):
        return {"variant": variant.as_saved("deploy")}
    return {
        "variant": variant.as_saved("deploy") if isinstance(variant, Variant) else None,
        "segmentation": dataclasses.asdict(SegmenterForm.of(model)),
    }


def write_description(
    directory: pathlib.Path,
    network: Network,
    artifacts: Sequence[Artifact],
    *,
    proof: Proof | None,
    source: Mapping[str, Any],
    crop: Crop,
    earlier: pathlib.Path | None = None,
    int8: Mapping[str, Any] | None = None,
) -> Kept:
    """Writes `metadata.json` and `proof.json` next to the artifacts.

    Args:
      directory: the deploy directory.
      network: what was written.
      artifacts: what was written there.
      proof: that it computes what its source does; None if the source is in deploy form.
      source: where the network comes from.
      crop: how images were read.
      earlier: the directory whose place this one takes.
      int8: what was measured of quantized artifacts.

    Returns:
      What was taken over from `earlier`.

    Raises:
      ValueError: a file there that would be lost, see `earlier.take_over`.
    """
    installed = {"repvgg-jax": __version__, **versions("jax", "jaxlib", "flax", "numpy")}
    metadata = {
        "kind": KIND,
        "format": FORMAT,
        **_architecture(network.model),
        "num_classes": network.model.num_classes,
        "activation": activations.name_of(network.model.activation, network.model.variant.name),
        "classes": list(network.labels),
        "image_shape": list(network.image_shape),
        "mean": list(network.normalize.mean),
        "std": list(network.normalize.std),
        "crop": dataclasses.asdict(crop),
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
    int8 = int8 or kept.int8
    content: dict[str, Any] = {
        "fused": None if proof is None else proof.as_dict(),
        **({} if int8 is None else {"int8": dict(int8)}),
        ARTIFACTS: [*(artifact.as_dict() for artifact in artifacts), *kept.artifacts],
        "sha256": dict(sorted(checksums.items())),
        "versions": installed,
    }
    content["digest"] = files.json_digest(content)
    (directory / "proof.json").write_text(json.dumps(content, indent=2) + "\n")
    return kept
