"""Exports deploy networks to other runtimes, each artifact with a proof.

    network = Network(model, deployed, images=images, normalize=Normalize(mean, std))
    artifact = export("onnx", network, "deploy/model.onnx")
    print(artifact)

`FORMATS` has a row per format, `Target` is a format in a dtype (`Target.parse("onnx:float16")`),
`int8` writes quantized networks (`repvgg_jax.quantization`), and
`operators` is the list of operators that ONNX and TensorFlow translate. Nothing here imports
ONNX, TensorFlow or a runtime before it is needed.
"""

from repvgg_jax.export.exporting import FORMATS, Target, export, get_format, parse_targets
from repvgg_jax.export.format import Artifact, Format, Runtime
from repvgg_jax.export.int8 import INT8_FORMATS, export_int8
from repvgg_jax.export.network import Network
from repvgg_jax.normalize import Normalize

__all__ = [
    "FORMATS",
    "INT8_FORMATS",
    "Artifact",
    "Format",
    "Network",
    "Normalize",
    "Runtime",
    "Target",
    "export",
    "export_int8",
    "get_format",
    "parse_targets",
]
