"""Fuses a trained network, proves that both forms are equal, and writes it for runtimes.

python convert.py --workdir runs/digits --output deploy
python convert.py --from RepVGG-A0-train.pth --output deploy --format onnx,safetensors
python convert.py --from deploy --output deploy-bytes --format tflite --with-preprocessing
"""

import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from repvgg_jax import cli, files

WORKDIR = flags.DEFINE_string("workdir", None, "Convert a checkpoint of this run.")
STEP = flags.DEFINE_string(
    "step", None, "With --workdir: the checkpoint, by its step, or best, or newest, the default."
)
FROM = flags.DEFINE_string(
    "from",
    None,
    "Or a directory that convert.py wrote, a checkpoint file (.safetensors, .npz, "
    ".pth), or a hub name of timm's. With that directory as --output, formats are added to it.",
)
OUTPUT = flags.DEFINE_string("output", None, "The directory to write.")
FORMAT = flags.DEFINE_list(
    "format",
    ["orbax", "safetensors"],
    "What to write, one or several of orbax, safetensors, stablehlo, onnx, tflite, savedmodel, "
    "torch-official, torch-timm; a dtype may follow, e.g. onnx:float16. See docs/deploy.md.",
)
DATA = flags.DEFINE_string(
    "data",
    None,
    "Images for the proof: a directory with a folder per class, one of records, or as "
    "config.data.source. Default: those of the run, or built-in photographs.",
)
PREPROCESSING = flags.DEFINE_bool(
    "with-preprocessing", False, "Artifacts take uint8 images and return probabilities."
)
OUTPUTS = flags.DEFINE_list(
    "outputs",
    [],
    "Graphs return these feature maps instead of logits, e.g. stage2,stage3,stage4 (stablehlo, "
    "onnx).",
)
DYNAMIC_SIZE = flags.DEFINE_bool(
    "dynamic-size", False, "Graphs take images of any height and width (stablehlo, onnx)."
)
IMAGE_SIZE = flags.DEFINE_list(
    "image-size",
    None,
    "With a checkpoint file of another project: pixels of images, one number or HEIGHT,WIDTH.",
)
CLASSES = flags.DEFINE_string(
    "classes",
    None,
    "With such a file: class names by label, separated by commas, or a file with one per line or "
    "a JSON list.",
)
MEAN = flags.DEFINE_list("mean", None, "With such a file: mean per channel, on the scale 0 to 1.")
STD = flags.DEFINE_list("std", None, "With such a file: standard deviation per channel.")
ENTRY = flags.DEFINE_string(
    "entry", None, "With such a file: key of the state dict if there are several, e.g. ema."
)
TOLERANCE = flags.DEFINE_float(
    "tolerance", 1e-5, "Largest |Δlogit| allowed, relative to the largest |logit|."
)

QUANTIZE = flags.DEFINE_enum(
    "quantize", None, ["int8"], "Also write the network in int8, as ONNX or LiteRT by --format."
)
CALIBRATE = flags.DEFINE_string(
    "calibrate",
    None,
    "With --quantize: images to calibrate with, SOURCE or SOURCE:N: run (the default with "
    "--workdir), a directory of images, or as config.data.source.",
)
TARGET = flags.DEFINE_string(
    "target", "vnni", "With --quantize: what it is for: vnni (x86), tensorrt, arm."
)
CALIBRATOR = flags.DEFINE_string(
    "calibrator",
    "mse",
    "With --quantize: max, percentile, entropy or mse; trained, the default for a run of "
    "quantization-aware training, for the ranges that it has found.",
)
PERCENTILE = flags.DEFINE_float("percentile", 99.99, "Of --calibrator percentile.")
FLOAT_LAYERS = flags.DEFINE_list(
    "float-layers", [], "With --quantize: layers that stay in float, e.g. stem,head or stage4_*."
)
EQUALIZE = flags.DEFINE_bool(
    "equalize",
    None,
    "With --quantize: scale channels between layers first; default: if that lowers the error of "
    "logits on calibration images.",
)
BIAS_CORRECTION = flags.DEFINE_bool(
    "bias-correction",
    None,
    "With --quantize: correct the means of channels by their biases; the same default.",
)

_OF_INT8 = {
    "calibrate": CALIBRATE,
    "target": TARGET,
    "calibrator": CALIBRATOR,
    "percentile": PERCENTILE,
    "float-layers": FLOAT_LAYERS,
    "equalize": EQUALIZE,
    "bias-correction": BIAS_CORRECTION,
}

COMMAND = "python convert.py"
GROUPS = {
    "What to convert": ("workdir", "step", "from"),
    "What to write": (
        "output", "format", "with-preprocessing", "outputs", "dynamic-size",
    ),
    "The proof": ("data", "tolerance"),
    "Int8": ("quantize", *_OF_INT8),
    "What a checkpoint file does not say": ("image-size", "classes", "mean", "std", "entry"),
}  # fmt: skip

_OF_A_FILE = {
    "image-size": IMAGE_SIZE,
    "classes": CLASSES,
    "mean": MEAN,
    "std": STD,
    "entry": ENTRY,
}


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
    if workdir is not None and (given := [n for n, f in _OF_A_FILE.items() if f.value is not None]):
        raise ValueError(
            f"--{given[0]} is for checkpoint files, --from; the run in {workdir} has it"
        )
    if weights is not None and STEP.value is not None:
        raise ValueError(f"--step={STEP.value} is for a run, --workdir; --from={weights} has none")
    if QUANTIZE.value is None and (given := [n for n, f in _OF_INT8.items() if f.present]):
        raise ValueError(f"--{given[0]} is for --quantize int8, which is not given")
    if OUTPUT.value is None:
        raise ValueError("give --output, the directory to write")
    from repvgg_jax.convert.output import Output
    from repvgg_jax.convert.pipeline import convert, steps
    from repvgg_jax.convert.source import Facts, from_run, from_weights
    from repvgg_jax.export import parse_targets
    from repvgg_jax.progress import progress
    from repvgg_jax.train.restore import parse_step

    targets = parse_targets(FORMAT.value)
    if PREPROCESSING.value and not any(target.format.holds_graph for target in targets):
        raise ValueError(
            f"--with-preprocessing has an effect on graphs only, e.g. --format onnx, not on "
            f"{', '.join(FORMAT.value)}"
        )
    int8 = _int8(workdir)
    output = Output(pathlib.Path(OUTPUT.value))
    if workdir is not None:
        step = parse_step(STEP.value)
        network = from_run(pathlib.Path(workdir), step=step, data=DATA.value)
    else:
        assert weights is not None
        facts = Facts(
            image_size=_size(IMAGE_SIZE.value),
            classes=_names(CLASSES.value),
            mean=_numbers("mean", MEAN.value),
            std=_numbers("std", STD.value),
            entry=ENTRY.value,
        )
        network = from_weights(weights, facts, data=DATA.value, output=output.path)
    with progress("converting", steps(targets, int8), "steps") as advance:
        done = convert(
            network,
            output,
            targets=targets,
            tolerance=TOLERANCE.value,
            with_preprocessing=(
                PREPROCESSING.value if PREPROCESSING.present else network.with_preprocessing
            ),
            feature_maps=OUTPUTS.value,
            dynamic_size=DYNAMIC_SIZE.value,
            int8=int8,
            advance=advance,
        )
    print(done.table())
    return 0


def _int8(workdir: str | None) -> Any:
    """What `--quantize` and the flags beside it ask for; None without it."""
    if QUANTIZE.value is None:
        return None
    from repvgg_jax.convert.calibration import RUN, Calibrate
    from repvgg_jax.convert.int8 import Int8
    from repvgg_jax.export import INT8_FORMATS
    from repvgg_jax.quantization import Settings

    if workdir is None and CALIBRATE.value is None:
        raise ValueError(
            "--quantize int8 takes images to calibrate with; give --calibrate, a directory of "
            "images or a data set, e.g. --calibrate /images:256"
        )
    if PERCENTILE.present and CALIBRATOR.value != "percentile":
        raise ValueError(
            f"--percentile={PERCENTILE.value} is for --calibrator percentile, not "
            f"{CALIBRATOR.value}; give both"
        )
    asked = {text.partition(":")[0] for text in FORMAT.value}
    return Int8(
        Calibrate.parse(RUN if CALIBRATE.value is None else CALIBRATE.value),
        Settings(
            target=TARGET.value,
            calibrator=CALIBRATOR.value,
            percentile=PERCENTILE.value,
            float_layers=tuple(FLOAT_LAYERS.value),
            equalize=EQUALIZE.value,
            bias_correction=BIAS_CORRECTION.value,
        ),
        tuple(name for name in INT8_FORMATS if name in asked) or ("onnx",),
        calibrator_given=CALIBRATOR.present > 0,
    )


def _size(values: Sequence[str] | None) -> Any:
    """The value of `--image-size`, for `parse_size`."""
    if values is None:
        return None
    numbers = tuple(int(value) if value.isdecimal() else value for value in values)
    return numbers[0] if len(numbers) == 1 else numbers


def _numbers(name: str, values: Sequence[str] | None) -> tuple[float, ...] | None:
    if values is None:
        return None
    try:
        return tuple(map(float, values))
    except ValueError as error:
        raise ValueError(
            f"--{name}={','.join(values)} must be numbers separated by commas, one per channel"
        ) from error


def _names(text: str | None) -> tuple[str, ...] | None:
    """Class names of `--classes`: a list, or a file."""
    if text is None:
        return None
    path = pathlib.Path(text)
    if not path.is_file():
        if "," not in text:
            raise ValueError(f"--classes={text} is neither a file nor names separated by commas")
        return tuple(name.strip() for name in text.split(","))
    content = path.read_text()
    names: Any = content.splitlines()
    if content.lstrip().startswith("["):
        try:
            names = files.parse_json(content)
        except ValueError as error:
            raise ValueError(f"--classes={text} is not a JSON list: {error}") from error
    return tuple(str(name).strip() for name in names if str(name).strip())


def run() -> None:
    """Runs the command and exits."""
    cli.run(main)
