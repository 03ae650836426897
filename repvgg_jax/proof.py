"""The proof that two networks are the same function: their logits on the same images."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np
from flax import linen as nn

from repvgg_jax.fuse_module import fuse_model
from repvgg_jax.model import RepVGG
from repvgg_jax.typed import typed

PIXEL_LOGIT = "logit of a pixel"
"""What is compared of networks that give a class per pixel."""

TOLERANCE = 1e-5
"""Largest |Δlogit| allowed, relative to the largest |logit|, in float32."""

BATCH, BATCH_PIXELS = 32, 2**21
"""Images at once, at most, and pixels: one image of Cityscapes."""


def at_most(count: int, pixels: int, size: Sequence[int]) -> int:
    """As many images of a height and width as have that many pixels: 1 to `count`."""
    return max(1, min(count, pixels // math.prod(size)))


@dataclasses.dataclass(frozen=True)
class Proof:
    """How far two networks' logits are apart.

    Attributes:
      images: how many images were compared.
      max_abs_delta: largest |Δlogit|.
      max_abs_logit: largest |logit| of the reference.
      argmax_agreement: fraction of images, or of their pixels, on which both give the same class.
      tolerance: what `relative` may be at most.
      numbers: what was compared, if not logits.
    """

    images: int
    max_abs_delta: float
    max_abs_logit: float
    argmax_agreement: float
    tolerance: float = TOLERANCE
    numbers: str = "logit"

    @property
    def relative(self) -> float:
        """Largest |Δlogit| relative to the largest |logit|."""
        return self.max_abs_delta / self.max_abs_logit if self.max_abs_logit else self.max_abs_delta

    @property
    def holds(self) -> bool:
        """Whether the two are the same function up to the tolerance; never for NaN."""
        return self.relative <= self.tolerance

    def __str__(self) -> str:
        sign = "<=" if self.holds else ">"
        pixels = self.numbers == PIXEL_LOGIT
        number = "logit" if pixels else self.numbers
        same = "class" if number == "logit" else "largest number"
        places = "of the pixels of" if pixels else "of"
        return (
            f"max |Δ{number}| {self.max_abs_delta:.2e}, {self.relative:.2e} of the largest "
            f"{number} ({sign} {self.tolerance:g}), same {same} on "
            f"{self.argmax_agreement:.2%} {places} {self.images} images"
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**dataclasses.asdict(self), "relative": self.relative, "holds": self.holds}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """The inverse of `as_dict`.

        Raises:
          ValueError: a field is missing, or its type is not allowed.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        known = {key: value for key, value in content.items() if key in fields}
        return typed(cls, known, "proof")


def compare(reference: np.ndarray, other: np.ndarray, *, tolerance: float = TOLERANCE) -> Proof:
    """Compares two networks' logits on the same images.

    Args:
      reference: (images, classes), or (images, height, width, classes) of every pixel.
      other: the same of the other network.
      tolerance: of `Proof.holds`.

    Raises:
      ValueError: different shapes, or no images.
    """
    reference, other = np.asarray(reference, np.float64), np.asarray(other, np.float64)
    if reference.shape != other.shape or reference.ndim not in (2, 4) or not len(reference):
        raise ValueError(
            f"logits of shapes {reference.shape} and {other.shape}; expected (images, classes), or "
            "(images, height, width, classes), twice, and at least one image"
        )
    return Proof(
        images=len(reference),
        max_abs_delta=float(np.abs(reference - other).max()),
        max_abs_logit=float(np.abs(reference).max()),
        argmax_agreement=float((reference.argmax(-1) == other.argmax(-1)).mean()),
        tolerance=tolerance,
        numbers="logit" if reference.ndim == 2 else PIXEL_LOGIT,
    )


def compare_forwards(
    reference: "Forward", other: "Forward", images: np.ndarray, *, tolerance: float = TOLERANCE
) -> Proof:
    """Compares two networks on images, in batches: only one batch of logits is held at a time.

    Args:
      reference: the one network.
      other: the other one.
      images: normalized, (images, height, width, channels).
      tolerance: of `Proof.holds`.
    """
    size = reference.batch_size
    parts = [images[start : start + size] for start in range(0, len(images), size)]
    proofs = [compare(reference(part), other(part), tolerance=tolerance) for part in parts]
    agreed = sum(proof.argmax_agreement * proof.images for proof in proofs)
    return dataclasses.replace(
        proofs[0],
        images=len(images),
        # As of all at once: NaN stays NaN.
        max_abs_delta=float(np.max([proof.max_abs_delta for proof in proofs])),
        max_abs_logit=float(np.max([proof.max_abs_logit for proof in proofs])),
        argmax_agreement=agreed / len(images),
    )


def prove(
    model: nn.Module,
    variables: Any,
    images: np.ndarray,
    *,
    deployed: Any = None,
    tolerance: float = TOLERANCE,
    batch_size: int = 64,
) -> Proof:
    """Compares a training-form network with its fused form, in evaluation.

    Args:
      model: the network in training form: a RepVGG, or any Linen module that has a field `deploy`,
        which it passes to its blocks, and maps images and variables to logits.
      variables: its variables.
      images: normalized, (images, height, width, channels).
      deployed: the fused variables; None fuses `variables` here.
      tolerance: of `Proof.holds`.
      batch_size: images per batch.

    Raises:
      ValueError: the model has no field `deploy`, or as `fuse_model`.
    """
    if not hasattr(model, "deploy"):
        raise ValueError(
            f"{type(model).__name__} has no field `deploy`; give it one and pass it to its blocks: "
            "ReparamBlock(…, deploy=self.deploy)"
        )
    if deployed is None and isinstance(model, RepVGG):
        deployed = model.fuse(variables)
    elif deployed is None:
        deployed = fuse_model(model, variables, images[:1])
    fused = model.clone(deploy=True)
    return compare(
        logits(model.apply, variables, images, batch_size=batch_size),
        logits(fused.apply, deployed, images, batch_size=batch_size),
        tolerance=tolerance,
    )


def logits(
    apply: Callable[..., Any], variables: Any, images: np.ndarray, *, batch_size: int = 64
) -> np.ndarray:
    """A network's logits of any number of images, in batches; see `Forward`."""
    return Forward(apply, variables, batch_size=min(batch_size, len(images)))(images)


class Forward:
    """A network's forward pass, compiled once for one batch size.

    It computes in full float32 precision: accelerators multiply float32 numbers in lower
    precision by default, and a proof must not depend on that.

    Attributes:
      variables: on the device.
      batch_size: images per batch.
    """

    def __init__(self, apply: Callable[..., Any], variables: Any, *, batch_size: int):
        """Compiles nothing yet.

        Args:
          apply: maps variables and normalized images to logits.
          variables: of the network.
          batch_size: images per batch.
        """
        self._apply = jax.jit(apply)
        self.variables = jax.device_put(variables)
        self.batch_size = batch_size

    def batch(self, images: Any) -> jax.Array:
        """Logits of one batch, (batch_size, classes)."""
        with jax.default_matmul_precision("highest"):
            return self._apply(self.variables, images)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Logits (images, classes) of any number of images; the last batch is zero-padded."""
        parts = []
        for start in range(0, len(images), self.batch_size):
            part = images[start : start + self.batch_size]
            padding = [(0, self.batch_size - len(part))] + [(0, 0)] * (part.ndim - 1)
            parts.append(np.asarray(self.batch(np.pad(part, padding)))[: len(part)])
        return np.concatenate(parts)
