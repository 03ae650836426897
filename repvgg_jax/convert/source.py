"""What a conversion starts from: a run, a deploy directory, a checkpoint file or a hub name."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from repvgg_jax.convert.deployed import load_deployed
from repvgg_jax.convert.metadata import Crop, Metadata, is_deployment
from repvgg_jax.data.dataset import BUILT_IN
from repvgg_jax.data.settings import DataSettings, Size, height_width, parse_size
from repvgg_jax.export import FORMATS
from repvgg_jax.export.description import Description, read_description
from repvgg_jax.model import RepVGG, create_model
from repvgg_jax.normalize import Normalize
from repvgg_jax.proof import BATCH, BATCH_PIXELS, Proof, at_most
from repvgg_jax.quantization import Quantized
from repvgg_jax.quantization import Settings as QuantizationSettings
from repvgg_jax.quantization.network import checked
from repvgg_jax.quantization.qat import Simulation, with_ranges
from repvgg_jax.segmentation.inference import PROTOCOLS, WHOLE, Protocol
from repvgg_jax.segmentation.network import Segmenter
from repvgg_jax.segmentation.task import Segmentation
from repvgg_jax.text import first_few
from repvgg_jax.train.experiment import network_title, variant_title
from repvgg_jax.train.proof_images import (
    data_images,
    data_settings,
    photographs,
    validation_images,
)
from repvgg_jax.train.restore import RunWeights, Step, load_run
from repvgg_jax.train.step import Classification, Task
from repvgg_jax.variants import Variant
from repvgg_jax.weights import Weights, is_pretrained, load_file_or_pretrained
from repvgg_jax.weights.detect import UnknownVariantError

PROOF_IMAGES = 1000  # validation images in a proof, at most
PROOF_PIXELS = 2**25  # of images in a proof of classes of pixels, at most: 16 images of Cityscapes

IMAGENET = Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
"""What the published networks were trained with."""

IMAGE_SIZE = 224
"""Height and width of the images that most published networks were trained on."""

_HUB_SIZES = {"D2se": 320}


@dataclasses.dataclass(frozen=True)
class Trained:
    """The integers that quantization-aware training simulated.

    Attributes:
      simulation: of the deploy form.
      ranges: of activations.
    """

    simulation: Simulation
    ranges: Any

    @classmethod
    def of(cls, run: RunWeights) -> "Trained | None":
        """Those of a run; None if it was trained in float."""
        if run.ranges is None:
            return None
        settings = run.settings.quantize
        model = checked(run.model.clone(deploy=True))
        return cls(Simulation(model, settings.target, settings.float_layers), run.ranges)

    def quantized(
        self, fused: Any, images: np.ndarray, settings: QuantizationSettings
    ) -> Quantized:
        """The network in int8.

        Args:
          fused: deploy-form variables.
          images: normalized, to measure noise on.
          settings: of which the target counts.

        Raises:
          ValueError: other layers in float than those of the training.
        """
        own = self.simulation.float_layers
        if settings.float_layers and settings.float_layers != own:
            raise ValueError(
                f"--float-layers={','.join(settings.float_layers)}, but the run was trained with "
                f"{first_few(own) or 'none'} in float; leave it out, or calibrate anew with "
                "--calibrator mse"
            )
        simulation = dataclasses.replace(self.simulation, target=settings.target)
        return simulation.quantized(with_ranges(fused, self.ranges), images)


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
      notes: what was assumed, or what else there is, a line each.
      crop: how image files become its images.
      proof: that was made when it was fused, if the conversion adds formats to it.
      with_preprocessing: what graphs do that are there already, in the same case.
      reading: how data sets become its images; those of the run, if it is one.
      evaluation: the data set that `images` are from, which has labels; None for photographs.
      trained: its integers and their ranges, of a run of quantization-aware training.
      is_run: whether it is a run, whose training images are those of `reading`.
      protocol: of the evaluation of a segmenter.
    """

    title: str
    model: RepVGG | Segmenter
    variables: dict[str, Any]
    images: np.ndarray
    image_source: str
    normalize: Normalize
    labels: tuple[str, ...]
    details: dict[str, Any]
    notes: tuple[str, ...] = ()
    crop: Crop = Crop()  # noqa: RUF009 (frozen)
    proof: Proof | None = None
    with_preprocessing: bool = False
    reading: DataSettings | None = None
    evaluation: DataSettings | None = None
    is_run: bool = False
    trained: Trained | None = None
    protocol: Protocol = WHOLE

    @property
    def per_pixel(self) -> bool:
        """Whether the network gives every pixel a class."""
        return isinstance(self.model, Segmenter)

    @property
    def task(self) -> Task:
        """What the network is for, and by which metrics it is judged."""
        count = self.model.num_classes
        if self.per_pixel:
            return Segmentation(count, protocol=self.protocol)
        return Classification(count)

    @property
    def batch(self) -> int:
        """Images at once, at most: fewer if every pixel has a class."""
        if not self.per_pixel:
            return BATCH
        return at_most(BATCH, BATCH_PIXELS, self.images.shape[1:3])

    def at_most(self, count: int) -> int:
        """That many images, or as many as are affordable if every pixel has a class."""
        height, width, channels = self.images.shape[1:]
        return min(count, _proof_images(self.model, (height, width, channels)))


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
        run, _proof_images(run.model, run.eval_shape), data=data
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
    fraction = settings.eval_crop if settings.eval_size else 1.0
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
    images, image_source = _images(shape, data, _proof_images(deployed.model, shape))
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


def _proof_images(model: RepVGG | Segmenter, shape: tuple[int, int, int]) -> int:
    """The number of images in a proof, at most."""
    if not isinstance(model, Segmenter):
        return PROOF_IMAGES
    return max(4, at_most(PROOF_IMAGES, PROOF_PIXELS, shape[:2]))


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
