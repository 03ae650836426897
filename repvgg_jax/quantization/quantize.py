"""Quantizes a deployed network after training, from some images and no labels."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repvgg_jax.layers import check_classes
from repvgg_jax.proof import BATCH, BATCH_PIXELS, at_most
from repvgg_jax.quantization import passes
from repvgg_jax.quantization.calibrators import BINS, CALIBRATORS, Histogram, choose_range
from repvgg_jax.quantization.grid import Grid
from repvgg_jax.quantization.network import (
    Model,
    Plan,
    chains,
    checked,
    commutes,
    layer_of,
    plan,
    with_layers,
)
from repvgg_jax.quantization.settings import TRAINED, Settings
from repvgg_jax.reparam import equalize
from repvgg_jax.text import named_leaves, plural

MEASURED, MEASURED_PIXELS = 64, 2**23
"""Calibration images, and their pixels, that noise and gains are measured on, at most."""

NOISY = 0.05
"""Noise of a layer, relative to the variance of its outputs, that deserves a warning: 13 dB."""


@dataclasses.dataclass(frozen=True, eq=False)
class Quantized:
    """A network in int8, by what its tensors are rounded to.

    Attributes:
      model: in deploy form.
      params: what is rounded: its parameters, float32, equalized and with corrected biases if the
        settings say so.
      plan: what is quantized.
      activations: grids of `plan.tensors`, by name.
      weights: grids of the kernels of `plan.layers`, by name.
      settings: how it was quantized; steps that were left to the error are True if kept.
      noise: by layer, what rounding its inputs and weights does to its outputs: mean squared
        change relative to their variance, on calibration images.
      errors: what rounding the network does to its logits, root mean square relative to their own:
        before and after every step that was tried, in order.
    """

    model: Model
    params: Any
    plan: Plan
    activations: Mapping[str, Grid]
    weights: Mapping[str, Grid]
    settings: Settings
    noise: Mapping[str, float] = dataclasses.field(default_factory=dict)
    errors: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def variables(self) -> dict[str, Any]:
        """Deploy-form variables with kernels and biases as int8 and int32 represent them."""
        changed = {}
        for name in self.plan.layers:
            layer, grid = layer_of(self.params, name), self.weights[name]
            step = self.bias_scale(name)
            bias = np.round(np.asarray(layer["bias"], np.float64) / step) * step
            changed[name] = {"kernel": grid(layer["kernel"]), "bias": bias.astype(np.float32)}
        return {"params": with_layers(self.params, changed)}

    def bias_scale(self, name: str) -> np.ndarray:
        """The step of a layer's bias, float32 (channels,)."""
        return self.activations[name].scale * self.weights[name].scale

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Logits of normalized images (images, height, width, channels), as int8 computes them.

        They differ from integer arithmetic by the rounding of float32 sums alone.
        """
        variables, grids = self.variables, dict(self.activations)
        return np.concatenate(
            [
                np.asarray(passes.rounded(self.model, self.plan, grids, variables, part))
                for part in batches(images)
            ]
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """Layers whose outputs rounding damages, with the remedy; empty if there are none."""
        bad = sorted(
            (name for name, noise in self.noise.items() if noise > NOISY),
            key=lambda name: -self.noise[name],
        )
        if not bad:
            return ()
        worst = ", ".join(f"{name} {self.noise[name]:.1%}" for name in bad[:5])
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        tried = any(step.startswith("equalized") for step in self.errors)
        remedies = [] if tried else ["equalize its channels (--equalize)"]
        remedies += [
            "train a QARepVGG (docs/family.md) or with quantization-aware training",
            f"leave these layers in float (--float-layers={bad[0]})",
        ]
        return (
            f"int8 does not fit {plural(len(bad), 'layer')}: rounding changes the outputs by more "
            f"than {NOISY:.0%} of their variance, {worst}{more}; {', or '.join(remedies)}",
        )


def quantize(
    model: Model, variables: Any, images: np.ndarray, settings: Settings | None = None
) -> Quantized:
    """Quantizes a deployed classifier or segmenter, from images without labels.

    Args:
      model: in deploy form.
      variables: its deploy-form variables, `{"params": …}`, NumPy or JAX.
      images: normalized, float (images, height, width, channels); 100 to 500 of those that the
        network was trained on, or a dozen large ones with a class per pixel. More change little.
      settings: how; default: for x86 processors, with ranges of least error.

    Returns:
      The quantized network, to simulate it on any device or to export it.

    Raises:
      ValueError: a network in training form or of another kind, images that do not fit it or do
        not vary, activations that are not finite or all zero.
    """
    settings = settings or Settings()
    if settings.calibrator == TRAINED:
        raise ValueError(
            f"--calibrator={TRAINED} is for a run of quantization-aware training, which has "
            f"ranges; available here: {', '.join(CALIBRATORS)}"
        )
    model = checked(model)
    planned = plan(model, settings.float_layers)
    images = check_images(images)
    params = _params_of(model, variables, images)
    wanted = settings.equalize or (settings.equalize is None and commutes(model))
    orders = chains(model) if wanted else ()
    shown = measured(images)
    expected = np.concatenate(
        [np.asarray(passes.plain(model, params, part)) for part in batches(shown)]
    )
    found = rounded(model, params, planned, images, settings)
    errors = {"rounded": _relative(expected, found(shown))}
    best = errors["rounded"]

    def better(other: Quantized, step: str, wanted: bool | None) -> bool:
        """Whether to go on with the network after this step."""
        nonlocal best
        error = _relative(expected, other(shown))
        kept = error < best if wanted is None else wanted
        errors[step if kept else f"{step} (not kept)"] = error
        best = error if kept else best
        return kept

    equalized = corrected = False
    if orders:
        _, channels = observe(model, params, images, planned)
        scaled = params
        for order in orders:
            scaled = equalize(scaled, order, activations=channels)
        other = rounded(model, scaled, planned, images, settings)
        if equalized := better(other, "equalized", settings.equalize):
            found = other
    if settings.bias_correction is not False:
        other = correct_biases(found, images)
        if corrected := better(other, "biases corrected", settings.bias_correction):
            found = other
    done = dataclasses.replace(settings, equalize=equalized, bias_correction=corrected)
    noise = layer_noise(found, shown)
    return dataclasses.replace(found, settings=done, noise=noise, errors=errors)


def check_images(images: Any) -> np.ndarray:
    """Calibration images as float32.

    Raises:
      ValueError: another shape or type, no images, values that are not finite, or images without
        content.
    """
    images = np.asarray(images)
    if images.ndim != 4 or not len(images) or not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"calibration images are {images.dtype} of shape {images.shape}; expected normalized "
            "floating point numbers (images, height, width, channels), at least one image"
        )
    if not np.isfinite(images).all():
        raise ValueError("calibration images hold NaN or infinite values")
    constant = sum(bool((image == image[:1, :1]).all()) for image in images)
    if constant == len(images):
        raise ValueError(
            f"all {plural(constant, 'calibration image')} are of a single color; calibrate with "
            "images like those the network was trained on"
        )
    return images.astype(np.float32)


def _params_of(model: Model, variables: Any, images: np.ndarray) -> Any:
    """The parameters, float32 NumPy arrays, compared in name and shape."""
    given = variables.get("params") if isinstance(variables, Mapping) else None
    if not isinstance(given, Mapping):
        raise ValueError("quantization takes deploy-form variables, {'params': …}")
    image = jax.ShapeDtypeStruct((1, *images.shape[1:]), jnp.float32)

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        return {name: leaf.shape for name, leaf in named_leaves(tree).items()}

    def of(form: Any) -> dict[str, tuple[int, ...]]:
        return shapes(jax.eval_shape(form.init, jax.random.key(0), image)["params"])

    wanted, found = of(model), shapes(given)
    if wanted != found:
        if found.keys() & of(model.clone(deploy=False)).keys() - wanted.keys():
            raise ValueError(
                f"the variables of {model.variant.name} are in training form; quantization takes "
                "the deploy form: pass them through fuse_params first"
            )
        check_classes(model.variant.name, given.get("head", {}), model.num_classes)
        name, shape = sorted(wanted.items() ^ found.items())[0]
        raise ValueError(f"these are not the variables of {model.variant.name}: {name} {shape}")
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), dict(given))


def rounded(
    model: Model, params: Any, planned: Plan, images: np.ndarray, settings: Settings
) -> Quantized:
    """The network with a grid for every tensor."""
    activations = {}
    for name, histogram in histograms(model, params, images, planned).items():
        low, high = choose_range(
            name,
            histogram,
            settings.calibrator,
            symmetric=settings.numbers.symmetric,
            percentile=settings.percentile,
        )
        activations[name] = Grid.of_range(low, high, settings.numbers)
    return Quantized(
        model, params, planned, activations, weight_grids(params, planned, activations), settings
    )


def weight_grids(params: Any, planned: Plan, activations: Mapping[str, Grid]) -> dict[str, Grid]:
    """Grids of the kernels, given those of the inputs."""
    found = {}
    for name in planned.layers:
        layer = layer_of(params, name)
        found[name] = Grid.of_weights(layer["kernel"], layer["bias"], activations[name])
    return found


def observe(
    model: Model, params: Any, images: np.ndarray, planned: Plan
) -> tuple[dict[str, tuple[float, float]], dict[str, np.ndarray]]:
    """Smallest and largest value of every tensor, and the largest |output| per channel of blocks.

    Returns:
      (lowest, highest) by name, one at most 0 and the other at least 0; float32 (channels,) by
      layer of the model.
    """
    parts = [passes.extremes(model, planned, params, part) for part in batches(images)]
    ranges: dict[str, tuple[float, float]] = {}
    for name in planned.tensors:
        low, high, total = (np.array([part[0][name][k] for part in parts]) for k in range(3))
        if not np.isfinite(total).all():
            low = high = np.array([np.nan if np.isnan(total).any() else np.inf])
        ranges[name] = float(low.min()), float(high.max())
    return ranges, {name: np.max([part[1][name] for part in parts], axis=0) for name in parts[0][1]}


def histograms(
    model: Model, params: Any, images: np.ndarray, planned: Plan
) -> dict[str, Histogram]:
    """The values of every tensor that is quantized, in two passes over the images."""
    ranges, _ = observe(model, params, images, planned)
    for name, (low, high) in ranges.items():
        if not np.isfinite([low, high]).all() or low == high:
            choose_range(
                name, Histogram(low, high, np.zeros(1)), "max", symmetric=False, percentile=50
            )

    total = {name: np.zeros(BINS + 1, np.int64) for name in planned.tensors}
    for part in batches(images):
        for name, counts in passes.counts(model, planned, ranges, params, part).items():
            total[name] += np.asarray(counts)
    return {
        name: Histogram(*ranges[name], counts[:BINS], int(counts[BINS]))
        for name, counts in total.items()
    }


def correct_biases(quantized: Quantized, images: np.ndarray) -> Quantized:
    """Biases that give every channel of a layer the mean that it has in float.

    Layer by layer, with the corrected layers before it, as Nagel et al. (ICCV 2019, section 4.2)
    do from data.
    """
    model, planned = quantized.model, quantized.plan
    variables, grids = quantized.variables, dict(quantized.activations)
    found = []
    for part in batches(images):
        means = passes.means(model, planned, quantized.params, part)
        found.append((len(part), passes.shifts(model, planned, grids, variables, means, part)))
    weights = np.array([count for count, _ in found]) / len(images)
    changed = {}
    for name in planned.layers:
        shift = np.tensordot(weights, np.stack([shifts[name] for _, shifts in found]), 1)
        layer = layer_of(quantized.params, name)
        changed[name] = {**layer, "bias": (layer["bias"] + shift).astype(np.float32)}
    params = with_layers(quantized.params, changed)
    grids = weight_grids(params, planned, quantized.activations)
    return dataclasses.replace(quantized, params=params, weights=grids)


def layer_noise(quantized: Quantized, images: np.ndarray) -> dict[str, float]:
    """For each layer, the mean squared change of its outputs relative to their variance.

    The layer's inputs and weights are rounded, and nothing before it.
    """
    model, planned, variables = quantized.model, quantized.plan, quantized.variables
    grids = dict(quantized.activations)
    parts = [
        passes.changes(model, planned, grids, quantized.params, variables, part)
        for part in batches(images)
    ]
    noise = {}
    for name in planned.layers:
        change, spread = (sum(float(part[name][k]) for part in parts) for k in range(2))
        noise[name] = change / spread if spread else float(change > 0)
    return noise


def _relative(expected: np.ndarray, found: np.ndarray) -> float:
    """Root mean square of the change, relative to that of what was expected."""
    return float(np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean()))


def batches(images: np.ndarray) -> Iterator[np.ndarray]:
    """Images in portions of at most `BATCH` images and `BATCH_PIXELS` pixels, or of one."""
    size = at_most(BATCH, BATCH_PIXELS, images.shape[1:3])
    for start in range(0, len(images), size):
        yield images[start : start + size]


def measured(images: np.ndarray) -> np.ndarray:
    """The calibration images that noise and gains are measured on."""
    return images[: at_most(MEASURED, MEASURED_PIXELS, images.shape[1:3])]
