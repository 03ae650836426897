"""Deploy networks leave for other runtimes, each artefact with a proof.

    network = Network(model, deployed, images=images, metadata=Metadata(mean, std, labels))
    artefact = export("onnx", network, "deploy/model.onnx")
    print(artefact)

`formats` is the table of formats, every format has a file, and `exporting` writes and proves.
Nothing here imports ONNX, TensorFlow or a runtime before it is needed.
"""

from repvgg_jax.export.artefact import Artefact
from repvgg_jax.export.exporting import export
from repvgg_jax.export.format import Format, Runtime
from repvgg_jax.export.formats import FORMATS, get_format, parse_format
from repvgg_jax.export.metadata import Metadata
from repvgg_jax.export.network import Network

__all__ = [
    "FORMATS",
    "Artefact",
    "Format",
    "Metadata",
    "Network",
    "Runtime",
    "export",
    "get_format",
    "parse_format",
]
