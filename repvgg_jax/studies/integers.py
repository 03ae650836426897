"""What the study of quantization trains, quantizes and measures."""

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from repvgg_jax.data.dataset import Dataset
from repvgg_jax.quantization import CALIBRATORS, Grid, Quantized, quantize
from repvgg_jax.quantization import Settings as QuantizationSettings
from repvgg_jax.quantization.network import layer_of
from repvgg_jax.quantization.qat import with_ranges
from repvgg_jax.reparam import extract_scales, rep_init, rep_optimizer, repopt_search
from repvgg_jax.studies.rows import network, small_recipe
from repvgg_jax.studies.runs import Trainer
from repvgg_jax.train.settings import Settings

NETWORKS: Mapping[str, str] = types.MappingProxyType(
    {
        "RepVGG": "repvgg",
        "RepOpt-VGG": "repopt",
        "QARepVGG": "qarepvgg",
        "MobileOne": "mobileone",
        "conv-BN": "no_branches",
    }
)
"""Networks of the study, and their blocks."""

CALIBRATION = 256
"""Training images that ranges are calibrated on."""

QAT = "QAT"
METHODS = (
    *CALIBRATORS,
    "weights per tensor",
    "equalized",
    "equalized, biases corrected",
    QAT,
)
"""Ways to int8: calibrators alone; mse with something else; quantization-aware training."""


def recipe(name: str) -> Settings:
    """How a network is trained in float.

    Raises:
      KeyError: no such network.
    """
    return Settings.from_config(small_recipe(network(f"int8-{name}", NETWORKS[name])))


def fine_tuning(settings: Settings) -> Settings:
    """How it is trained through its integers afterwards: an epoch at a hundredth of the rate."""
    rate = settings.optimizer.learning_rate / 100
    return dataclasses.replace(
        settings,
        train=dataclasses.replace(settings.train, epochs=1),
        optimizer=dataclasses.replace(settings.optimizer, learning_rate=rate, warmup_epochs=0.0),
        quantize=dataclasses.replace(settings.quantize, qat=True),
    )


class Study:
    """Trains networks alike; everything is compiled once per network."""

    def __init__(self, dataset: Dataset):
        self._dataset = dataset
        train, evaluation = dataset.train, dataset.evaluation
        self._pixels = np.stack([train[i]["image"] for i in range(CALIBRATION)])
        count = len(evaluation)
        self._images = np.stack([evaluation[i]["image"] for i in range(count)])
        self._labels = np.array([evaluation[i]["label"] for i in range(count)])
        self._trainer = functools.cache(self._make)

    def run(self, name: str, seed: int) -> dict[str, Any]:
        """Accuracies, fractions: `float`, and by method; and what was measured per layer."""
        variables = self._trained(name, seed)
        trainer = self._trainer(recipe(name))
        model = trainer.experiment.model.clone(deploy=True)
        fused = trainer.experiment.model.fuse(variables)
        found: dict[str, Any] = {"float": trainer.accuracy(model, fused)}
        normalize = trainer.experiment.normalize
        calibration = np.asarray(normalize(self._pixels))
        images = np.asarray(normalize(self._images))
        plain = None
        for method, make in _methods(model, fused, calibration).items():
            quantized = make()
            found[method] = float((quantized(images).argmax(-1) == self._labels).mean())
            plain = plain or quantized
        assert plain is not None, "there are methods"
        found[QAT] = self._fine_tuned(name, seed, variables)
        return {"accuracies": found, "layers": layer_ranges(plain)}

    def _make(self, settings: Settings) -> Trainer:
        return Trainer(settings, self._dataset)

    def _trained(self, name: str, seed: int) -> dict[str, Any]:
        trainer = self._trainer(recipe(name))
        if NETWORKS[name] != "repopt":
            return jax.device_get(trainer.train(seed).result)
        search = small_recipe(network("int8-search", "repopt_search"))
        searched = self._trainer(Settings.from_config(search)).train(seed)
        spec = repopt_search()
        scales = extract_scales(spec, jax.device_get(searched.params))
        optimizer = rep_optimizer(spec, scales, trainer.experiment.optimizer)
        own = Trainer(recipe(name), self._dataset, optimizer=optimizer)
        variables = own.initial(seed)
        params = rep_init(spec, scales, variables["params"], jax.random.key(seed))
        return jax.device_get(own.train(seed, {**variables, "params": params}).result)

    def _fine_tuned(self, name: str, seed: int, variables: dict[str, Any]) -> float:
        trainer = self._trainer(fine_tuning(recipe(name)))
        qat = trainer.experiment.qat
        assert qat is not None, "that is what it is for"
        begun = with_ranges(variables, qat.unobserved(trainer.experiment.model))
        state = trainer.train(seed, begun)
        return trainer.accuracy(*trainer.experiment.evaluated(state.result))


def _methods(model: Any, fused: Any, calibration: np.ndarray) -> dict[str, Callable[[], Quantized]]:
    """Functions that quantize, by method."""

    def with_settings(
        calibrator: str = "mse", *, equalize: bool = False, bias_correction: bool = False
    ) -> Quantized:
        settings = QuantizationSettings(
            calibrator=calibrator, equalize=equalize, bias_correction=bias_correction
        )
        return quantize(model, fused, calibration, settings)

    return {
        **{name: functools.partial(with_settings, name) for name in CALIBRATORS},
        "weights per tensor": lambda: per_tensor(with_settings()),
        "equalized": lambda: with_settings(equalize=True),
        "equalized, biases corrected": lambda: with_settings(equalize=True, bias_correction=True),
    }


def per_tensor(quantized: Quantized) -> Quantized:
    """The network with one scale per kernel instead of one per output channel."""
    weights = {
        name: Grid(np.asarray(grid.scale.max()), 0, grid.lowest, grid.highest)
        for name, grid in quantized.weights.items()
    }
    return dataclasses.replace(quantized, weights=weights)


def layer_ranges(quantized: Quantized) -> list[dict[str, float]]:
    """Numbers per layer.

    `weights` is the largest range of an output channel over the median one, `activations` the
    largest input, and `noise` as in `Quantized`.
    """
    found = []
    for name in quantized.plan.layers:
        kernel = layer_of(quantized.params, name)["kernel"]
        ranges = np.abs(kernel).reshape(-1, kernel.shape[-1]).max(axis=0)
        found.append(
            {
                "weights": float(ranges.max() / max(float(np.median(ranges)), 1e-12)),
                "activations": max(abs(end) for end in quantized.activations[name].range),
                "noise": float(quantized.noise.get(name, float("nan"))),
            }
        )
    return found
