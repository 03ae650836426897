"""Trains a RepVGG, continues a run that was interrupted, or evaluates one.

python train.py --config configs/digits.py --workdir runs/digits --config.train.epochs=5
python train.py --config configs/digits.py --workdir runs/digits --eval_only --by_class
python train.py --config configs/digits.py --eval_only --init_from deploy/model.safetensors
"""

import pathlib
import signal
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from repvgg_jax import cli

RECIPES = pathlib.Path(__file__).resolve().parent / "configs"

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The recipe; --config.section.name=value overrides. By default digits.py."
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run's directory; runs/RECIPE where none is given."
)
DISTRIBUTED = flags.DEFINE_string(
    "distributed",
    None,
    "HOST:PORT,PROCESSES,PROCESS of a run of many processes: where process 0 is, how many there "
    "are, which one this is. TPU pods, SLURM and Kubernetes say so by themselves; mpirun and "
    "torchrun do for processes of one machine.",
)
DISTRIBUTED_TIMEOUT = flags.DEFINE_integer(
    "distributed_timeout", 300, "Seconds to wait for all processes.", lower_bound=1
)
INIT_FROM = flags.DEFINE_string(
    "init_from",
    None,
    "Another run's workdir, a weights file, a hub name or a directory that convert.py wrote: what "
    "training starts from, as --config.init_from, or what --eval_only evaluates.",
)
EVAL_ONLY = flags.DEFINE_bool(
    "eval_only",
    False,
    "Evaluate the run in --workdir, or what --init_from names, in both forms; no training.",
)
BY_CLASS = flags.DEFINE_bool(
    "by_class", False, "With --eval_only: also the accuracy of each class."
)
STEP = flags.DEFINE_integer(
    "step", None, "With --eval_only: of this checkpoint instead of the newest.", lower_bound=1
)
PROFILE_STEPS = flags.DEFINE_string(
    "profile_steps", "", "FIRST:END, steps to write a trace of; 10:20 traces 10 to 19."
)
COMPILE_ONLY = flags.DEFINE_string(
    "compile_only",
    None,
    "Compile the train step for a TPU topology, say v5e:16x16, show what it takes, and stop. "
    "Needs neither a TPU nor data.",
)
COMPILE_TIMEOUT = flags.DEFINE_integer(
    "compile_timeout", 1800, "Seconds after which --compile_only gives up.", lower_bound=1
)


def main(_: Sequence[str]) -> int:
    """Trains; returns the exit status."""
    import jax

    from repvgg_jax.cluster.initialize import initialized
    from repvgg_jax.train.assessment import assess
    from repvgg_jax.train.loop import train
    from repvgg_jax.train.profile import parse_steps

    recipe = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"]))
    if not recipe.is_file():
        found = ", ".join(sorted(path.name for path in RECIPES.glob("*.py")))
        raise ValueError(f"--config={recipe}: no such file; there are in {RECIPES}: {found}")
    if COMPILE_ONLY.value is not None:
        from repvgg_jax.train.aot import compile_ahead

        print(compile_ahead(CONFIG.value, COMPILE_ONLY.value, timeout=COMPILE_TIMEOUT.value))
        return 0
    workdir = WORKDIR.value or pathlib.Path("runs", recipe.stem)
    with initialized(DISTRIBUTED.value, timeout=DISTRIBUTED_TIMEOUT.value, explain=cli.explain):
        if EVAL_ONLY.value:
            assessment = assess(CONFIG.value, workdir, init_from=INIT_FROM.value, step=STEP.value)
            if jax.process_index() == 0:
                print("\n".join(assessment.lines(by_class=BY_CLASS.value)))
            return 0
        if INIT_FROM.value is not None:
            CONFIG.value.init_from = INIT_FROM.value
        outcome = train(CONFIG.value, workdir, profile_steps=parse_steps(PROFILE_STEPS.value))
    # A preempted run has done what it was asked; for Ctrl-C shells expect 128 + its number.
    return 128 + signal.SIGINT if outcome.stopped_by == signal.SIGINT else 0


if __name__ == "__main__":
    cli.run(main, defaults={"config": str(RECIPES / "digits.py")})
