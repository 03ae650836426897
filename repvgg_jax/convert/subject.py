"""A network to convert, and the images that prove the result."""

import dataclasses
from typing import Any

import numpy as np

from repvgg_jax.convert.metadata import Crop
from repvgg_jax.data.settings import DataSettings
from repvgg_jax.model import RepVGG
from repvgg_jax.normalize import Normalize
from repvgg_jax.proof import BATCH, BATCH_PIXELS, Proof, at_most
from repvgg_jax.quantization import Quantized
from repvgg_jax.quantization import Settings as QuantizationSettings
from repvgg_jax.quantization.network import checked
from repvgg_jax.quantization.qat import Simulation, with_ranges
from repvgg_jax.segmentation.inference import WHOLE, Protocol
from repvgg_jax.segmentation.network import Segmenter
from repvgg_jax.segmentation.task import Segmentation
from repvgg_jax.text import first_few
from repvgg_jax.train.restore import RunWeights
from repvgg_jax.train.step import Classification, Task

PROOF_IMAGES = 1000  # validation images in a proof, at most
PROOF_PIXELS = 2**25  # of images in a proof of classes of pixels, at most: 16 images of Cityscapes


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
        """The integers of a run; None if it was trained in float."""
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
          settings: only `target` is used; `float_layers` must be empty or those of the training.

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
        """`count`, reduced to the number of images in a proof: segmenters get fewer."""
        height, width, channels = self.images.shape[1:]
        return min(count, proof_images(self.model, (height, width, channels)))


def proof_images(model: RepVGG | Segmenter, shape: tuple[int, int, int]) -> int:
    """The number of images in a proof, at most."""
    if not isinstance(model, Segmenter):
        return PROOF_IMAGES
    return max(4, at_most(PROOF_IMAGES, PROOF_PIXELS, shape[:2]))
