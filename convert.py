"""Fuses a trained RepVGG, proves the fused network equal and writes it for its runtimes.

python convert.py --workdir runs/digits --output deploy
python convert.py --from RepVGG-A0-train.pth --output deploy --format onnx,safetensors
"""

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
    "with-preprocessing", False, "Artefacts take uint8 images and give probabilities."
)
IMAGE_SIZE = flags.DEFINE_integer(
    "image-size", 224, "With --from: height and width of the images, in pixels."
)
TOLERANCE = flags.DEFINE_float(
    "tolerance", 1e-5, "Largest |Δlogit| allowed, relative to the largest |logit|."
)


def main(_: Sequence[str]) -> int:
    """Converts; returns the exit status."""
    if OUTPUT.value is None or (WORKDIR.value is None) == (FROM.value is None):
        raise ValueError(
            "give --workdir, the directory of a training run, or --from, a checkpoint file, "
            "and --output, the directory to write"
        )
    from repvgg_jax.convert import deployed as deployment
    from repvgg_jax.convert import source as origin
    from repvgg_jax.convert.pipeline import convert

    output = pathlib.Path(OUTPUT.value)
    deployment.check_formats(FORMAT.value)
    deployment.check_free(output)
    if WORKDIR.value is not None:
        network = origin.from_run(pathlib.Path(WORKDIR.value))
    else:
        network = origin.from_weights(FROM.value, image_size=IMAGE_SIZE.value)
    done = convert(
        network,
        output,
        formats=FORMAT.value,
        tolerance=TOLERANCE.value,
        with_preprocessing=PREPROCESSING.value,
    )
    print(done.table())
    return 0


if __name__ == "__main__":
    cli.run(main)
