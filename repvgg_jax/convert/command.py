"""The command `convert.py`, and `repvgg-convert` of an installed package."""

import pathlib
from collections.abc import Sequence

from absl import flags

from repvgg_jax import cli

WORKDIR = flags.DEFINE_string("workdir", None, "Convert the newest checkpoint of this run.")
FROM = flags.DEFINE_string(
    "from", None, "Or this checkpoint: .safetensors, .npz, .pth, or a hub name of timm's."
)
OUTPUT = flags.DEFINE_string("output", None, "The directory to write.")
FORMAT = flags.DEFINE_list(
    "format", ["orbax", "safetensors"], "What to write, one or several; see docs/deploy.md."
)
PREPROCESSING = flags.DEFINE_bool(
    "with-preprocessing", False, "Artifacts take uint8 images and return probabilities."
)
IMAGE_SIZE = flags.DEFINE_integer(
    "image-size", 224, "With --from: height and width of the images, in pixels."
)
TOLERANCE = flags.DEFINE_float(
    "tolerance", 1e-5, "Largest |Δlogit| allowed, relative to the largest |logit|."
)


def main(_: Sequence[str]) -> int:
    """Converts; returns the exit status."""
    workdir, weights = WORKDIR.value, FROM.value
    if OUTPUT.value is None or (workdir is None) == (weights is None):
        raise ValueError(
            "give --workdir, the directory of a training run, or --from, a checkpoint file, "
            "and --output, the directory to write"
        )
    from repvgg_jax.convert.deployed import Output
    from repvgg_jax.convert.pipeline import convert, from_run, from_weights
    from repvgg_jax.export import parse_targets

    targets = parse_targets(FORMAT.value)
    output = Output(pathlib.Path(OUTPUT.value))
    if workdir is not None:
        network = from_run(pathlib.Path(workdir))
    else:
        assert weights is not None
        network = from_weights(weights, image_size=IMAGE_SIZE.value)
    done = convert(
        network,
        output,
        targets=targets,
        tolerance=TOLERANCE.value,
        with_preprocessing=PREPROCESSING.value,
    )
    print(done.table())
    return 0


def run() -> None:
    """Runs the command and exits."""
    cli.run(main)
