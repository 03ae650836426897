"""Quantization after training: a deployed network in int8, simulated in JAX.

    quantized = quantize(model, deployed, images)      # images: normalized, for calibration
    logits = quantized(images)

`settings` has the choices, `calibrators` go from histograms of activations to ranges, `grid` from
ranges to integers, `network` knows which tensors of a network are quantized, and `quantize` puts
them together. `repvgg_jax.export` writes the result for runtimes.
"""

from repvgg_jax.quantization.calibrators import CALIBRATORS
from repvgg_jax.quantization.grid import Grid
from repvgg_jax.quantization.network import chain, chains
from repvgg_jax.quantization.quantize import Quantized, quantize
from repvgg_jax.quantization.settings import TARGETS, Settings, Target

__all__ = [
    "CALIBRATORS",
    "TARGETS",
    "Grid",
    "Quantized",
    "Settings",
    "Target",
    "chain",
    "chains",
    "quantize",
]
