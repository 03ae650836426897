"""What is exported: a network in deploy form, checked, with images to prove artifacts on."""

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repvgg_jax import proof
from repvgg_jax.model import RepVGG
from repvgg_jax.normalize import Normalize
from repvgg_jax.text import first_few, named_leaves

BATCH = 16
"""Images per batch in a proof: enough to keep two cores busy, little memory at 224 pixels."""


class Network:
    """A fused network as every format sees it, and its outputs for some real images.

    Decoding and resizing are not part of it: libraries differ in both, so images arrive at the
    size that the network was trained on.

    Attributes:
      model: the network in deploy form, computing in float32.
      params: its parameters, nested mappings of float32 NumPy arrays.
      normalize: pixels to what the model takes.
      labels: name of every class in the order of the logits; empty if unknown.
      with_preprocessing: artifacts take uint8 images and return probabilities, instead of
        normalized images and logits.
      images: what proofs run on, as artifacts take them but always
        (images, height, width, channels).
    """

    def __init__(
        self,
        model: RepVGG,
        variables: Mapping[str, Any],
        *,
        images: np.ndarray,
        normalize: Normalize,
        labels: Sequence[str] = (),
        with_preprocessing: bool = False,
    ):
        """Checks everything before anything is written.

        Args:
          model: the network, in either form and any `dtype`.
          variables: its deploy-form variables, `{"params": …}`, NumPy or JAX.
          images: real images (images, height, width, channels), of the size that artifacts
            will take. uint8 as decoded; or normalized floats, unless `with_preprocessing`.
          normalize: pixels to what the model takes.
          labels: name of every class, or none at all.
          with_preprocessing: see the class.

        Raises:
          ValueError: variables in training form or of another network, weights that are not
            finite, images, normalization or labels that do not fit.
        """
        self.model = model.clone(
            deploy=True,
            lowering="plain",  # artifacts run on other machines than this one
            remat=False,
            dtype=jnp.float32,
            param_dtype=jnp.float32,
        )
        self.normalize = normalize
        self.labels = tuple(map(str, labels))
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
        """What artifacts call their input."""
        return "images"

    @property
    def output_name(self) -> str:
        """What artifacts call their output."""
        if not self.model.num_classes:
            return "features"
        return "probabilities" if self.with_preprocessing else "logits"

    @property
    def outputs(self) -> int:
        """Numbers that an artifact returns per image."""
        return self.model.num_classes or self.model.variant.features

    def apply(self, params: Any, images: jax.Array, dtype: str = "float32") -> jax.Array:
        """What an artifact computes, in JAX.

        Args:
          params: as `self.params`, traced or not.
          images: what an artifact takes, (images, height, width, channels).
          dtype: of the convolutions.

        Returns:
          float32 (images, outputs).
        """
        if self.with_preprocessing:
            images = self.normalize(images)
        model = self.model.clone(dtype=jnp.dtype(dtype))
        outputs: Any = model.apply({"params": params}, images)
        return jax.nn.softmax(outputs) if self.output_name == "probabilities" else outputs

    @functools.cached_property
    def reference(self) -> np.ndarray:
        """The JAX model's outputs for `images`, (images, outputs), in full float32 precision."""
        return proof.logits(self.apply, self.params, self.images, batch_size=BATCH)

    def without_preprocessing(self) -> "Network":
        """The same network for formats that hold weights alone: normalized images, logits."""
        if not self.with_preprocessing:
            return self
        return Network(
            self.model,
            {"params": self.params},
            images=self.images,
            normalize=self.normalize,
            labels=self.labels,
        )

    def answers(self, run: Any) -> np.ndarray:
        """A runtime's outputs for `images`.

        The first image goes alone, the others in batches: an artifact that only takes the
        batch size it was made with does not pass.
        """
        ends = [0, 1, *range(1 + BATCH, len(self.images), BATCH), len(self.images)]
        parts = [self.images[start:end] for start, end in itertools.pairwise(ends)]
        return np.concatenate([np.asarray(run(part)) for part in parts if len(part)])

    def comparable(self, outputs: np.ndarray) -> np.ndarray:
        """Outputs on the scale of logits, on which two runtimes are compared.

        Probabilities saturate: if one class has probability 1, any two networks agree. Their
        logarithms are the logits up to a constant per image.
        """
        if self.output_name != "probabilities":
            return outputs
        return np.log(np.maximum(outputs, 1e-30, dtype=np.float64))

    def description(self, layout: str) -> dict[str, Any]:
        """What users of the artifact need to know, for JSON; `layout` is that of its input."""
        height, width, channels = self.image_shape
        return {
            "variant": self.model.variant.name,
            "input": self.input_name,
            "input_dtype": str(self.images.dtype),
            "input_layout": layout,
            "image_size": [height, width],
            "channels": channels,
            "mean": list(self.normalize.mean),
            "std": list(self.normalize.std),
            # The spelling of this key is part of the formats on disk.
            "normalisation": "inside" if self.with_preprocessing else "(pixels / 255 - mean) / std",
            "output": self.output_name,
            "labels": list(self.labels),
        }

    def header(self, layout: str) -> dict[str, str]:
        """The description for formats that store text by key; other values become JSON."""
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
        if len(self.normalize.mean) not in (1, images.shape[-1]):
            raise ValueError(
                f"normalization has means of {len(self.normalize.mean)} channels, but images of "
                f"shape {images.shape} have {images.shape[-1]}"
            )
        classes = self.model.num_classes
        if self.labels and len(self.labels) != classes:
            raise ValueError(
                f"{len(self.labels)} labels for a classifier of {classes} classes; "
                "give one label per class, or none"
            )
        if images.dtype == np.uint8:
            return images if self.with_preprocessing else self.normalize(images)
        if self.with_preprocessing or not jnp.issubdtype(images.dtype, jnp.floating):
            wanted = "uint8" if self.with_preprocessing else "uint8 or normalized floating point"
            raise ValueError(f"images are {images.dtype}; expected {wanted} numbers")
        return images.astype(np.float32)

    def _checked_params(self, variables: Any) -> Any:
        if not isinstance(variables, Mapping) or not isinstance(variables.get("params"), Mapping):
            summary = (
                f"a mapping with the keys {first_few(variables)}"
                if isinstance(variables, Mapping)
                else f"a {type(variables).__name__}"
            )
            raise ValueError(f"export takes deploy-form variables, {{'params': …}}, not {summary}")
        wanted, given = self._shapes(deploy=True), named_leaves(variables["params"])
        if wanted.keys() != given.keys():
            if given.keys() & self._shapes(deploy=False).keys() - wanted.keys():
                raise ValueError(
                    f"the variables of {self.model.variant.name} are in training form; export "
                    "takes the deploy form: pass them through fuse_params first"
                )
            raise ValueError(
                f"these are not the variables of {self.model.variant.name} in deploy form: "
                f"missing [{first_few(sorted(wanted.keys() - given.keys()))}], "
                f"unexpected [{first_few(sorted(given.keys() - wanted.keys()))}]"
            )
        for name, leaf in given.items():
            if leaf.shape != wanted[name].shape:
                raise ValueError(f"{name}: shape {leaf.shape}, expected {wanted[name].shape}")
        params = jax.tree.map(_as_float32, jax.device_get(dict(variables["params"])))
        for name, leaf in named_leaves(params).items():
            if not np.isfinite(leaf).all():
                raise ValueError(f"{name} has NaN or infinite weights; it cannot be exported")
        return params

    def _shapes(self, *, deploy: bool) -> dict[str, Any]:
        """The parameters that the model has in one of its forms, by name."""
        image = jax.ShapeDtypeStruct((1, *self.image_shape), jnp.float32)
        init = self.model.clone(deploy=deploy).init
        return named_leaves(jax.eval_shape(init, jax.random.key(0), image)["params"])


def _as_float32(leaf: Any) -> np.ndarray:
    return np.asarray(leaf, np.float32)  # no copy if it is float32 already
