"""The thing that is exported: a deploy-form network, checked, with images to prove it on."""

import functools
import itertools
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repvgg_jax import proof
from repvgg_jax.export.metadata import Metadata
from repvgg_jax.model import RepVGG
from repvgg_jax.reparam import BUILT_IN
from repvgg_jax.reparam.tree import matching_block, summary

BATCH = 16
"""Images at a time in a proof: enough to keep two cores busy, little memory at 224 pixels."""


class Network:
    """A fused network as every format sees it, and what it answers to some real images.

    Attributes:
      model: the network in deploy form, computing in float32.
      params: its parameters, nested mappings of float32 NumPy arrays.
      metadata: how its images are normalised, and its labels.
      with_preprocessing: artefacts take uint8 images and give probabilities, instead of
        normalised images and logits.
      images: what proofs run on, as artefacts take them but always
        (images, height, width, channels).
    """

    def __init__(
        self,
        model: RepVGG,
        variables: Mapping[str, Any],
        *,
        images: np.ndarray,
        metadata: Metadata,
        with_preprocessing: bool = False,
    ):
        """Checks everything before anything is written.

        Args:
          model: the network; its form and its `dtype` do not matter.
          variables: its deploy-form variables, `{"params": …}`, NumPy or JAX.
          images: real images (images, height, width, channels), of the size that artefacts
            will take. uint8 as decoded; or normalised floats, unless `with_preprocessing`.
          metadata: of the network.
          with_preprocessing: see the class.

        Raises:
          ValueError: variables of the training form or of another network, weights that are
            not finite, images or metadata that do not fit.
        """
        self.model = model.clone(
            deploy=True,
            lowering="plain",  # an artefact runs where this machine does not decide
            remat=False,
            dtype=jnp.float32,
            param_dtype=jnp.float32,
        )
        self.metadata = metadata
        self.with_preprocessing = with_preprocessing
        self.images = self._checked_images(np.asarray(images))
        self.params = self._checked_params(variables)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of one image."""
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    @property
    def input_name(self) -> str:
        """What artefacts call their input."""
        return "images"

    @property
    def output_name(self) -> str:
        """What artefacts call their output."""
        if not self.model.num_classes:
            return "features"
        return "probabilities" if self.with_preprocessing else "logits"

    @property
    def outputs(self) -> int:
        """Numbers that an artefact gives for one image."""
        return self.model.num_classes or self.model.variant.features

    def apply(self, params: Any, images: jax.Array, dtype: str = "float32") -> jax.Array:
        """What an artefact computes, in JAX.

        Args:
          params: as `self.params`, traced or not.
          images: what an artefact takes, (images, height, width, channels).
          dtype: of the convolutions.

        Returns:
          float32 (images, outputs).
        """
        if self.with_preprocessing:
            images = self.metadata.normalise(images)
        model = self.model.clone(dtype=jnp.dtype(dtype))
        outputs: Any = model.apply({"params": params}, images)
        return jax.nn.softmax(outputs) if self.output_name == "probabilities" else outputs

    @functools.cached_property
    def reference(self) -> np.ndarray:
        """The JAX model's answer to `images`, (images, outputs), at full float32 precision."""
        return proof.logits(self.apply, self.params, self.images, batch_size=BATCH)

    def without_preprocessing(self) -> "Network":
        """The same network for formats that hold weights alone: normalised images, logits."""
        if not self.with_preprocessing:
            return self
        return Network(
            self.model, {"params": self.params}, images=self.images, metadata=self.metadata
        )

    def answers(self, run: Any) -> np.ndarray:
        """Another runtime's answer to `images`.

        The first image goes alone, the others in batches: an artefact that only takes the
        batch size it was made with does not pass.
        """
        ends = [0, 1, *range(1 + BATCH, len(self.images), BATCH), len(self.images)]
        parts = [self.images[start:end] for start, end in itertools.pairwise(ends)]
        return np.concatenate([np.asarray(run(part)) for part in parts if len(part)])

    def comparable(self, outputs: np.ndarray) -> np.ndarray:
        """Outputs on the scale of logits, on which two runtimes are compared.

        Probabilities saturate: where one class has them all, any network agrees with any other.
        Their logarithms are the logits up to a constant for every image.
        """
        if self.output_name != "probabilities":
            return outputs
        return np.log(np.maximum(outputs, 1e-30, dtype=np.float64))

    def description(self, layout: str) -> dict[str, Any]:
        """What a user of the artefact needs to know, for JSON; the input's axes by `layout`."""
        height, width, channels = self.image_shape
        return {
            "variant": self.model.variant.name,
            "input": self.input_name,
            "input_dtype": str(self.images.dtype),
            "input_layout": layout,
            "image_size": [height, width],
            "channels": channels,
            "mean": list(self.metadata.mean),
            "std": list(self.metadata.std),
            "normalisation": "inside" if self.with_preprocessing else "(pixels / 255 - mean) / std",
            "output": self.output_name,
            "labels": list(self.metadata.labels),
        }

    def header(self, layout: str) -> dict[str, str]:
        """The description for formats that store text by key; what is no text becomes JSON."""
        return {
            key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for key, value in self.description(layout).items()
        }

    def _checked_images(self, images: np.ndarray) -> np.ndarray:
        if images.ndim != 4 or not images.size:
            raise ValueError(
                f"images have shape {images.shape}; a proof needs at least one real image, "
                "(images, height, width, channels)"
            )
        if len(self.metadata.mean) not in (1, images.shape[-1]):
            raise ValueError(
                f"metadata has means of {len(self.metadata.mean)} channels, but images of shape "
                f"{images.shape} have {images.shape[-1]}"
            )
        classes, labels = self.model.num_classes, self.metadata.labels
        if labels and len(labels) != classes:
            raise ValueError(
                f"metadata has {len(labels)} labels for a classifier of {classes} classes; "
                "give one label a class, or none"
            )
        if images.dtype == np.uint8:
            return images if self.with_preprocessing else self.metadata.normalise(images)
        if self.with_preprocessing or not jnp.issubdtype(images.dtype, jnp.floating):
            wanted = "uint8" if self.with_preprocessing else "uint8 or normalised floating point"
            raise ValueError(f"images are {images.dtype}; expected {wanted} numbers")
        return images.astype(np.float32)

    def _checked_params(self, variables: Any) -> Any:
        if not isinstance(variables, Mapping) or not isinstance(variables.get("params"), Mapping):
            raise ValueError(
                f"export takes deploy-form variables, {{'params': …}}, not {summary(variables)}"
            )
        blocks = [
            child for child in variables["params"].values() if matching_block(child, BUILT_IN)
        ]
        if blocks:
            raise ValueError(
                f"export takes the deploy form only, but {len(blocks)} blocks of these variables "
                "are in training form; pass them through fuse_params first"
            )
        image = jax.ShapeDtypeStruct((1, *self.image_shape), jnp.float32)
        expected = jax.eval_shape(self.model.init, jax.random.key(0), image)["params"]
        wanted, given = leaves(expected), leaves(variables["params"])
        missing, extra = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
        if missing or extra:
            raise ValueError(
                f"these are not the variables of {self.model.variant.name} in deploy form: "
                f"missing [{_few(missing)}], unexpected [{_few(extra)}]"
            )
        for name, leaf in given.items():
            if leaf.shape != wanted[name].shape:
                raise ValueError(f"{name}: shape {leaf.shape}, expected {wanted[name].shape}")
        params = jax.tree.map(_as_float32, jax.device_get(dict(variables["params"])))
        for name, leaf in leaves(params).items():
            if not np.isfinite(leaf).all():
                raise ValueError(f"{name} holds NaN or infinite weights; nothing can be exported")
        return params


def leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by name, as people write paths: `stage1_block0/reparam/kernel`."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def _as_float32(leaf: Any) -> np.ndarray:
    return np.asarray(leaf, np.float32)  # no copy where it is float32 already


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
