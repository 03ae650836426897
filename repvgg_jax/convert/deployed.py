"""The deploy directory: what a converted network is on disk, written completely or not at all.

metadata.json        architecture, classes, normalization, source, versions
proof.json           how its logits compare with those of its source; SHA-256 of every file, and
                     of itself
model.safetensors    the deploy variables, params/stage1_block0/…
orbax/               the same, for Orbax
model.onnx, …        what `--format` asks for
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import jax
import numpy as np
import safetensors.numpy
from flax.traverse_util import unflatten_dict

from repvgg_jax import files
from repvgg_jax._version import __version__
from repvgg_jax.convert.earlier import WEIGHTS, Kept, take_over, weights_digest
from repvgg_jax.export import FORMATS, Artifact, Network
from repvgg_jax.export.operators import ACTIVATIONS, activation_kind
from repvgg_jax.model import RepVGG, create_model
from repvgg_jax.normalize import Normalize
from repvgg_jax.proof import Proof
from repvgg_jax.segmentation.network import Segmenter, create_segmenter
from repvgg_jax.segmentation.resnet import RESNETS
from repvgg_jax.text import first_few, named_leaves, one_line, versions
from repvgg_jax.typed import typed
from repvgg_jax.variants import Variant
from repvgg_jax.weights import load_weights

if TYPE_CHECKING:
    from repvgg_jax.classifier import Classifier

KIND = "repvgg_jax deployment"

# Keys of the two files; files on disk have them, so spellings stay.
_ARTIFACTS = "artefacts"

_FORMAT = 2  # of the directory: proof.json has a digest of itself
_MOST = 10_000_000  # classes, or pixels of a side: anything above is damage


@dataclasses.dataclass(frozen=True)
class Crop:
    """How evaluation turned image files into pixels; see `config.data`.

    Attributes:
      fraction: of the side that just covers the crop, that remains.
      background: color behind transparent pixels.
      white: what becomes 255 in images of more than 8 bits; 0: their type's largest.
    """

    fraction: float = 0.875
    background: tuple[int, int, int] = (255, 255, 255)
    white: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction={self.fraction} must be above 0, up to 1")
        if not all(0 <= value <= 255 for value in self.background) or not self.white >= 0:
            raise ValueError(f"background={self.background} or white={self.white} is no color")


@dataclasses.dataclass(frozen=True)
class Deployment:
    """A converted network, read back and verified.

    Attributes:
      model: in deploy form.
      variables: `{"params": …}`, NumPy arrays.
      metadata: `metadata.json`, e.g. `classes`, `mean`, `std` and `image_shape`.
      proof: `proof.json`.
      path: the directory.
    """

    model: RepVGG | Segmenter
    variables: dict[str, Any]
    metadata: dict[str, Any]
    proof: dict[str, Any]
    path: pathlib.Path = pathlib.Path()

    @property
    def classes(self) -> tuple[str, ...]:
        """Names by label; empty if unknown."""
        return tuple(self.metadata["classes"])

    def preprocess(self, image: Any) -> np.ndarray:
        """An image file as evaluation crops and resizes it, see `Classifier.preprocess`."""
        return self._classifier.preprocess(image)

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Probabilities (images, classes) of uint8 images, see `Classifier.predict`.

        A segmenter's are those of every pixel, (images, height, width, classes).

        The first call compiles, with the weights as constants.
        """
        return self._classifier.predict(images)

    @functools.cached_property
    def _classifier(self) -> "Classifier":
        return self.classifier()

    def classifier(
        self, *, constant_weights: bool = True, runtime: str | None = None
    ) -> "Classifier":
        """The network with everything between an image file and its classes.

        Args:
          constant_weights: as in `Classifier`.
          runtime: runs an artifact of the directory instead of the JAX model, e.g. `onnxruntime`,
            `openvino`, `ai_edge_litert`, `tensorflow`, or `jax` for StableHLO; a dtype may follow,
            as in `onnxruntime:float16`.

        Raises:
          ValueError: it has no classes; or no artifact for the runtime, which may be unknown or not
            installed.
        """
        from repvgg_jax.classifier import Classifier, center_crop
        from repvgg_jax.convert.runtimes import Choice

        found = Metadata.from_json(self.metadata)
        normalize, run = Normalize(found.mean, found.std), None
        if runtime is not None:
            choice = Choice.parse(runtime)
            artifact = choice.find(self.proof.get(_ARTIFACTS, ()), self.path)
            run = choice.open(self.path, artifact, self.model, self.variables, normalize)
        return Classifier(
            self.model,
            self.variables,
            normalize,
            found.classes,
            found.image_shape,
            center_crop(found.image_shape, **dataclasses.asdict(found.crop)),
            constant_weights,
            run,
        )


def load_deployed(path: str | pathlib.Path, *, verify: bool = True) -> Deployment:
    """Reads a directory that `convert.py` wrote.

    Before anything is used, `proof.json` is compared with its own digest and every file that it
    lists with its SHA-256. Files that are not needed here, e.g. `model.onnx`, may be missing. This
    detects damage, not forgery: whoever changes a file on purpose can change its checksum, too.
    Version 0.1 wrote no digest of `proof.json`: of its directories the listed files are verified.

    Args:
      path: the directory.
      verify: False skips digest, checksums and the recorded proof. Types and ranges in
        `metadata.json` are always checked.

    Raises:
      ValueError: not such a directory; a damaged or missing file; or weights that are not those
        of the architecture in `metadata.json`.
    """
    path = pathlib.Path(path)
    if not is_deployment(path):
        raise ValueError(
            f"{path} is not a converted model (no metadata.json of convert.py){_interrupted(path)}"
        )
    content, proof = _read_object(path / "metadata.json"), _read_object(path / "proof.json")
    weights = path / FORMATS["safetensors"].filename
    if not weights.exists():
        raise ValueError(f"{path} has no {weights.name}; convert again with --format safetensors")
    try:
        metadata = Metadata.from_json(content)
    except ValueError as error:
        raise ValueError(
            f"{path / 'metadata.json'} describes no known network: {one_line(error, 300)}"
        ) from error
    if verify:
        _verify(path, proof, metadata.format, needed=("metadata.json", weights.name))
    if metadata.segmentation is not None:
        segmenter, variables = _read_segmenter(metadata, metadata.segmentation, weights)
        return Deployment(segmenter, variables, content, proof, path)
    assert isinstance(metadata.variant, Variant)
    model = create_model(
        metadata.variant,
        num_classes=metadata.num_classes,
        deploy=True,
        activation=ACTIVATIONS[metadata.activation],
    )
    loaded = load_weights(weights, variant=metadata.variant, num_classes=metadata.num_classes)
    if not loaded.deploy:
        raise ValueError(f"{weights} is in training form, but a converted model is in deploy form")
    return Deployment(model, loaded.variables, content, proof, path)


def _read_segmenter(
    metadata: "Metadata", form: "SegmenterForm", weights: pathlib.Path
) -> tuple[Segmenter, dict[str, Any]]:
    """The network that `metadata.json` describes, and its variables, compared in name and shape."""
    backbone = RESNETS.get(form.backbone, metadata.variant)
    assert backbone is not None  # `Metadata` checks it
    try:
        model = create_segmenter(
            backbone,
            metadata.num_classes,
            deploy=True,
            activation=ACTIVATIONS[metadata.activation],
            fast=form.fast,
            output_stride=form.output_stride,
            bins=form.bins,
            width=form.width,
        )
        found = unflatten_dict(safetensors.numpy.load_file(weights), sep="/")
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{weights}: {one_line(error, 300)}; convert again") from error
    image = jax.ShapeDtypeStruct((1, *metadata.image_shape), "float32")
    wanted = jax.eval_shape(model.init, jax.random.key(0), image)
    shapes = [
        {name: leaf.shape for name, leaf in named_leaves(tree).items()} for tree in (wanted, found)
    ]
    if shapes[0] != shapes[1]:
        wrong = dict(shapes[0].items() ^ shapes[1].items())
        raise ValueError(
            f"{weights} is not the network in metadata.json: {first_few(sorted(wrong))}; "
            "convert again"
        )
    return model, found


def _interrupted(path: pathlib.Path) -> str:
    old = files.interrupted(path.absolute())
    return "" if old is None else f"; a conversion was killed, and {old} was there before it"


def is_deployment(path: pathlib.Path) -> bool:
    """Whether `convert.py` wrote this directory."""
    try:
        content = files.read_json(path / "metadata.json")
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("kind") == KIND


@dataclasses.dataclass(frozen=True)
class SegmenterForm:
    """What a segmenter adds to its backbone, as in `create_segmenter`.

    Attributes:
      backbone: its name.
      fast: which layers are dilated.
      output_stride: pixels of an image per pixel of the last map.
      bins: windows of the pyramid.
      width: channels of the decoder.
    """

    backbone: str
    fast: bool
    output_stride: int
    bins: tuple[int, ...]
    width: int

    @classmethod
    def of(cls, model: Segmenter) -> Self:
        """That of a network."""
        return cls(model.variant.name, model.fast, model.output_stride, model.bins, model.width)


@dataclasses.dataclass(frozen=True)
class Metadata:
    """The fields of `metadata.json` that using a network takes; each is checked.

    Attributes:
      variant: the architecture; None for a segmenter on a ResNet.
      num_classes: 0 for pooled features.
      activation: of its blocks, one of `ACTIVATIONS`.
      classes: names, by label; empty if unknown.
      image_shape: (height, width, channels) of its images.
      mean: per channel or a single one, of pixels scaled to 0 … 1.
      std: the same.
      with_preprocessing: whether its graphs take uint8 images.
      format: version of the directory; 2 has a digest of `proof.json`.
      segmentation: None for a classifier.
      crop: how its images were read; earlier versions do not say.
    """

    variant: Variant | None
    num_classes: int
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    activation: str | None = "relu"
    with_preprocessing: bool = False
    format: int = 1
    segmentation: SegmenterForm | None = None
    crop: Crop = Crop()

    def __post_init__(self) -> None:
        if not 1 <= self.format <= _FORMAT:
            raise ValueError(
                f"format={self.format} is of a later version, this one reads up to {_FORMAT}"
            )
        if self.variant is None and (
            self.segmentation is None or self.segmentation.backbone not in RESNETS
        ):
            raise ValueError("variant is missing")
        if not 0 <= self.num_classes <= _MOST:
            raise ValueError(f"num_classes={self.num_classes} must be from 0 to {_MOST:,}")
        if self.activation not in ACTIVATIONS:
            known = ", ".join(map(str, ACTIVATIONS))
            raise ValueError(f"activation={one_line(self.activation, 60)!r} must be one of {known}")
        if self.classes and len(self.classes) != self.num_classes:
            raise ValueError(f"{len(self.classes)} classes have names, of {self.num_classes}")
        if not all(0 < size <= _MOST for size in self.image_shape):
            raise ValueError(f"image_shape={list(self.image_shape)} must be from 1 to {_MOST:,}")
        if len(Normalize(self.mean, self.std).mean) not in (1, self.image_shape[-1]):
            raise ValueError(f"{len(self.mean)} means for {self.image_shape[-1]} channels")

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Reads `metadata.json`; later versions may add fields.

        Raises:
          ValueError: a field is missing, or its type or value is not allowed.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        known = {key: value for key, value in content.items() if key in fields}
        return typed(cls, known, "metadata")


def _read_object(path: pathlib.Path) -> dict[str, Any]:
    try:
        return typed(dict[str, Any], files.read_json(path), path.stem)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}; convert again") from error


def _verify(
    path: pathlib.Path, proof: Mapping[str, Any], version: int, *, needed: Sequence[str]
) -> None:
    """Compares files with their checksums; those not needed may be missing, but not differ."""
    where = path / "proof.json"
    rest = {key: value for key, value in proof.items() if key != "digest"}
    if (version > 1 or "digest" in proof) and proof.get("digest") != files.json_digest(rest):
        raise ValueError(f"{where} differs from its own digest; convert again")
    try:
        listed = typed(dict[str, str], proof.get("sha256"), "sha256")
        fused = typed(dict[str, Any] | None, proof.get("fused"), "fused")
    except ValueError as error:
        raise ValueError(f"{where} has no list of checksums: {error}; convert again") from error
    if outside := [name for name in listed if not files.is_below(name)]:
        raise ValueError(f"{where} lists files outside of {path}: {first_few(outside)}")
    if unlisted := [name for name in needed if name not in listed]:
        raise ValueError(f"{where} has no checksum of {first_few(unlisted)}; convert again")
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
    if (fused or {}).get("holds") is False:
        raise ValueError(f"{where} records that the fused network differs; convert again")


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
        return {"variant": variant.as_dict()}
    return {
        "variant": variant.as_dict() if isinstance(variant, Variant) else None,
        "segmentation": dataclasses.asdict(SegmenterForm.of(model)),
    }


def write_description(
    directory: pathlib.Path,
    network: Network,
    artifacts: Sequence[Artifact],
    *,
    proof: Proof | None,
    source: Mapping[str, Any],
    crop: Crop = Crop(),
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
        "format": _FORMAT,
        **_architecture(network.model),
        "num_classes": network.model.num_classes,
        "activation": activation_kind(network.model.activation, network.model.variant.name),
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
        _ARTIFACTS: [*(artifact.as_dict() for artifact in artifacts), *kept.artifacts],
        "sha256": dict(sorted(checksums.items())),
        "versions": installed,
    }
    content["digest"] = files.json_digest(content)
    (directory / "proof.json").write_text(json.dumps(content, indent=2) + "\n")
    return kept
