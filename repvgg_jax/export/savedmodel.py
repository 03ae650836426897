"""TensorFlow SavedModel, for TensorFlow Serving and all that reads one.

The signature `serving_default` takes any batch size. `assets.extra/metadata.json` describes
the network.
"""

import json
from pathlib import Path

import numpy as np

from repvgg_jax.export import tensorflow
from repvgg_jax.export.format import Format, Run, Runtime
from repvgg_jax.export.network import Network
from repvgg_jax.proof import TOLERANCE


def write(network: Network, path: Path, dtype: str) -> None:
    """Writes a SavedModel directory; `dtype` is float32."""
    tf = tensorflow.load()
    module = tensorflow.build(network)
    tf.saved_model.save(module, str(path), {tensorflow.SIGNATURE: module.serve})
    extra = path / "assets.extra"
    extra.mkdir()
    description = json.dumps(network.description(FORMAT.layout), indent=2, ensure_ascii=False)
    (extra / "metadata.json").write_text(description + "\n", encoding="utf-8")


def _open(path: Path, network: Network) -> Run:
    tf = tensorflow.load()
    serve = tf.saved_model.load(str(path)).signatures[tensorflow.SIGNATURE]

    def run(images: np.ndarray) -> np.ndarray:
        return serve(**{network.input_name: tf.constant(images)})[network.output_name].numpy()

    return run


FORMAT = Format(
    name="savedmodel",
    filename="savedmodel",
    layout="NHWC",
    write=write,
    packages=("tensorflow",),
    runtimes=(Runtime("tensorflow", _open),),
    tolerances={"float32": TOLERANCE},
    extra="tf",
    is_directory=True,
)
