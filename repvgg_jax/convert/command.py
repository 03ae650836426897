"""The command `convert.py`, and `repvgg-convert` of an installed package."""

import pathlib
from collections.abc import Sequence

from absl import flags

from repvgg_jax import cli

WORKDIR = flags.DEFINE_string("workdir", None, "Convert the newest checkpoint of this run.")
FROM = flags.DEFINE_string(
    "from",
    None,
    "Or a directory that convert.py wrote, a checkpoint file (.safetensors, .npz, "
    ".pth), or a hub name of timm's.",
)
OUTPUT = flags.DEFINE_string("output", None, "The directory to write.")
FORMAT = flags.DEFINE_list(
    "format",
    ["orbax", "safetensors"],
    "What to write, one or several of orbax, safetensors, stablehlo, onnx, tflite, savedmodel, "
    "torch-official, torch-timm; a dtype may follow, e.g. onnx:float16. See docs/deploy.md.",
)
PREPROCESSING = flags.DEFINE_bool(
    "with-preprocessing", False, "Artifacts take uint8 images and return probabilities."
)
IMAGE_SIZE = flags.DEFINE_integer(
    "image-size", 224, "With --from and a file or name: height and width of images."
)
TOLERANCE = flags.DEFINE_float(
    "tolerance", 1e-5, "Largest |Δlogit| allowed, relative to the largest |logit|."
)


def main(_: Sequence[str]) -> int:
    """Converts; returns the exit status."""
    workdir, weights = WORKDIR.value, FROM.value
    if workdir is None and weights is None:
        raise ValueError(
            "nothing to convert: give --workdir, the directory of a training run, or --from, a "
            "checkpoint file or an earlier conversion; and --output, the directory to write"
        )
    if workdir is not None and weights is not None:
        raise ValueError(f"give --workdir={workdir} or --from={weights}, not both")
    if OUTPUT.value is None:
        raise ValueError("give --output, the directory to write")
    if (
        weights is not None
        and pathlib.Path(weights).resolve() == pathlib.Path(OUTPUT.value).resolve()
    ):
        raise ValueError(
            f"--output={OUTPUT.value} would replace the directory that --from reads; choose "
            "another --output"
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
