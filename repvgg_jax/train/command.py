"""Trains a network, resumes a run that was interrupted, or evaluates one.

python train.py --config b1 --workdir runs/b1 --config.data.source=folder:/data/imagenet
python train.py --config my_recipe.py --workdir runs/mine --config.train.epochs=5
python train.py --workdir runs/mine --eval_only --step best
python train.py --config digits --eval_only --init_from deploy/model.safetensors
python train.py --config b1 --compile_only v5e:2x4
"""

import functools
import logging
import pathlib
import signal
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from repvgg_jax import cli
from repvgg_jax.train.config import (
    CHECKED_FLAGS,
    RecipeParser,
    check_flags,
    default_recipe,
    find_recipe,
    recipes,
)

logger = logging.getLogger(__name__)

CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "The recipe: its path, a name of those in the package, e.g. b1, or a run directory. "
    "--config.section.name=value overrides a setting. Default: the run that is resumed or "
    "evaluated, or that --init_from names; else, for train.py, digits.",
)
flags.FLAGS["config"].parser = RecipeParser()
WORKDIR = flags.DEFINE_string("workdir", None, "The run directory; default: runs/RECIPE.")
DISTRIBUTED = flags.DEFINE_string(
    "distributed",
    None,
    "HOST:PORT,PROCESSES,PROCESS of a run of several processes: address of process 0, number of "
    "processes, index of this one. Detected on TPU pods, SLURM and Kubernetes, and for mpirun and "
    "torchrun on one machine.",
)
DISTRIBUTED_TIMEOUT = flags.DEFINE_integer(
    "distributed_timeout", 300, "Seconds to wait for all processes.", lower_bound=1
)
INIT_FROM = flags.DEFINE_string(
    "init_from",
    None,
    "A run directory, a weights file, a hub name or a directory that convert.py wrote: what "
    "training starts from (as --config.init_from), or what --eval_only evaluates.",
)
EVAL_ONLY = flags.DEFINE_bool(
    "eval_only",
    False,
    "Evaluate the run in --workdir, or what --init_from names, in both forms; no training.",
)
BY_CLASS = flags.DEFINE_bool(
    "by_class", False, "With --eval_only: also the accuracy of each class."
)
STEP = flags.DEFINE_string(
    "step", None, "With --eval_only: the checkpoint, by its step, or best, or newest, the default."
)
ENTRY = flags.DEFINE_string(
    "entry", None, "With --init_from: key in a weights file that holds several, e.g. ema."
)
OTHER_DATA = flags.DEFINE_bool(
    "other_data",
    False,
    "Resume or evaluate with data other than the run's: classes are matched by their names. "
    "Without it, other classes are refused, and so is resuming with other images.",
)
EXTEND = flags.DEFINE_bool(
    "extend",
    False,
    "Resume with another config.train.epochs or batch_size: the run goes on where it is, with the "
    "learning rates of a run that had them from its start; or with another accumulate or remat.",
)
OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "With --eval_only: the directory for evaluation.json, the confusion matrix and the worst "
    "images; default: that of the run.",
)
CLASS_MAP = flags.DEFINE_string(
    "class_map",
    None,
    "With --eval_only: how classes of the data become those of the network: numbers, if they are "
    'named by label as in ImageNet-V2, or a JSON file, e.g. {"tabby": "n02123045"}.',
)
REAL_LABELS = flags.DEFINE_string(
    "real_labels",
    None,
    "With --eval_only: sets of labels by image, e.g. real.json of ImageNet-ReaL; adds "
    "real_accuracy.",
)
PROFILE_STEPS = flags.DEFINE_string(
    "profile_steps", "", "FIRST:END, steps to write a trace of; 10:20 traces 10 to 19."
)
COMPILE_ONLY = flags.DEFINE_string(
    "compile_only",
    None,
    "Compile the train step for a TPU slice, e.g. v5e:16x16, or for GPUs, e.g. h100x8, print what "
    "it takes, and stop. Needs neither these devices nor data.",
)
COMPILE_TIMEOUT = flags.DEFINE_integer(
    "compile_timeout", 1800, "Seconds after which --compile_only gives up.", lower_bound=1
)


COMMAND = "python train.py"
GROUPS = {
    "The run": ("config", "workdir", "init_from", "entry", "extend", "other_data"),
    "Evaluating": ("eval_only", "step", "by_class", "output", "class_map", "real_labels"),
    "Several processes": ("distributed", "distributed_timeout"),
    "Speed": ("profile_steps", "compile_only", "compile_timeout"),
}


def main(_: Sequence[str]) -> int:
    """Trains, or evaluates; returns the exit status."""
    import jax

    from repvgg_jax.cluster.initialize import initialized
    from repvgg_jax.train.evaluate import evaluate_only
    from repvgg_jax.train.hooks import parse_steps
    from repvgg_jax.train.loop import train
    from repvgg_jax.train.restore import parse_step, run_directory

    check_flags({name: flags.FLAGS[name].value for name in CHECKED_FLAGS})
    recipe = _recipe()
    if COMPILE_ONLY.value is not None:
        from repvgg_jax.train.aot import compile_ahead

        print(compile_ahead(CONFIG.value, COMPILE_ONLY.value, timeout=COMPILE_TIMEOUT.value))
        return 0
    file = recipe.partition(":")[0]
    stem = (find_recipe(file) or pathlib.Path(file)).stem
    workdir, init_from = WORKDIR.value or pathlib.Path("runs", stem), INIT_FROM.value
    with initialized(DISTRIBUTED.value, timeout=DISTRIBUTED_TIMEOUT.value, explain=cli.explain):
        if EVAL_ONLY.value:
            result = evaluate_only(
                CONFIG.value,
                workdir,
                init_from=init_from,
                init_entry=ENTRY.value,
                step=parse_step(STEP.value),
                other_data=OTHER_DATA.value,
                class_map=CLASS_MAP.value,
                real_labels=REAL_LABELS.value,
            )
            if jax.process_index() == 0:
                print("\n".join(result.lines(by_class=BY_CLASS.value)))
                _write(result, OUTPUT.value or run_directory(init_from or workdir))
            return 0
        steps = parse_steps(PROFILE_STEPS.value)
        outcome = train(
            CONFIG.value,
            workdir,
            init_from=init_from,
            init_entry=ENTRY.value,
            other_data=OTHER_DATA.value,
            extend=EXTEND.value,
            profile_steps=steps,
            recipe=recipe,
        )
    # A preempted run did what it was asked to; after Ctrl-C, shells expect 128 + its number.
    return 128 + signal.SIGINT if outcome.stopped_by == signal.SIGINT else 0


def _write(result: Any, directory: Any) -> None:
    """Writes what was found; a run whose directory cannot be written can still be evaluated."""
    if directory is None:
        return
    path = pathlib.Path(getattr(directory, "path", directory))
    try:
        written = result.write(path)
    except OSError as error:
        if OUTPUT.value is not None:
            raise
        logger.warning("%s cannot be written: %s; --output names another directory", path, error)
        return
    logger.info("written to %s: %s", path, ", ".join(file.name for file in written))


def defaults(arguments: Sequence[str], recipe: str | None = None) -> Mapping[str, str]:
    """Flags to add if they are not given: `--config`.

    Args:
      arguments: the command line.
      recipe: `--config` of a new run.
    """
    found = default_recipe(arguments, recipe)
    return {} if found is None else {"config": found}


def _recipe() -> str:
    """What `--config` is, given or not."""
    flag = flags.FLAGS["config"]
    if not flag.present:
        raise ValueError(
            "give --config, a recipe by its path or its name, or a run directory; recipes by name: "
            f"{', '.join(recipes())}"
        )
    return config_flags.get_config_filename(flag)


def run(recipe: pathlib.Path | None = None) -> None:
    """Runs the command and exits.

    Args:
      recipe: default of `--config` for a new run.
    """
    cli.run(main, functools.partial(defaults, recipe=None if recipe is None else str(recipe)))
