"""What a conversion starts from: a training run, or somebody's checkpoint."""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from repvgg_jax.data import photos
from repvgg_jax.export import Metadata
from repvgg_jax.model import RepVGG, create_model
from repvgg_jax.train.restore import load_run, validation_images
from repvgg_jax.weights import load_file_or_pretrained

PROOF_IMAGES = 1000  # held-out images that a proof looks at, at most

# What the published networks were trained on: ImageNet's channels, on the scale 0 … 1.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Origin:
    """A network to convert, and real images to prove the result on.

    Attributes:
      title: what it is, in a line.
      model: in training form, whatever the form of the variables; computes in float32.
      variables: NumPy arrays.
      deploy: whether the variables are in deploy form already.
      images: real ones, uint8 (images, height, width, channels).
      metadata: normalisation and class names.
      details: where it comes from, for `metadata.json`.
    """

    title: str
    model: RepVGG
    variables: dict[str, Any]
    deploy: bool
    images: np.ndarray
    metadata: Metadata
    details: dict[str, Any]


def from_run(path: pathlib.Path) -> Origin:
    """The newest valid checkpoint of a training run, and images to prove it on.

    Raises:
      ValueError: no run or no valid checkpoint there.
    """
    run = load_run(path)
    images, source = validation_images(run, PROOF_IMAGES)
    return Origin(
        title=f"RepVGG {run.model.variant.name}, step {run.step} of {path}",
        # The proof is about the function, not about the rounding of a half-precision run.
        model=run.model.clone(dtype=np.float32, remat=False),
        variables=run.variables,
        deploy=False,
        images=images,
        metadata=Metadata(run.normalize.mean, run.normalize.std, run.classes),
        details={"workdir": str(path), "step": run.step, "images": source},
    )


def from_weights(name: str, *, image_size: int = 224) -> Origin:
    """A checkpoint file, or one of timm's pretrained models by its hub name.

    Args:
      name: `RepVGG-B1g4-train.pth`, say, or `repvgg_b1g4.rvgg_in1k`.
      image_size: height and width of the images that it will see, in pixels.

    Raises:
      ValueError: not readable, no RepVGG, or not for images of three channels.
    """
    if image_size < 1:
        raise ValueError(f"image size {image_size} must be positive")
    loaded = load_file_or_pretrained(name)
    stem = loaded.variables["params"]["stem"]
    channels = stem["reparam" if loaded.deploy else "conv3x3"]["kernel"].shape[-2]
    if channels != 3:
        raise ValueError(
            f"{name} takes images of {channels} channels, and the images at hand to prove a "
            "conversion have 3; convert the training run that it came from"
        )
    return Origin(
        title=f"RepVGG {loaded} of {name}",
        model=create_model(loaded.variant, num_classes=loaded.num_classes),
        variables=loaded.variables,
        deploy=loaded.deploy,
        images=photos.crops(image_size),
        metadata=Metadata(IMAGENET_MEAN, IMAGENET_STD),
        details={"weights": name, "family": loaded.family},
    )
