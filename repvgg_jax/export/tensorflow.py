"""TensorFlow: SavedModel and LiteRT (.tflite), built from TensorFlow's own operators.

NHWC, like the JAX model, so nothing is transposed. Plain operators instead of an embedded XLA
module: every converter and server can read and optimize them. Both take any batch size through
the signature `serving_default`.

A SavedModel describes the network in `assets.extra/metadata.json`. A .tflite file is also a zip
archive, as LiteRT's metadata tools expect: `unzip` extracts `metadata.json`, and `labels.txt` if
there are labels.
"""

import json
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from repvgg_jax.export import operators
from repvgg_jax.export.decompose import decompose
from repvgg_jax.export.format import Format, Run, Runtime
from repvgg_jax.export.network import Network
from repvgg_jax.proof import TOLERANCE
from repvgg_jax.text import encodable

SIGNATURE = "serving_default"


def load() -> Any:
    """TensorFlow, without its log and without claiming the accelerators that JAX is using."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # only effective before the first import
    import tensorflow as tf

    if tf.config.get_visible_devices("GPU"):
        tf.config.set_visible_devices([], "GPU")
    return tf


Translated = tuple[Callable[..., Any], list[Any]]
"""A function of a value and of variables, and these variables."""


def build(network: Network, translate: Callable[..., Translated] | None = None) -> Any:
    """A `tf.Module` with the weights as variables and a `tf.function` called `serve`.

    Args:
      network: what it computes.
      translate: maps an operator, TensorFlow and what is remembered while `serve` is traced to a
        function and its variables; default: as the operator is.
    """
    tf = load()
    module = tf.Module(name="repvgg")
    kept: dict[str, Any] = {}  # what is remembered while `serve` is traced
    layers = [
        (translate or translate_operator)(operator, tf, kept)
        for operator in decompose(network)
        if not isinstance(operator, operators.Output)  # the last one is the only output
    ]
    module.weights = [variable for _, variables in layers for variable in variables]

    def serve(images: Any) -> dict[str, Any]:
        x = images
        if network.with_preprocessing:
            normalize = network.normalize
            x = (tf.cast(x, tf.float32) - normalize.offset) * normalize.factor
        for function, variables in layers:
            x = function(x, *variables)
        return {network.output_name: x}

    spec = tf.TensorSpec((None, *network.image_shape), network.images.dtype, network.input_name)
    module.serve = tf.function(serve, input_signature=[spec])
    return module


def translate_operator(operator: Any, tf: Any, kept: dict[str, Any]) -> Translated:
    """An operator as a function of its input and its variables."""
    match operator:
        case operators.Conv():
            (above, left), stride, dilation = operator.padding, operator.stride, operator.dilation
            # At stride 1 "SAME" is this very padding, and needs no operator of its own.
            explicit = [(0, 0), (above, above), (left, left), (0, 0)]
            padding = "SAME" if stride == 1 else explicit

            def conv(x: Any, kernel: Any, bias: Any) -> Any:
                x = tf.nn.conv2d(x, kernel, stride, padding, dilations=dilation, name=operator.name)
                return tf.nn.bias_add(x, bias)

            return conv, variables_of(tf, operator.kernel, operator.bias)
        case operators.Activation(kind):
            return {"relu": tf.nn.relu, "silu": tf.nn.silu, "gelu": tf.nn.gelu}[kind], []
        case operators.Gate(_, reduce, expand):

            def gate(x: Any, *variables: Any) -> Any:
                y = tf.reduce_mean(x, (1, 2), keepdims=True)
                y = tf.nn.relu(pointwise(tf, y, *variables[:2]))
                return x * tf.sigmoid(pointwise(tf, y, *variables[2:]))

            return gate, variables_of(tf, reduce.kernel, reduce.bias, expand.kernel, expand.bias)
        case operators.Pool():
            return lambda x: tf.reduce_mean(x, (1, 2)), []
        case operators.Linear():
            return (
                lambda x, kernel, bias: tf.nn.bias_add(tf.matmul(x, kernel), bias),
                variables_of(tf, operator.kernel, operator.bias),
            )
        case operators.Softmax():
            return tf.nn.softmax, []
        case operators.Keep(name):

            def keep(x: Any) -> Any:
                kept[name] = x
                return x

            return keep, []
        case operators.Take(name):
            return lambda x: kept[name], []
        case operators.Add(name):
            return lambda x: x + kept[name], []
        case operators.Join(names):
            return lambda x: tf.concat([kept[name] for name in names], axis=-1), []
        case operators.MaxPool():
            # Behind a ReLU, where zeros are as good a border as minus infinity.
            border = [(0, 0), (1, 1), (1, 1), (0, 0)]
            return lambda x: tf.nn.max_pool2d(tf.pad(x, border), 3, 2, "VALID"), []
        case operators.Resample(_, rows, columns):
            return _resample(tf, rows, columns), []
        case operators.Widen():
            return lambda x: x, []
    raise AssertionError(operator)


def _resample(tf: Any, rows: np.ndarray, columns: np.ndarray) -> Callable[[Any], Any]:
    """Multiplies both spatial axes by matrices, without any transposition."""
    height, width = len(rows), len(columns)

    def resample(x: Any) -> Any:
        _, before, across, channels = x.shape
        x = tf.matmul(tf.constant(rows)[None], tf.reshape(x, (-1, before, across * channels)))
        x = tf.matmul(tf.constant(columns)[None], tf.reshape(x, (-1, across, channels)))
        return tf.reshape(x, (-1, height, width, channels))

    return resample


def variables_of(tf: Any, *values: np.ndarray) -> list[Any]:
    """Arrays as variables."""
    return [tf.Variable(value) for value in values]


def pointwise(tf: Any, x: Any, kernel: Any, bias: Any) -> Any:
    """A linear layer on a single pixel: as a convolution it needs no reshape."""
    return tf.nn.bias_add(tf.nn.conv2d(x, kernel[None, None], 1, "VALID"), bias)


def write_savedmodel(network: Network, path: Path, dtype: str) -> None:
    """Writes a SavedModel directory; `dtype` is float32."""
    tf = load()
    module = build(network)
    tf.saved_model.save(module, str(path), {SIGNATURE: module.serve})
    extra = path / "assets.extra"
    extra.mkdir()
    description = _json(network.description(SAVEDMODEL.layout))
    (extra / "metadata.json").write_text(description + "\n", encoding="utf-8")


def _open_savedmodel(path: Path, network: Network) -> Run:
    tf = load()
    serve = tf.saved_model.load(str(path)).signatures[SIGNATURE]

    def run(images: np.ndarray) -> np.ndarray:
        return serve(**{network.input_name: tf.constant(images)})[network.output_name].numpy()

    return run


SAVEDMODEL = Format(
    name="savedmodel",
    filename="savedmodel",
    write=write_savedmodel,
    packages=("tensorflow",),
    segmenters=True,
    tolerances={"float32": TOLERANCE},
    runtimes=(Runtime("tensorflow", _open_savedmodel),),
    marker="saved_model.pb",
    extra="tf",
)


def write_tflite(network: Network, path: Path, dtype: str) -> None:
    """Writes a .tflite file.

    In float16 the weights are stored as float16: half the file, computed in float16 by GPU
    delegates and in float32 by processors.
    """
    tf = load()
    module = build(network)
    converter = converter_of(module, tf)
    if dtype == "float16":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.target_spec.supported_types = [tf.float16]
    path.write_bytes(converter.convert())
    describe(path, network, network.description(TFLITE.layout))


def converter_of(module: Any, tf: Any) -> Any:
    """A converter of what `build` returns."""
    return tf.lite.TFLiteConverter.from_concrete_functions(
        [module.serve.get_concrete_function()], module
    )


def describe(path: Path, network: Network, description: Mapping[str, Any]) -> None:
    """Adds the description to a .tflite file, and the labels."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("metadata.json", _json(description))
        if network.labels:
            archive.writestr("labels.txt", encodable("\n".join(network.labels)) + "\n")


def _json(description: Mapping[str, Any]) -> str:
    return encodable(json.dumps(description, indent=2, ensure_ascii=False))


def _open_tflite(path: Path, network: Network) -> Run:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=os.cpu_count())
    run = interpreter.get_signature_runner(SIGNATURE)

    def answer(images: np.ndarray) -> np.ndarray:
        return run(**{network.input_name: images})[network.output_name]

    return answer


TFLITE = Format(
    name="tflite",
    filename="model.tflite",
    write=write_tflite,
    packages=("tensorflow",),
    segmenters=True,
    tolerances={"float32": TOLERANCE, "float16": 1e-2},
    runtimes=(Runtime("ai_edge_litert", _open_tflite),),
    extra="tf",
)
