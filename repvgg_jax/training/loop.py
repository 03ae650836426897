"""The loop: restore or start, then step, report, evaluate and save until the end.

It reads from top to bottom in the order in which things happen.
"""

import contextlib
import dataclasses
import math
import pathlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from repvgg_jax.data.batches import Batch, eval_batches, train_batches
from repvgg_jax.fuse import fuse_params
from repvgg_jax.model import RepVGG
from repvgg_jax.training import config as configs
from repvgg_jax.training.checkpoint import Checkpoints
from repvgg_jax.training.report import Report, as_floats
from repvgg_jax.training.run import Run
from repvgg_jax.training.signals import StopRequest
from repvgg_jax.training.state import TrainState
from repvgg_jax.training.step import make_eval_step, make_train_step
from repvgg_jax.training.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended.

    Attributes:
      step: steps taken, in this call and before.
      accuracy: of the training form on the held-out images, a fraction; None if stopped.
      accuracy_fused: of the fused form.
      stopped_by: the signal that stopped the run before its end, or None.
    """

    step: int
    accuracy: float | None = None
    accuracy_fused: float | None = None
    stopped_by: signal.Signals | None = None


def train(config: ConfigDict, path: str | pathlib.Path) -> Outcome:
    """Trains what `config` describes in the directory `path`, or continues there.

    A run that was interrupted at any step and continues ends with the same bits, in
    parameters, statistics and optimiser state, as one that never was.

    Args:
      config: from `default_config`, as a recipe changes it.
      path: the run's directory; see `Workdir` for what it will hold.

    Raises:
      ValueError: a setting that cannot work, or a directory of another configuration.
      FloatingPointError: the loss or a gradient is not finite any more.
      OSError: the directory cannot be written.
    """
    run = Run.from_config(config)
    configs.check(config, devices=jax.device_count(), train_images=len(run.dataset.train))
    workdir = Workdir(pathlib.Path(path))
    if jax.process_index() == 0:
        workdir.claim(configs.plain(config))

    with contextlib.ExitStack() as stack:
        warnings: list[str] = []
        checkpoints = stack.enter_context(
            Checkpoints(workdir.checkpoints, keep=config.checkpoint.keep, say=warnings.append)
        )
        restored = checkpoints.restore(run.abstract_state())
        if jax.process_index() == 0:
            checkpoints.set_aside_unsound()
        state = run.initial_state() if restored is None else restored
        report = Report(
            workdir,
            title=f"RepVGG {run.model.variant.name} on {run.dataset.name}",
            start_step=int(state.step),
            total_steps=run.total_steps,
        )
        stack.callback(report.close)
        stop = stack.enter_context(StopRequest())
        for warning in warnings:
            report.say(warning)
        report.say(f"{run.describe()} -> {workdir.path}")
        if restored is not None:
            report.say(f"continuing from step {int(state.step)} of {run.total_steps}")

        evaluate = _Evaluation(run)
        state = _train_steps(run, state, checkpoints, report, evaluate, stop)
        if stop.signal is not None:
            return Outcome(int(state.step), stopped_by=stop.signal)
        return _finish(run, state, report, evaluate, workdir)


def _train_steps(
    run: Run,
    state: TrainState,
    checkpoints: Checkpoints,
    report: Report,
    evaluate: "_Evaluation",
    stop: StopRequest,
) -> TrainState:
    start_step = int(state.step)
    if start_step == run.total_steps:
        return state
    began = time.monotonic()
    train_step = (
        jax.jit(
            make_train_step(
                run.model, run.task, run.optimizer, run.normalise, run.augment, run.config.seed
            ),
            out_shardings=run.replicated,
            donate_argnums=0,
        )
        .lower(run.abstract_state(), run.abstract_batch())
        .compile()
    )
    report.say(f"compiled in {time.monotonic() - began:.1f} s")
    batches = train_batches(
        run.dataset.train,
        batch_size=run.config.train.batch_size,
        seed=run.config.seed,
        start_step=start_step,
        sharding=run.over_batch,
    )
    meter = _Meter(run, report, checkpoints, start_step)
    for step in range(start_step + 1, run.total_steps + 1):
        batch = meter.wait_for(batches)
        state, metrics = train_step(state, batch)
        # The device is busy with this step now, so the numbers of the one before cost nothing.
        meter.take(step, metrics)

        epoch, rest = divmod(step, run.steps_per_epoch)
        last = step == run.total_steps
        save = stop or last or (not rest and epoch % run.config.checkpoint.every_epochs == 0)
        test = not rest and (last or epoch % run.config.eval.every_epochs == 0)
        if save or test:
            meter.flush()  # raises before a state that is not finite could be saved
            if save:
                checkpoints.save(state)
            if test and not stop:
                report.record({"step": step, **evaluate(run.model, state.variables, "eval")})
                report.draw()
            meter.restart()
        if stop:
            report.say(
                f"{stop.signal.name if stop.signal else 'stop'} at step {step}: saved; "
                "the same command continues from here"
            )
            break
    return state


def _finish(
    run: Run, state: TrainState, report: Report, evaluate: "_Evaluation", workdir: Workdir
) -> Outcome:
    fused_model, fused = run.model.clone(deploy=True), fuse_params(state.variables)
    trained = evaluate(run.model, state.variables, "final")
    deployed = evaluate(fused_model, fused, "final")
    row = {**trained, **{f"{name}_fused": value for name, value in deployed.items()}}
    report.record({"step": int(state.step), **row})
    report.draw()
    report.say(
        f"held-out accuracy: {row['final/accuracy']:.2%} as trained, "
        f"{row['final/accuracy_fused']:.2%} fused ({len(run.dataset.evaluation)} images)"
    )
    report.say(f"curves: {workdir.curves}")
    report.say(f"next: python convert.py --workdir {workdir.path} --output deploy")
    return Outcome(int(state.step), row["final/accuracy"], row["final/accuracy_fused"])


class _Evaluation:
    """Loss and accuracy over all held-out images, each once."""

    def __init__(self, run: Run):
        self._run = run
        self._steps: dict[RepVGG, Callable[..., Any]] = {}

    def __call__(self, model: RepVGG, variables: Any, prefix: str) -> dict[str, float]:
        """`{"eval/loss": …, "eval/accuracy": …}` of a network and its variables."""
        run = self._run
        if model not in self._steps:
            self._steps[model] = jax.jit(make_eval_step(model, run.task, run.normalise))
        batches = eval_batches(
            run.dataset.evaluation,
            batch_size=run.config.eval.batch_size,
            sharding=run.over_batch,
        )
        parts = [self._steps[model](variables, batch) for batch in batches]
        sums = as_floats(jax.tree.map(lambda *values: sum(values), *parts))
        count = sums.pop("count")
        return {f"{prefix}/{name}": value / count for name, value in sums.items()}


class _Meter:
    """Means over the steps between two rows, the clock, and the watch for NaN."""

    def __init__(self, run: Run, report: Report, checkpoints: Checkpoints, step: int):
        self._run, self._report, self._checkpoints = run, report, checkpoints
        self._pending: tuple[int, Any] | None = None
        self._row: dict[str, float] = {}
        self._begin(step)

    def wait_for(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; the time it takes is the data-wait."""
        began = time.monotonic()
        batch = next(batches)
        self._waited += time.monotonic() - began
        return batch

    def take(self, step: int, metrics: Any) -> None:
        """Keeps a step's metrics, and reads those of the step before."""
        self.read()
        self._pending = (step, metrics)

    def read(self) -> None:
        """Waits for the newest step's metrics."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = as_floats(metrics)
        bad_leaf = int(values.pop("first_bad_gradient"))
        self._count += 1
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        seconds = time.monotonic() - self._began
        images = self._count * self._run.config.train.batch_size
        self._row = {
            "step": step,
            "epoch": step / self._run.steps_per_epoch,
            **{f"train/{name}": total / self._count for name, total in self._sums.items()},
            "images_per_second_per_device": images / seconds / jax.device_count(),
            "data_wait": self._waited / seconds,
        }
        self._report.step(step, self._row)
        if bad_leaf >= 0 or not math.isfinite(values["loss"]):
            self._record()
            raise FloatingPointError(self._diagnosis(step, values, bad_leaf))
        if step % self._run.config.report.every_steps == 0:
            self._record()
            self._begin(step)

    def flush(self) -> None:
        """Reads what is pending and ends the row."""
        self.read()
        self._record()

    def restart(self) -> None:
        """Starts the next row here; what happened since the last is not training."""
        self._begin(0)

    def _record(self) -> None:
        if self._count:
            self._report.record(self._row)

    def _begin(self, step: int) -> None:
        self._count, self._waited, self._sums = 0, 0.0, dict[str, float]()
        self._began = time.monotonic()

    def _diagnosis(self, step: int, values: dict[str, float], bad_leaf: int) -> str:
        if not math.isfinite(values["loss"]):
            what = f"the loss is {values['loss']}"
        else:
            leaves, _ = jax.tree_util.tree_flatten_with_path(self._run.abstract_state().params)
            name = jax.tree_util.keystr(leaves[bad_leaf][0], simple=True, separator="/")
            what = f"the gradient of {name} is not finite (the loss is {values['loss']:g})"
        saved = self._checkpoints.newest()
        return (
            f"step {step}: {what}; the last good checkpoint is "
            f"{'none' if saved is None else f'that of step {saved}'}; a smaller "
            f"config.optimizer.learning_rate (now {self._run.config.optimizer.learning_rate:g}) "
            "or a longer config.optimizer.warmup_epochs usually helps"
        )
