"""The deploy directory: what a converted network is on disk, and reading it.

metadata.json        architecture, classes, normalization, source, versions
proof.json           how its logits compare with those of its source; SHA-256 of every file, and
                     of itself
model.safetensors    the deploy variables, params/stage1_block0/…
orbax/               the same, for Orbax
model.onnx, …        what `--format` asks for
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import safetensors.numpy
from flax.traverse_util import unflatten_dict

from repvgg_jax import files
from repvgg_jax.activations import OR_NONE
from repvgg_jax.convert.earlier import ARTIFACTS
from repvgg_jax.convert.metadata import Metadata, SegmenterForm, is_deployment
from repvgg_jax.export import FORMATS
from repvgg_jax.layers import check_classes
from repvgg_jax.model import RepVGG, create_model
from repvgg_jax.normalize import Normalize
from repvgg_jax.segmentation.network import Segmenter, create_segmenter
from repvgg_jax.segmentation.resnet import RESNETS
from repvgg_jax.text import first_few, named_leaves, one_line
from repvgg_jax.typed import typed
from repvgg_jax.variants import Variant
from repvgg_jax.weights import load_weights

if TYPE_CHECKING:
    from repvgg_jax.classifier import Classifier


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
            artifact = choice.find(self.proof.get(ARTIFACTS, ()), self.path)
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
        activation=OR_NONE[metadata.activation],
    )
    loaded = load_weights(weights, variant=metadata.variant, num_classes=metadata.num_classes)
    if not loaded.deploy:
        raise ValueError(f"{weights} is in training form, but a converted model is in deploy form")
    return Deployment(model, loaded.variables, content, proof, path)


def _read_segmenter(
    metadata: Metadata, form: SegmenterForm, weights: pathlib.Path
) -> tuple[Segmenter, dict[str, Any]]:
    """The network that `metadata.json` describes, and its variables, compared in name and shape."""
    backbone = RESNETS.get(form.backbone, metadata.variant)
    assert backbone is not None  # `Metadata` checks it
    try:
        model = create_segmenter(
            backbone,
            metadata.num_classes,
            deploy=True,
            activation=OR_NONE[metadata.activation],
            fast=form.fast,
            output_stride=form.output_stride,
            bins=form.bins,
            width=form.width,
        )
        found = unflatten_dict(safetensors.numpy.load_file(weights), sep="/")
        head = found.get("params", {}).get("head", {})
        check_classes("the network in metadata.json", head, metadata.num_classes)
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
