"""What a conversion starts from: a training run, or a checkpoint file."""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from repvgg_jax.data.sources import photo_crops
from repvgg_jax.model import RepVGG, create_model
from repvgg_jax.normalize import Normalize
from repvgg_jax.text import plural
from repvgg_jax.train.restore import load_run, validation_images
from repvgg_jax.weights import load_file_or_pretrained

PROOF_IMAGES = 1000  # validation images in a proof, at most

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


def from_weights(name: str, *, image_size: int = 224) -> Source:
    """A checkpoint file, or a pretrained model of timm by its hub name.

    Args:
      name: e.g. `RepVGG-B1g4-train.pth` or `repvgg_b1g4.rvgg_in1k`.
      image_size: height and width of the images it will be used on, in pixels.

    Raises:
      ValueError: not readable, not a RepVGG, or not for images of three channels.
    """
    if image_size < 1:
        raise ValueError(f"--image-size={image_size} must be positive")
    loaded = load_file_or_pretrained(name)
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
