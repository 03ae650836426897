"""Classes of image files, by a converted network, a run or a checkpoint file.

python -m repvgg_jax.predict --model deploy cat.jpg photos/
python -m repvgg_jax.predict --model runs/flowers --json 'photos/**/*.png'
"""

import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from repvgg_jax import cli

MODEL = flags.DEFINE_string(
    "model",
    None,
    "A directory that convert.py wrote, a run directory, a checkpoint file or a hub name.",
)
TOP = flags.DEFINE_integer("top", 5, "Classes per image.", lower_bound=1)
JSON = flags.DEFINE_bool("json", False, "Print a list of JSON objects instead of a table.")
STEP = flags.DEFINE_string("step", None, "Of a run: the checkpoint, a number, best or newest.")

_MANY = 256  # images from which constant weights pay for the longer compilation
_EVERY = 1000  # images between two lines of progress


def main(arguments: Sequence[str]) -> int:
    """Classifies; returns the exit status."""
    from repvgg_jax.classifier import find_images

    if MODEL.value is None or len(arguments) < 2:
        raise ValueError(
            "give --model, e.g. the directory that convert.py wrote, and images: files, "
            "directories or patterns"
        )
    paths = find_images(arguments[1:])
    classifier = _open(MODEL.value, STEP.value, constant_weights=len(paths) >= _MANY)
    found = []
    for number, (path, probabilities) in enumerate(classifier.predict_files(paths), 1):
        found.append({"file": os.fspath(path), "top": _top(classifier, probabilities)})
        if number % _EVERY == 0:
            print(f"{number} of {len(paths)} images", file=sys.stderr, flush=True)
    print(json.dumps(found, indent=2) if JSON.value else _table(found))
    return 0


def _open(model: str, step: str | None, *, constant_weights: bool) -> Any:
    """The classifier that `--model` names.

    Raises:
      ValueError: there is none.
    """
    from repvgg_jax.classifier import Classifier, center_crop
    from repvgg_jax.convert.deployed import is_deployment, load_deployed
    from repvgg_jax.convert.source import crop_of, from_weights
    from repvgg_jax.train.restore import load_run, parse_step

    path = pathlib.Path(model)
    is_run = path.is_dir() and not is_deployment(path)
    if step is not None and not is_run:
        raise ValueError(f"--step={step} is for a run directory; --model={model} has no steps")
    if is_deployment(path):
        found = load_deployed(path)
        _check_classes(found.model, model)
        return found.classifier(constant_weights=constant_weights)
    if is_run:
        run = load_run(path, step=parse_step(step))
        network, variables, normalize = run.model, run.variables, run.normalize
        classes, shape, crop = run.classes, run.metadata.eval_shape, crop_of(run.settings.data)
    else:
        source = from_weights(model)
        for note in source.notes:
            print(note, file=sys.stderr)
        network, variables, normalize = source.model, source.variables, source.normalize
        classes, crop = source.labels, source.crop
        height, width, channels = source.images.shape[1:]
        shape = (height, width, channels)
    _check_classes(network, model)
    if not network.deploy:
        variables = network.fuse(variables)
    return Classifier(
        network.clone(deploy=True, dtype=np.float32),
        variables,
        normalize,
        classes,
        shape,
        center_crop(shape, fraction=crop.fraction, background=crop.background, white=crop.white),
        constant_weights,
    )


def _check_classes(network: Any, model: str) -> None:
    from repvgg_jax.segmentation.network import Segmenter

    if isinstance(network, Segmenter):
        raise ValueError(
            f"{model} gives a class to every pixel, and this command tells that of an image; in "
            "Python, load_deployed(…).predict(images) returns (images, height, width, classes)"
        )
    if not network.num_classes:
        raise ValueError(f"{model} has no classifier; it returns pooled features")


def _top(classifier: Any, probabilities: np.ndarray) -> list[dict[str, Any]]:
    labels = np.argsort(-probabilities, kind="stable")[: TOP.value]
    return [
        {"class": name, "probability": float(probabilities[label])}
        for name, label in zip(classifier.names(labels.tolist()), labels, strict=True)
    ]


def _table(found: Sequence[dict[str, Any]]) -> str:
    width = max(len(image["file"]) for image in found)
    return "\n".join(
        f"{image['file']:<{width}}  "
        + "  ".join(f"{each['class']} {each['probability']:.1%}" for each in image["top"])
        for image in found
    )


def run() -> None:
    """Runs the command and exits."""
    cli.run(main, positional=True)


if __name__ == "__main__":
    run()
