"""Quantized networks in formats that hold integers, each artifact with a proof.

The proof compares a runtime with the simulation in JAX, which rounds to the same values. What int8
costs is another question, which evaluation answers: `repvgg_jax.convert.int8`.
"""

import dataclasses
import time
import types
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np

from repvgg_jax.export import onnx_int8, tensorflow_int8
from repvgg_jax.export.decompose import decompose
from repvgg_jax.export.exporting import FORMATS, run_in_runtimes
from repvgg_jax.export.format import Artifact, Format, Run, checksums, size
from repvgg_jax.export.network import Network
from repvgg_jax.export.operators import RESAMPLING
from repvgg_jax.proof import Proof, compare
from repvgg_jax.quantization.quantize import Quantized
from repvgg_jax.text import versions

TOLERANCE = 5e-2
"""Largest |Δlogit| from the simulation, relative to the largest: where a value lies between two
numbers, a runtime may round to the other one."""


@dataclasses.dataclass(frozen=True)
class Int8Format:
    """How a format holds a quantized network.

    Attributes:
      format: the row of `FORMATS` that runs it.
      write: writes a network and how it is rounded to a path.
      float_layers: by runtime, what it computes in float, in its own words.
    """

    format: Format
    write: Callable[[Network, Quantized, Path], None]
    float_layers: Mapping[str, Callable[[Path], tuple[str, ...]]]

    @property
    def filename(self) -> str:
        """The name of an artifact, e.g. `model.int8.onnx`."""
        stem, _, suffix = self.format.filename.partition(".")
        return f"{stem}.int8.{suffix}"


INT8_FORMATS: Mapping[str, Int8Format] = types.MappingProxyType(
    {
        "onnx": Int8Format(
            FORMATS["onnx"],
            onnx_int8.write,
            {
                "onnxruntime": onnx_int8.float_layers_onnxruntime,
                "openvino": onnx_int8.float_layers_openvino,
            },
        ),
        "tflite": Int8Format(
            FORMATS["tflite"],
            tensorflow_int8.write,
            {"ai_edge_litert": tensorflow_int8.float_layers},
        ),
    }
)
"""Formats that hold int8, by name."""


def export_int8(name: str, network: Network, quantized: Quantized, path: Path) -> Artifact:
    """Writes a quantized network to a new file and compares its runtimes with the simulation.

    If anything fails, `path` may hold an incomplete artifact: write to a temporary one.

    Args:
      name: one of `INT8_FORMATS`.
      network: of `quantized.params`, with the images of the proof.
      quantized: how it is rounded.
      path: the file.

    Raises:
      ValueError: a package is not installed, or a runtime disagrees with the simulation.
    """
    form, start = INT8_FORMATS[name], time.perf_counter()
    expected = network.comparable(simulated(network, quantized, network.images))
    try:
        form.write(network, quantized, path)
    except ImportError as error:
        raise ValueError(f"format {name} in int8: {error}; {form.format.remedy}") from error

    def prove(run: Run) -> Proof:
        return compare(expected, network.comparable(network.answers(run)), tolerance=TOLERANCE)

    proofs, unproven = run_in_runtimes(
        form.format,
        network,
        path,
        prove,
        disagrees=f"the int8 {name} artifact disagrees with its simulation",
    )
    return Artifact(
        format=name,
        path=path,
        dtype="int8",
        description=network.description(form.format.input_layout(network)),
        proofs=proofs,
        unproven=unproven,
        identical=False,
        versions=versions(*form.format.packages, *proofs),
        checksums=checksums(path),
        size=size(path),
        seconds=round(time.perf_counter() - start, 3),
    )


def simulated(network: Network, quantized: Quantized, images: np.ndarray) -> np.ndarray:
    """What an artifact answers to images as it takes them, by the simulation."""
    logits = quantized(network.normalize(images) if network.with_preprocessing else images)
    if network.output_name == "probabilities":
        return np.asarray(jax.nn.softmax(logits))
    return logits


def float_layers(
    name: str, runtime: str, path: Path, network: Network, quantized: Quantized
) -> tuple[str, ...]:
    """Layers of an artifact that should be int8 and that a runtime computes in float."""
    found = INT8_FORMATS[name].float_layers[runtime](path)
    if network.is_segmenter:  # it interpolates by matrix products, the last one is the output
        others = [one.name for one in decompose(network) if isinstance(one, RESAMPLING)]
        others.append(network.output_name)
        found = tuple(one for one in found if not any(other in one for other in others))
    # A linear layer is called like the output in some runtimes.
    found = tuple("head" if one == network.output_name else one for one in found)
    return tuple(layer for layer in quantized.plan.layers if any(layer in one for one in found))
