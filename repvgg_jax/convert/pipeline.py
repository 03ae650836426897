"""From a training run or a checkpoint to a deploy directory: read, fuse, prove, write."""

import dataclasses
import pathlib
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from repvgg_jax.convert.deployed import Output, is_deployment, load_deployed, write_description
from repvgg_jax.data.sources import photo_crops
from repvgg_jax.export import Network, Target
from repvgg_jax.export.operators import activation_kind
from repvgg_jax.model import RepVGG, create_model
from repvgg_jax.normalize import Normalize
from repvgg_jax.proof import TOLERANCE, Forward, Proof, compare
from repvgg_jax.text import plural
from repvgg_jax.train.restore import load_run, validation_images
from repvgg_jax.weights import load_file_or_pretrained
from repvgg_jax.weights.detect import UnknownVariantError

PROOF_IMAGES = 1000  # validation images in a proof, at most
ARTIFACT_IMAGES = 64  # at most, run by every runtime of every artifact
BATCH = 32  # images, of the proof and of the timing
TIMED_ROUNDS = 3, 11  # at least, at most
TIMED_SECONDS = 10.0  # no further round after this

IMAGENET = Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
"""What the published networks were trained with."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A network to convert, and real images to prove the result on.

    Attributes:
      title: what it is, in a line.
      model: in the form of the variables; computes in float32.
      variables: NumPy arrays.
      images: real ones, uint8 (images, height, width, channels).
      image_source: what the images are, e.g. "360 validation images of digits".
      normalize: pixels to what the model takes.
      labels: name of every class; empty if unknown.
      details: where it comes from, for `metadata.json`.
    """

    title: str
    model: RepVGG
    variables: dict[str, Any]
    images: np.ndarray
    image_source: str
    normalize: Normalize
    labels: tuple[str, ...]
    details: dict[str, Any]


def from_run(path: pathlib.Path) -> Source:
    """The newest valid checkpoint of a training run, and real images.

    Neither the run's data nor its optimizer is needed. Without its data, the images are the
    built-in photographs.

    Raises:
      ValueError: no run or no valid checkpoint there.
    """
    run = load_run(path)
    images, image_source = validation_images(run, PROOF_IMAGES)
    return Source(
        title=f"RepVGG {run.model.variant.name}, step {run.step} of {path}",
        # The proof is about the function, not about the rounding of a half-precision run.
        model=run.model.clone(dtype=np.float32, remat=False),
        variables=run.variables,
        images=images,
        image_source=image_source,
        normalize=run.normalize,
        labels=run.classes,
        details={"workdir": str(path), "step": run.step, "images": image_source},
    )


def from_deployed(path: pathlib.Path) -> Source:
    """A directory that `convert.py` wrote, verified, and photographs of its images' shape.

    Raises:
      ValueError: no such directory, a damaged file, or images of neither 1 nor 3 channels.
    """
    deployed = load_deployed(path)
    metadata = deployed.metadata
    try:
        height, width, channels = metadata["image_shape"]
        normalize = Normalize(tuple(metadata["mean"]), tuple(metadata["std"]))
        labels = tuple(metadata["classes"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path / 'metadata.json'} lacks a valid {error}") from error
    if channels not in (1, 3):
        raise ValueError(
            f"{path} takes images of {channels} channels, but the built-in photographs have 1 or "
            "3; convert the training run that it came from"
        )
    images = photo_crops(max(height, width))[:, :height, :width]
    if channels == 1:
        images = images.mean(-1, keepdims=True).round().astype(np.uint8)
    image_source = f"{plural(len(images), 'crop')} of built-in photographs"
    return Source(
        title=f"RepVGG {deployed.model.variant.name} of {path}",
        model=deployed.model,
        variables=deployed.variables,
        images=images,
        image_source=image_source,
        normalize=normalize,
        labels=labels,
        details={
            "deployment": str(path),
            "fused": deployed.proof.get("fused"),
            "source": metadata.get("source"),
            "images": image_source,
        },
    )


def from_weights(name: str, *, image_size: int = 224) -> Source:
    """A directory of `convert.py`, a checkpoint file, or a model of timm by its hub name.

    Args:
      name: e.g. `deploy`, `RepVGG-B1g4-train.pth` or `repvgg_b1g4.rvgg_in1k`.
      image_size: height and width of the images it will be used on, in pixels; a directory
        records its own.

    Raises:
      ValueError: not readable, not a RepVGG, or not for images of three channels.
    """
    if image_size < 1:
        raise ValueError(f"--image-size={image_size} must be positive")
    path = pathlib.Path(name)
    if path.is_dir():
        if not is_deployment(path):
            raise ValueError(
                f"{name} is a directory that convert.py did not write; if it is a training run, "
                f"give --workdir {name}"
            )
        return from_deployed(path)
    try:
        loaded = load_file_or_pretrained(name)
    except UnknownVariantError as error:
        directory = path.parent if is_deployment(path.parent) else "DEPLOY"
        raise ValueError(
            f"{name} is none of the official architectures ({error.architecture}): give the "
            f"directory that convert.py wrote, --from {directory}, or the run, --workdir RUN"
        ) from error
    if loaded.in_channels != 3:
        raise ValueError(
            f"{name} takes images of {loaded.in_channels} channels, but the built-in proof images "
            "have 3; convert the training run that it came from"
        )
    images = photo_crops(image_size)
    image_source = f"{plural(len(images), 'crop')} of built-in photographs"
    return Source(
        title=f"RepVGG {loaded} of {name}",
        model=create_model(
            loaded.variant,
            num_classes=loaded.num_classes,
            deploy=loaded.deploy,
            epsilon=loaded.epsilon,
        ),
        variables=loaded.variables,
        images=images,
        image_source=image_source,
        normalize=IMAGENET,
        labels=(),
        details={"weights": name, "family": loaded.family, "images": image_source},
    )


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
      title: what was converted.
      params: number of parameters as trained and fused; the first is None if the source was
        already fused.
      images_per_second: of the two forms in float32, batches of 32 on this machine; medians.
      proof: that both compute the same function; None if the source was already fused.
      image_source: what the proof ran on.
      output: the directory written.
      lines: what was written there, with its proofs.
    """

    title: str
    params: tuple[int | None, int]
    images_per_second: tuple[float | None, float]
    proof: Proof | None
    image_source: str
    output: pathlib.Path
    lines: tuple[str, ...]

    def table(self) -> str:
        """A summary as text."""
        (params, fused), (speed, fused_speed) = self.params, self.images_per_second
        rows = [
            ("", "as trained", "fused", ""),
            ("parameters", _number(params), _number(fused), _share(fused, params, ".1%")),
            ("images/s", _number(speed), _number(fused_speed), _share(fused_speed, speed, ".2f")),
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join(
                cell.rjust(width) if column else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        if self.proof is None:
            proof, images = "none, the source was in deploy form", "images of the artifacts' proofs"
        else:
            proof, images = str(self.proof), "proof images"
        return "\n".join(
            [
                self.title,
                *(line.rstrip() for line in lines),
                f"proof: {proof}",
                f"{images}: {self.image_source}",
                f"written to {self.output}:",
                *(f"  {line}" for text in self.lines for line in text.splitlines()),
            ]
        )


def convert(
    source: Source,
    output: Output,
    *,
    targets: Sequence[Target],
    tolerance: float = TOLERANCE,
    with_preprocessing: bool = False,
) -> Conversion:
    """Fuses a network, proves that the fused one computes the same, and writes it.

    Args:
      source: the network.
      output: where to write; an earlier conversion there is replaced.
      targets: what to write.
      tolerance: largest |Δlogit| allowed, relative to the largest |logit|.
      with_preprocessing: artifacts that hold a graph take uint8 images and return probabilities.

    Raises:
      ValueError: an unknown activation, a proof that does not hold, or an artifact that its
        runtime reads differently; nothing is written then.
      OSError: the output cannot be written.
    """
    if not tolerance > 0:
        raise ValueError(f"--tolerance={tolerance} must be positive")
    activation_kind(source.model.activation, source.title)  # `load_deployed` must know it
    images = source.normalize(source.images)
    deployed = source.model.clone(deploy=True)
    fused, proof = source.variables, None
    forms: dict[str, Forward] = {}
    if not source.model.deploy:
        fused = source.model.fuse(source.variables)
        forms["trained"] = Forward(source.model.apply, source.variables, batch_size=BATCH)
    forms["fused"] = Forward(deployed.apply, fused, batch_size=BATCH)
    if "trained" in forms:
        proof = compare(forms["trained"](images), forms["fused"](images), tolerance=tolerance)
        if not proof.holds:
            raise ValueError(
                f"the fused network does not compute what the trained one does: {proof}; "
                "nothing was written"
            )
    # Before the runtimes are opened, whose idle threads would slow it down.
    speed = _images_per_second(forms, images)
    forms.clear()
    network = Network(
        deployed,
        fused,
        images=source.images[:ARTIFACT_IMAGES],
        normalize=source.normalize,
        labels=source.labels,
        with_preprocessing=with_preprocessing,
    )
    weights_only = network.without_preprocessing()
    with output.writing() as directory:
        artifacts = [
            target.write(
                network if target.format.holds_graph else weights_only,
                directory / name,
            )
            for target in targets
            for name in target.filenames
        ]
        write_description(directory, network, artifacts, proof=proof, source=source.details)
    return Conversion(
        title=source.title,
        params=(
            None if source.model.deploy else _size(source.variables["params"]),
            _size(fused["params"]),
        ),
        images_per_second=(speed.get("trained"), speed["fused"]),
        proof=proof,
        image_source=source.image_source,
        output=output.path,
        lines=(*(str(artifact) for artifact in artifacts), "metadata.json, proof.json"),
    )


def _images_per_second(forms: Mapping[str, Forward], images: np.ndarray) -> dict[str, float]:
    """Medians of several rounds in which the forms take turns."""
    batch = jax.device_put(np.resize(images, (BATCH, *images.shape[1:])))
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for forward in forms.values():
        jax.block_until_ready(forward.batch(batch))  # compiled by the proof, if there was one
    least, most = TIMED_ROUNDS
    began = time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - began > TIMED_SECONDS:
            break
        for name, forward in forms.items():
            start = time.perf_counter()
            jax.block_until_ready(forward.batch(batch))
            seconds[name].append(time.perf_counter() - start)
    return {name: BATCH / statistics.median(taken) for name, taken in seconds.items()}


def _size(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _share(part: float, whole: float | None, form: str) -> str:
    if whole is None:
        return ""
    return format(part / whole, form) + ("x" if form == ".2f" else "")
