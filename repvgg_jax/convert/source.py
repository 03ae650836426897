"""What a conversion starts from: a run, a deploy directory, a checkpoint file or a hub name."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from repvgg_jax.activations import ACTIVATIONS
from repvgg_jax.convert.deployed import load_deployed
from repvgg_jax.convert.metadata import Crop, Metadata, is_deployment
from repvgg_jax.convert.subject import PROOF_IMAGES, Source, Trained, proof_images
from repvgg_jax.data.dataset import BUILT_IN
from repvgg_jax.data.settings import DataSettings, Size, height_width, parse_size
from repvgg_jax.export import FORMATS
from repvgg_jax.export.description import Description, read_description
from repvgg_jax.model import RepVGG, create_model
from repvgg_jax.normalize import Normalize
from repvgg_jax.proof import Proof
from repvgg_jax.segmentation.inference import PROTOCOLS
from repvgg_jax.segmentation.network import Segmenter
from repvgg_jax.text import first_few
from repvgg_jax.train.experiment import network_title, variant_title
from repvgg_jax.train.proof_images import (
    data_images,
    data_settings,
    photographs,
    validation_images,
)
from repvgg_jax.train.restore import Step, load_run
from repvgg_jax.typed import typed
from repvgg_jax.variants import Variant
from repvgg_jax.weights import Weights, is_pretrained, load_file_or_pretrained
from repvgg_jax.weights.detect import UnknownVariantError

IMAGENET = Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
"""What the published networks were trained with."""

IMAGE_SIZE = 224
"""Height and width of the images that most published networks were trained on."""

_HUB_SIZES = {"D2se": 320}


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a user says of a checkpoint file that does not say it itself.

    Attributes:
      image_size: in pixels, one number or (height, width); None for what is usual.
      classes: names by label; None if unknown.
      mean: per channel, of pixels on the scale 0 … 1; None for ImageNet's.
      std: the same.
      entry: key of the state dict in a file that holds several.
    """

    image_size: Size | None = None
    classes: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    entry: str | None = None

    def refuse(self, owner: str, *, allowed: tuple[str, ...] = ()) -> None:
        """Raises ValueError for a fact that is given but does not apply; `owner` says why."""
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None and field.name not in allowed:
                raise ValueError(
                    f"--{field.name.replace('_', '-')} is for checkpoint files of other projects; "
                    f"{owner}"
                )


def from_run(path: pathlib.Path, *, step: Step = "newest", data: str | None = None) -> Source:
    """A checkpoint of a training run, and real images.

    Neither the run's data nor its optimizer is needed. Without its data, the images are the
    built-in photographs.

    Args:
      path: the run directory.
      step: of the checkpoint.
      data: where the images are instead, as for `data_images`.

    Raises:
      ValueError: no run or no such valid checkpoint there, or no such data.
    """
    run = load_run(path, step=step)
    images, image_source = validation_images(
        run, proof_images(run.model, run.eval_shape), data=data
    )
    word = "mIoU" if isinstance(run.model, Segmenter) else "accuracy"
    accuracy = "" if run.accuracy is None else f", validation {word} {run.accuracy:.2%}"
    notes = []
    if run.best is not None:
        best, of_best = run.best
        notes.append(
            f"checkpoint: step {run.step}{accuracy}, the best evaluated one"
            if best == run.step
            else f"checkpoint: step {run.step}{accuracy}; the best evaluated one is that of step "
            f"{best} with {of_best:.2%}: --step best"
        )
    return Source(
        title=f"{network_title(run.model)}, step {run.step} of {path}",
        # The proof is about the function, not about the rounding of a half-precision run.
        model=run.model.clone(dtype=np.float32, remat=False),
        variables=run.variables,
        images=images,
        image_source=image_source,
        normalize=run.normalize,
        labels=run.classes,
        details={
            "workdir": str(path),
            "step": run.step,
            "accuracy": run.accuracy,
            "images": image_source,
        },
        notes=tuple(notes),
        crop=crop_of(run.settings.data),
        reading=run.settings.data,
        evaluation=run.settings.data if data is None else data_settings(data, run.settings.data),
        is_run=True,
        trained=Trained.of(run),
        protocol=PROTOCOLS[run.settings.protocol],
    )


def crop_of(settings: DataSettings) -> Crop:
    """How a run's evaluation reads image files."""
    # Without a size, images are taken as they are.
    fraction = settings.eval_crop if settings.size_of_evaluation else 1.0
    return Crop(fraction, settings.background, settings.white)


def from_weights(
    name: str,
    facts: Facts | None = None,
    *,
    data: str | None = None,
    output: pathlib.Path | None = None,
) -> Source:
    """A directory of `convert.py`, a checkpoint file, or a model of timm by its hub name.

    A directory, and a `model.safetensors` of ours, say themselves what their images and classes
    are. What `facts` leaves open of another file is assumed to be ImageNet's, and noted.

    Args:
      name: e.g. `deploy`, `RepVGG-B1g4-train.pth` or `repvgg_b1g4.rvgg_in1k`.
      facts: what the file does not say.
      data: where images for the proof are, as for `data_images`; default: photographs.
      output: where the conversion is written. If it is the directory that is read, or that of the
        `model.safetensors` that is read, formats are added to it, and it goes on saying where its
        network comes from and how it was proven.

    Raises:
      ValueError: not readable, not a RepVGG, or facts that do not fit it.
    """
    facts, path = facts or Facts(), pathlib.Path(name)
    if facts.image_size is not None:
        parse_size("--image-size", facts.image_size, least=1)
    own = path.parent if path.name == FORMATS["safetensors"].filename else path
    adding = output is not None and own.resolve() == output.resolve() and is_deployment(own)
    if adding:
        path = own
    if path.is_dir():
        if not is_deployment(path):
            raise ValueError(
                f"{name} is a directory that convert.py did not write; if it is a training run, "
                f"give --workdir {name}"
            )
        facts.refuse(f"{name} says itself what it takes")
        return _from_deployed(path, data, adding=adding)
    description = read_description(path)
    if description is not None:
        facts.refuse(f"the header of {name} says what it takes")
        return _from_own_file(path, description, data)
    return _from_foreign(name, facts, data)


def _from_deployed(path: pathlib.Path, data: str | None, *, adding: bool) -> Source:
    deployed = load_deployed(path)
    metadata = Metadata.from_json(deployed.metadata)
    shape = metadata.image_shape
    images, image_source = _images(shape, data, proof_images(deployed.model, shape))
    fused, origin = deployed.proof.get("fused"), deployed.metadata.get("source")
    details = {
        "deployment": str(path),
        "fused": fused,
        "source": origin,
        "images": image_source,
    }
    return Source(
        title=f"{network_title(deployed.model)} of {path}",
        model=deployed.model,
        variables=deployed.variables,
        images=images,
        image_source=image_source,
        normalize=Normalize(metadata.mean, metadata.std),
        labels=metadata.classes,
        details=origin if adding and isinstance(origin, dict) else details,
        crop=metadata.crop,
        proof=Proof.from_json(fused) if adding and fused else None,
        with_preprocessing=adding and metadata.with_preprocessing,
        **_data_of(shape, data, metadata.crop),
    )


def _from_own_file(path: pathlib.Path, description: Description, data: str | None) -> Source:
    if description.has_other_activation:
        raise ValueError(
            f"{path} does not say which activation its network has, since it is none of "
            f"{', '.join(ACTIVATIONS)}; build the network with create_model(activation=…) and give "
            "it to repvgg_jax.export.export"
        )
    crop = Crop() if description.crop is None else typed(Crop, description.crop, f"{path}: crop")
    loaded = _load(str(path), {"variant": description.variant})
    images, image_source = _images(description.image_shape, data)
    return Source(
        title=_title(loaded, str(path)),
        model=_model(loaded, description),
        variables=loaded.variables,
        images=images,
        image_source=image_source,
        normalize=description.normalize,
        labels=description.labels,
        details={"weights": str(path), "family": loaded.family, "images": image_source},
        crop=crop,
        **_data_of(description.image_shape, data),
    )


def _from_foreign(name: str, facts: Facts, data: str | None) -> Source:
    if is_pretrained(name):
        facts.refuse(
            f"{name} is a single state dict", allowed=("image_size", "classes", "mean", "std")
        )
    loaded = _load(name, {"entry": facts.entry})
    usual = _HUB_SIZES.get(loaded.variant, IMAGE_SIZE) if is_pretrained(name) else IMAGE_SIZE
    size, labels = height_width(facts.image_size or usual), facts.classes or ()
    normalize, channels = IMAGENET, loaded.in_channels
    if facts.mean is not None or facts.std is not None:
        if facts.mean is None or facts.std is None:
            raise ValueError("give both --mean and --std, or neither")
        normalize = Normalize(facts.mean, facts.std)
    if len(normalize.mean) != channels:
        raise ValueError(
            f"{name} takes images of {channels} channels; give --mean and --std with {channels} "
            f"values each, not {len(normalize.mean)}"
        )
    if labels and len(labels) != loaded.num_classes:
        raise ValueError(
            f"--classes gives {len(labels)} names, but {name} has {loaded.num_classes} classes"
        )
    assumed = [
        text
        for given, text in (
            (facts.image_size, f"images of {size[0]}x{size[1]} pixels (--image-size)"),
            (facts.mean, "ImageNet's mean and std (--mean, --std)"),
            (facts.classes or not loaded.num_classes, "no class names (--classes)"),
        )
        if not given
    ]
    notes = [f"assumed: {', '.join(assumed)}"] if assumed else []
    if loaded.unused:
        notes.append(f"left out of {name}: {first_few(loaded.unused)}")
    images, image_source = _images((*size, channels), data)
    return Source(
        title=_title(loaded, name),
        model=_model(loaded),
        variables=loaded.variables,
        images=images,
        image_source=image_source,
        normalize=normalize,
        labels=labels,
        details={"weights": name, "family": loaded.family, "images": image_source},
        notes=tuple(notes),
        **_data_of((*size, channels), data),
    )


def _load(name: str, options: Mapping[str, Any]) -> Weights:
    path = pathlib.Path(name)
    try:
        return load_file_or_pretrained(name, **options)
    except UnknownVariantError as error:
        directory = path.parent if is_deployment(path.parent) else "DEPLOY"
        raise ValueError(
            f"{name} is none of the official architectures ({error.architecture}): give the "
            f"directory that convert.py wrote, --from {directory}, or the run, --workdir RUN"
        ) from error


def _title(loaded: Weights, file: str) -> str:
    return f"{variant_title(loaded.variant)}{str(loaded).removeprefix(loaded.variant)} of {file}"


def _model(loaded: Weights, description: Description | None = None) -> RepVGG:
    variant: Variant | str = loaded.variant
    options: dict[str, Any] = {}
    if description is not None:
        variant = description.variant or variant
        options = {"activation": description.activation}
    return create_model(
        variant,
        num_classes=loaded.num_classes,
        deploy=loaded.deploy,
        epsilon=loaded.epsilon,
        **options,
    )


def _images(
    shape: tuple[int, int, int], data: str | None, count: int = PROOF_IMAGES
) -> tuple[np.ndarray, str]:
    """Proof images of that shape, and what they are."""
    if data is None:
        return photographs(shape)
    return data_images(data, reading_of(shape, data), shape, count)


def reading_of(
    shape: tuple[int, int, int], data: str | None, crop: Crop | None = None
) -> DataSettings:
    """How a data set becomes images of that shape, without a run that says it."""
    crop = crop or Crop()
    size = 0 if data in BUILT_IN else shape[:2]
    return DataSettings(
        train_size=size,
        eval_size=size,
        eval_crop=crop.fraction,
        background=crop.background,
        white=crop.white,
    )


def _data_of(
    shape: tuple[int, int, int], data: str | None, crop: Crop | None = None
) -> dict[str, Any]:
    """The fields `reading` and `evaluation` of a source that is not a run."""
    reading = reading_of(shape, data, crop)
    return {
        "reading": reading,
        "evaluation": None if data is None else data_settings(data, reading),
    }
