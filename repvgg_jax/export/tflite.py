"""LiteRT (TensorFlow Lite), for phones and microcontrollers.

NHWC without transposes, any batch size through the signature `serving_default`. In float16
the weights are stored as float16: half the file, computed in float16 by GPU delegates and in
float32 by processors.

The file is also a zip archive, as is LiteRT's custom for what travels along: `unzip` finds
`metadata.json` in it, and `labels.txt` where there are labels.
"""

import json
import os
import zipfile
from pathlib import Path

import numpy as np

from repvgg_jax.export import tensorflow
from repvgg_jax.export.format import Format, Run, Runtime
from repvgg_jax.export.network import Network
from repvgg_jax.proof import TOLERANCE


def write(network: Network, path: Path, dtype: str) -> None:
    """Writes a .tflite file."""
    tf = tensorflow.load()
    module = tensorflow.build(network)
    converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [module.serve.get_concrete_function()], module
    )
    if dtype == "float16":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.target_spec.supported_types = [tf.float16]
    path.write_bytes(converter.convert())
    description = network.description(FORMAT.layout)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("metadata.json", json.dumps(description, indent=2, ensure_ascii=False))
        if labels := description["labels"]:
            archive.writestr("labels.txt", "\n".join(labels) + "\n")


def _open(path: Path, network: Network) -> Run:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=os.cpu_count())
    run = interpreter.get_signature_runner(tensorflow.SIGNATURE)

    def answer(images: np.ndarray) -> np.ndarray:
        return run(**{network.input_name: images})[network.output_name]

    return answer


FORMAT = Format(
    name="tflite",
    filename="model.tflite",
    layout="NHWC",
    write=write,
    packages=("tensorflow",),
    runtimes=(Runtime("ai_edge_litert", _open),),
    tolerances={"float32": TOLERANCE, "float16": 1e-2},
    extra="tf",
)
