"""What is exported: a network in deploy form, checked, with images to prove artifacts on."""

import copy
import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from repvgg_jax import proof
from repvgg_jax.export.module import output_names, with_settings
from repvgg_jax.layers import check_classes
from repvgg_jax.model import RepVGG
from repvgg_jax.normalize import Normalize
from repvgg_jax.segmentation.network import Segmenter
from repvgg_jax.text import encodable, first_few, named_leaves, one_line

BATCH = 16
"""Images per batch in a proof: enough to keep two cores busy, little memory at 224 pixels."""


class Network:
    """A fused network as every format sees it, and its outputs for some real images.

    Decoding and resizing are not part of it: libraries differ in both, so images arrive at the
    size that the network was trained on.

    Attributes:
      model: the network in deploy form, computing in float32.
      params: its parameters, nested mappings of float32 NumPy arrays.
      state: its other variables, e.g. statistics of norms outside of blocks; empty for RepVGG.
      normalize: pixels to what the model takes.
      labels: name of every class in the order of the logits; empty if unknown.
      with_preprocessing: artifacts take uint8 images and return probabilities, instead of
        normalized images and logits.
      feature_maps: what artifacts return instead: maps of these stages, from the first on.
      dynamic_size: whether artifacts take images of any height and width.
      images: what proofs run on, as artifacts take them but always
        (images, height, width, channels).
    """

    def __init__(
        self,
        model: nn.Module,
        variables: Mapping[str, Any],
        *,
        images: np.ndarray,
        normalize: Normalize,
        labels: Sequence[str] = (),
        with_preprocessing: bool = False,
        feature_maps: Sequence[str] = (),
        dynamic_size: bool = False,
        crop: Mapping[str, Any] | None = None,
    ):
        """Checks everything before anything is written.

        Args:
          model: the network, in either form and any `dtype`: a RepVGG, or a Linen module of your
            own. That has a field `deploy`, which it passes to its blocks, or blocks and networks
            with such a field in fields of its own; it maps images to an array or to mappings or
            tuples of arrays, all with an axis of images first.
          variables: its deploy-form variables, `{"params": …}` and, of a module of your own, what
            `fuse_params` or `fuse_model` left in other collections; NumPy or JAX.
          images: real images (images, height, width, channels), of the size that artifacts
            will take. uint8 as decoded; or normalized floats, unless `with_preprocessing`.
          normalize: pixels to what the model takes.
          labels: name of every class, or none at all.
          with_preprocessing: see the class; a module of your own keeps its outputs.
          feature_maps: names of stages, e.g. `("stage2", "stage3", "stage4")`, of a RepVGG: the
            outputs are their last feature maps, as of its method `features`.
          dynamic_size: see the class; proofs then run on images of two sizes.
          crop: how evaluation crops image files, as `metadata.json` of a deploy directory says
            it; part of the header of `model.safetensors`.

        Raises:
          ValueError: variables in training form or of another network, weights that are not
            finite, images, normalization, labels or stages that do not fit.
        """
        self.model: Any = with_settings(model)
        self.normalize = normalize
        self.labels = tuple(map(str, labels))
        self.with_preprocessing = with_preprocessing
        self.feature_maps = self._checked_stages(feature_maps)
        self.dynamic_size = dynamic_size
        self.crop = crop
        self.images = self._checked_images(np.asarray(images))
        self.params, self.state = self._checked_variables(variables)
        self._check_outputs()

    @property
    def is_repvgg(self) -> bool:
        """Whether it is a classifier of this package, whose operators are known."""
        return isinstance(self.model, RepVGG)

    @property
    def is_segmenter(self) -> bool:
        """Whether it is a segmenter of this package, whose outputs have a class per pixel."""
        return isinstance(self.model, Segmenter)

    @property
    def is_ours(self) -> bool:
        """Whether it is a classifier or a segmenter of this package."""
        return self.is_repvgg or self.is_segmenter

    @property
    def name(self) -> str:
        """The architecture's."""
        if self.is_segmenter:
            return f"PSPNet-{self.model.variant.name}{'-fast' if self.model.fast else ''}"
        return self.model.variant.name if self.is_repvgg else type(self.model).__name__

    @property
    def variables(self) -> dict[str, Any]:
        """All collections."""
        return {"params": self.params, **self.state}

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
        """What artifacts call their output, if it is the only one."""
        if self.feature_maps or not self.is_ours:
            return next(iter(self.outputs))
        if not self.model.num_classes:
            return "features"
        return "probabilities" if self.with_preprocessing else "logits"

    @functools.cached_property
    def outputs(self) -> dict[str, tuple[int, ...]]:
        """Names of what an artifact returns, and its shape per image."""
        images = jax.ShapeDtypeStruct(self.images.shape, self.images.dtype)
        found = jax.eval_shape(lambda images: self.apply(self.params, images), images)
        if self.is_ours and not self.feature_maps:
            return {self.output_name: found.shape[1:]}
        shapes = {name: leaf.shape[1:] for name, leaf in output_names(found).items()}
        return {name: shapes[name] for name in self.feature_maps or shapes}

    @property
    def idle(self) -> tuple[str, ...]:
        """Modules that no output depends on: those after the last feature map."""
        if not self.feature_maps:
            return ()
        layers = self.model.layers
        used = max(i for i, layer in enumerate(layers) if layer.stage == self.feature_maps[-1])
        after = [layer.name for layer in layers[used + 1 :]]
        return tuple(name for name in (*after, "head") if name in self.params)

    def apply(self, params: Any, images: jax.Array, dtype: str = "float32") -> Any:
        """What an artifact computes, in JAX.

        Args:
          params: as `self.params`, traced or not.
          images: what an artifact takes, (images, height, width, channels).
          dtype: of the convolutions.

        Returns:
          float32 (images, outputs); a mapping of feature maps by stage; or what a module of your
          own returns.
        """
        if self.with_preprocessing:
            images = self.normalize(images)
        model = with_settings(self.model, {"dtype": jnp.dtype(dtype)})
        variables = {"params": params, **self.state}
        if self.feature_maps:
            maps: Any = model.apply(variables, images, method="features")
            return {stage: maps[stage].astype(jnp.float32) for stage in self.feature_maps}
        outputs: Any = model.apply(variables, images)
        if self.is_ours and self.output_name == "probabilities":
            return jax.nn.softmax(outputs)
        return outputs

    @functools.cached_property
    def reference(self) -> np.ndarray:
        """The JAX model's outputs for `images`, in full float32 precision.

        (images, outputs); of a segmenter (images, height, width, classes); or all numbers of all
        outputs as (images, numbers).
        """

        def apply(params: Any, images: jax.Array) -> jax.Array:
            return self._joined(self.apply(params, images), jnp)

        return proof.logits(apply, self.params, self.images, batch_size=BATCH)

    def at_other_sizes(self) -> list["Network"]:
        """The same network with smaller images, if artifacts take any size."""
        if not self.dynamic_size:
            return []
        other = copy.copy(self)
        other.__dict__.pop("reference", None)
        other.__dict__.pop("outputs", None)
        height, width, _ = self.image_shape
        # Of other proportions, and odd where the others are even.
        other.images = self.images[:3, : max(height - height // 4 - 1, 1), : max(width - 3, 1)]
        return [other]

    def without_preprocessing(self) -> "Network":
        """The same network for formats that hold weights alone: normalized images, logits."""
        if not (self.with_preprocessing or self.feature_maps or self.dynamic_size):
            return self
        return Network(
            self.model,
            self.variables,
            images=self.images,
            normalize=self.normalize,
            labels=self.labels,
        )

    def answers(self, run: Any) -> np.ndarray:
        """A runtime's outputs for `images`, as in `reference`.

        The first image goes alone, the others in batches: an artifact that only takes the
        batch size it was made with does not pass.
        """
        ends = [0, 1, *range(1 + BATCH, len(self.images), BATCH), len(self.images)]
        parts = [self.images[start:end] for start, end in itertools.pairwise(ends)]
        return np.concatenate([self._joined(run(part), np) for part in parts if len(part)])

    def _joined(self, outputs: Any, numpy: Any) -> Any:
        """All outputs of a batch of images as one array, (images, numbers)."""
        found = output_names(outputs)
        names = self.feature_maps or tuple(found)
        leaves = [numpy.asarray(found[name]) for name in names]
        if self.is_segmenter or (len(leaves) == 1 and leaves[0].ndim == 2):
            return leaves[0]
        return numpy.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)

    def comparable(self, outputs: np.ndarray) -> np.ndarray:
        """Outputs on the scale of logits, on which two runtimes are compared.

        Probabilities saturate: if one class has probability 1, any two networks agree. Their
        logarithms are the logits up to a constant per image. Of several outputs, each is divided
        by its largest reference.
        """
        if self.is_ours and self.output_name == "probabilities":
            return np.log(np.maximum(outputs, 1e-30, dtype=np.float64))
        if len(self.outputs) == 1:
            return outputs
        sizes = [int(np.prod(shape)) for shape in self.outputs.values()]
        ends = np.cumsum([0, *sizes])
        largest = [
            np.abs(self.reference[:, start:end]).max(initial=0)
            for start, end in itertools.pairwise(ends)
        ]
        return outputs / np.repeat(np.where(largest, largest, 1), sizes)

    def description(self, layout: str) -> dict[str, Any]:
        """What users of the artifact need to know, for JSON; `layout` is that of its input."""
        height, width, channels = self.image_shape
        return {
            "variant": self.name,
            "input": self.input_name,
            "input_dtype": str(self.images.dtype),
            "input_layout": layout,
            "image_size": [height, width],
            "channels": channels,
            "mean": list(self.normalize.mean),
            "std": list(self.normalize.std),
            # The spelling of this key is part of the formats on disk.
            "normalisation": "inside" if self.with_preprocessing else "(pixels / 255 - mean) / std",
            "output": self.output_name if len(self.outputs) == 1 else list(self.outputs),
            "labels": list(self.labels),
            "dynamic_size": self.dynamic_size,
            **({"strides": self._strides()} if self.feature_maps else {}),
        }

    def _strides(self) -> dict[str, int]:
        """Pixels of the images per pixel of a stage's feature map."""
        strides, stride = {}, 1
        for layer in self.model.layers:
            stride *= layer.stride
            strides[layer.stage] = stride
        return {stage: strides[stage] for stage in self.feature_maps}

    def header(self, layout: str) -> dict[str, str]:
        """The description for formats that store text by key; other values become JSON."""
        return {
            key: encodable(
                value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            )
            for key, value in self.description(layout).items()
        }

    def _checked_stages(self, names: Sequence[str]) -> tuple[str, ...]:
        if not names:
            return ()
        if not self.is_repvgg:
            raise ValueError(
                f"feature maps are those of a RepVGG's stages; let {self.name} return its own"
            )
        stages = list(dict.fromkeys(layer.stage for layer in self.model.layers))
        if unknown := [name for name in names if name not in stages]:
            raise ValueError(
                f"{self.name} has no feature maps {first_few(unknown)}; it has {', '.join(stages)}"
            )
        return tuple(stage for stage in stages if stage in names)

    def _check_outputs(self) -> None:
        if self.is_ours:
            return
        try:
            outputs = self.outputs
        except Exception as error:  # of a module that we know nothing about
            raise ValueError(f"{self.name} cannot be applied: {one_line(error)}") from error
        found = jax.eval_shape(
            lambda images: self.apply(self.params, images),
            jax.ShapeDtypeStruct((7, *self.image_shape), self.images.dtype),
        )
        for name, leaf in output_names(found).items():
            if leaf.shape[:1] != (7,) or not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise ValueError(
                    f"{self.name}: the output {name} for 7 images is {leaf.dtype}{leaf.shape}; "
                    "export takes floating point arrays with an axis of images first"
                )
        shapes = list(outputs.values())
        if self.labels and (len(shapes) != 1 or shapes[0] != (len(self.labels),)):
            raise ValueError(f"{len(self.labels)} labels for outputs of shapes {shapes} per image")

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
        classes = self.model.num_classes if self.is_ours else len(self.labels)
        if self.labels and len(self.labels) != classes:
            raise ValueError(
                f"{len(self.labels)} labels for a network of {classes} classes; "
                "give one label per class, or none"
            )
        if images.dtype == np.uint8:
            return images if self.with_preprocessing else self.normalize(images)
        if self.with_preprocessing or not jnp.issubdtype(images.dtype, jnp.floating):
            wanted = "uint8" if self.with_preprocessing else "uint8 or normalized floating point"
            raise ValueError(f"images are {images.dtype}; expected {wanted} numbers")
        return images.astype(np.float32)

    def _checked_variables(self, variables: Any) -> tuple[Any, dict[str, Any]]:
        if not isinstance(variables, Mapping) or not isinstance(variables.get("params"), Mapping):
            summary = (
                f"a mapping with the keys {first_few(variables)}"
                if isinstance(variables, Mapping)
                else f"a {type(variables).__name__}"
            )
            raise ValueError(f"export takes deploy-form variables, {{'params': …}}, not {summary}")
        # A RepVGG in deploy form has parameters only; other collections may be left over.
        collections = ("params",) if self.is_ours else tuple(variables)
        wanted = self._shapes(deploy=True)
        given = _named({name: variables[name] for name in collections})
        if wanted.keys() != given.keys():
            if given.keys() & self._shapes(deploy=False).keys() - wanted.keys():
                raise ValueError(
                    f"the variables of {self.name} are in training form; export "
                    "takes the deploy form: pass them through fuse_params first"
                )
            hint = "" if self.is_ours else "; does it pass a field deploy to its blocks?"
            raise ValueError(
                f"these are not the variables of {self.name} in deploy form: "
                f"missing [{first_few(sorted(wanted.keys() - given.keys()))}], "
                f"unexpected [{first_few(sorted(given.keys() - wanted.keys()))}]{hint}"
            )
        if self.is_ours:
            check_classes(self.name, variables["params"].get("head", {}), self.model.num_classes)
        for name, leaf in given.items():
            if leaf.shape != wanted[name].shape:
                raise ValueError(f"{name}: shape {leaf.shape}, expected {wanted[name].shape}")
        tree = {name: jax.device_get(dict(variables[name])) for name in collections}
        tree = jax.tree.map(_as_float32, tree)
        for name, leaf in _named(tree).items():
            if not np.isfinite(leaf).all():
                raise ValueError(f"{name} has NaN or infinite weights; it cannot be exported")
        return tree.pop("params"), tree

    def _shapes(self, *, deploy: bool) -> dict[str, Any]:
        """The variables that the model has in one of its forms, by name."""
        image = jax.ShapeDtypeStruct((1, *self.image_shape), jnp.float32)
        init = with_settings(self.model, {"deploy": deploy}).init
        variables = jax.eval_shape(init, jax.random.key(0), image)
        return _named({"params": variables["params"]} if self.is_ours else variables)


def _named(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves by name; those of parameters without the name of their collection."""
    others = {name: tree for name, tree in variables.items() if name != "params"}
    return {**named_leaves(variables["params"]), **named_leaves(others)}


def _as_float32(leaf: Any) -> np.ndarray:
    return np.asarray(leaf, np.float32)  # no copy if it is float32 already
