"""Classes of image files, or of their pixels, by a converted network, a run or a checkpoint file.

python -m repvgg_jax.predict --model deploy cat.jpg photos/
python -m repvgg_jax.predict --model runs/flowers --json 'photos/**/*.png'
python -m repvgg_jax.predict --model deploy-scenes --output masks street.png
python -m repvgg_jax.predict --model deploy --runtime onnxruntime cat.jpg
"""

import collections
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags

from repvgg_jax import cli
from repvgg_jax.segmentation.network import Segmenter
from repvgg_jax.text import first_few

MODEL = flags.DEFINE_string(
    "model",
    None,
    "A directory that convert.py wrote, a run directory, a checkpoint file or a hub name.",
)
TOP = flags.DEFINE_integer("top", 5, "Classes per image.", lower_bound=1)
JSON = flags.DEFINE_bool("json", False, "Print a list of JSON objects instead of a table.")
OUTPUT = flags.DEFINE_string(
    "output", None, "Of a segmenter: the directory for a mask and an overlay of every image."
)
RUNTIME = flags.DEFINE_string(
    "runtime",
    None,
    "Of a directory that convert.py wrote: run its artifact by onnxruntime, openvino, "
    "ai_edge_litert, tensorflow, or jax (StableHLO), instead of the JAX model; a dtype may follow, "
    "e.g. onnxruntime:float16.",
)
STEP = flags.DEFINE_string("step", None, "Of a run: the checkpoint, a number, best or newest.")

ARGUMENTS = "IMAGE|DIRECTORY|PATTERN…"
GROUPS = {
    "The network": ("model", "step", "runtime"),
    "The output": ("top", "json", "output"),
}

_MANY = 256  # images from which constant weights pay for the longer compilation


def main(arguments: Sequence[str]) -> int:
    """Classifies; returns the exit status."""
    from repvgg_jax.classifier import find_images
    from repvgg_jax.progress import progress

    if MODEL.value is None or len(arguments) < 2:
        raise ValueError(
            "give --model, e.g. the directory that convert.py wrote, and images: files, "
            "directories or patterns"
        )
    paths = find_images(arguments[1:])
    classifier = _open(MODEL.value, STEP.value, constant_weights=len(paths) >= _MANY)
    found = []
    with progress("predicting", len(paths)) as advance:
        for row in _rows(classifier, paths):
            found.append(row)
            advance()
    print(json.dumps(found, indent=2) if JSON.value else _table(found))
    return 0


def _rows(classifier: Any, paths: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What is said of every image."""
    if isinstance(classifier.model, Segmenter):
        if OUTPUT.value is None:
            raise ValueError(
                f"{MODEL.value} is a segmenter: give --output, the directory for its masks"
            )
        stems = [pathlib.Path(path).stem for path in paths]
        numbers = collections.Counter(stems)
        if twice := sorted({stem for stem in stems if numbers[stem] > 1}):
            raise ValueError(
                f"images of the same name would write the same masks: {first_few(twice)}; give "
                "them in several calls"
            )
        output = pathlib.Path(OUTPUT.value)
        output.mkdir(parents=True, exist_ok=True)
        for path in paths:
            yield {"file": path, **_segment(classifier, path, output)}
        return
    if OUTPUT.value is not None:
        raise ValueError(f"--output={OUTPUT.value} is for segmenters; {MODEL.value} has no masks")
    for path, probabilities in classifier.predict_files(paths):
        yield {"file": os.fspath(path), "top": _top(classifier, probabilities)}


def _segment(classifier: Any, path: str, output: pathlib.Path) -> dict[str, Any]:
    """Writes an image's mask and overlay; their names, and the share of every class found."""
    masks, overlays, mask = classifier.write_mask(path, output)
    labels, counts = np.unique(mask, return_counts=True)
    order = np.argsort(-counts, kind="stable")[: TOP.value]
    top = [
        {"class": name, "share": float(counts[i] / mask.size)}
        for name, i in zip(classifier.names(labels[order].tolist()), order, strict=True)
    ]
    return {"mask": str(masks), "overlay": str(overlays), "top": top}


def _open(model: str, step: str | None, *, constant_weights: bool) -> Any:
    """The classifier that `--model` names.

    Raises:
      ValueError: there is none.
    """
    from repvgg_jax.classifier import Classifier, center_crop
    from repvgg_jax.convert.deployed import load_deployed
    from repvgg_jax.convert.metadata import is_deployment
    from repvgg_jax.convert.source import crop_of, from_weights
    from repvgg_jax.train.restore import load_run, parse_step

    path = pathlib.Path(model)
    is_run = path.is_dir() and not is_deployment(path)
    if step is not None and not is_run:
        raise ValueError(f"--step={step} is for a run directory; --model={model} has no steps")
    if RUNTIME.value is not None and not is_deployment(path):
        raise ValueError(
            f"--runtime={RUNTIME.value} is for a directory that convert.py wrote, not {model}"
        )
    if is_deployment(path):
        found = load_deployed(path)
        _check_classes(found.model, model)
        return found.classifier(constant_weights=constant_weights, runtime=RUNTIME.value)
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
        center_crop(shape, **dataclasses.asdict(crop)),
        constant_weights,
    )


def _check_classes(network: Any, model: str) -> None:
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
        + "  ".join(
            f"{each['class']} {each.get('probability', each.get('share')):.1%}"
            for each in image["top"]
        )
        for image in found
    )


def run() -> None:
    """Runs the command and exits."""
    cli.run(main, positional=True, logs_aside=True)


if __name__ == "__main__":
    run()
