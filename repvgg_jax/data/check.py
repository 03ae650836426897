"""Reads every image of a data set once, and prints what would stop a run.

python -m repvgg_jax.data.check --source folder:flowers
"""

import os
from collections.abc import Sequence
from typing import Any

from absl import flags

from repvgg_jax import cli

SOURCE = flags.DEFINE_string("source", None, "The data, as config.data.source: folder:DIRECTORY …")
# The others are settings of the run: what it sets must be given here, too.
DIRECTORY = flags.DEFINE_string(
    "directory", None, "Where TFDS prepared tfds:NAME (config.data.directory)."
)
TRAIN_SPLIT = flags.DEFINE_string(
    "train_split", None, "Split or folder to train on (config.data.train_split)."
)
EVAL_SPLIT = flags.DEFINE_string(
    "eval_split", None, "Split or folder to evaluate on (config.data.eval_split)."
)
MASK = flags.DEFINE_string(
    "mask", None, "Feature of tfds:NAME that holds a class per pixel (config.data.mask)."
)
NUM_CLASSES = flags.DEFINE_integer(
    "num_classes", None, "Number of classes to expect (config.data.num_classes)."
)
ALLOW_EMPTY = flags.DEFINE_bool(
    "allow_empty", False, "Allow classes without images (config.data.allow_empty)."
)
MAX_PIXELS = flags.DEFINE_integer(
    "max_pixels",
    None,
    "Height times width of the largest image that is decoded (config.data.max_pixels).",
    lower_bound=1,
)
WHITE = flags.DEFINE_float(
    "white",
    None,
    "Value that becomes 255 in images of more than 8 bits (config.data.white).",
    lower_bound=0,
)
THREADS = flags.DEFINE_integer("threads", 0, "Number of threads; 0: one per core.", lower_bound=0)


GROUPS = {
    "The data": (
        "source", "directory", "train_split", "eval_split", "mask", "num_classes", "allow_empty",
        "max_pixels", "white",
    ),
    "Speed": ("threads",),
}  # fmt: skip


def main(_: Sequence[str]) -> int:
    """Checks; the exit status is 1 if something would stop a run."""
    from repvgg_jax.data.dataset import decoder_of, load
    from repvgg_jax.data.settings import DataSettings
    from repvgg_jax.data.survey import problem_lines, survey

    if SOURCE.value is None:
        raise ValueError("give --source, as config.data.source, e.g. --source=folder:flowers")
    given: dict[str, Any] = {
        flag.name: flag.value
        for flag in (
            SOURCE,
            DIRECTORY,
            TRAIN_SPLIT,
            EVAL_SPLIT,
            MASK,
            NUM_CLASSES,
            MAX_PIXELS,
            WHITE,
        )
        if flag.value is not None
    }
    # Classes without images are named among everything else, not instead of it.
    settings = DataSettings(**given, train_size=224, allow_empty=True)
    report = survey(
        load(settings),
        decoder=decoder_of(settings),
        threads=THREADS.value or os.cpu_count() or 1,
        allow_empty=ALLOW_EMPTY.value,
    )
    print("\n".join(report.lines))
    if not report.problems:
        print("nothing in these images would stop a run")
        return 0
    print(f"would stop a run ({len(report.problems):,}):")
    print("\n".join(f"  {line}" for line in problem_lines(report.problems)))
    return 1


if __name__ == "__main__":
    cli.run(main)
