"""The loop: restore or start, then step, report, evaluate and save until the end.

It reads from top to bottom in the order in which things happen.
"""

import contextlib
import dataclasses
import pathlib
import signal
import time
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from repvgg_jax.data.batches import Batch, train_batches
from repvgg_jax.fuse import fuse_params
from repvgg_jax.training import config as configs
from repvgg_jax.training.checkpoint import Checkpoints
from repvgg_jax.training.evaluation import Evaluation
from repvgg_jax.training.meter import Meter
from repvgg_jax.training.report import Report
from repvgg_jax.training.run import Run
from repvgg_jax.training.signals import StopRequest
from repvgg_jax.training.start import starting_state
from repvgg_jax.training.state import TrainState
from repvgg_jax.training.step import make_train_step
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
    configs.check(config, devices=jax.device_count())
    run = Run.from_config(config)
    workdir = Workdir(pathlib.Path(path))
    if jax.process_index() == 0:
        workdir.claim(config)

    with contextlib.ExitStack() as stack:
        warnings: list[str] = []
        checkpoints = stack.enter_context(
            Checkpoints(workdir.checkpoints, keep=config.checkpoint.keep, say=warnings.append)
        )
        restored = checkpoints.restore(run.abstract_state())
        if jax.process_index() == 0:
            checkpoints.set_aside_unsound()
        state, beginning = starting_state(run) if restored is None else (restored, None)
        report = Report(
            workdir,
            title=f"RepVGG {run.model.variant.name} on {run.dataset.name}",
            start_step=int(state.step),
            total_steps=run.total_steps,
        )
        stack.callback(report.close)
        stop = stack.enter_context(StopRequest())
        run.dataset.undecodable.say = report.say
        for warning in warnings:
            report.say(warning)
        report.say(f"{run.describe()} -> {workdir.path}")
        if beginning is not None:
            report.say(beginning)
        if restored is not None:
            report.say(f"continuing from step {int(state.step)} of {run.total_steps}")

        evaluate = Evaluation(run)
        if int(state.step) < run.total_steps:
            state = _train_steps(run, state, checkpoints, report, evaluate, stop)
        if stop.signal is not None:
            return Outcome(int(state.step), stopped_by=stop.signal)
        return _finish(run, state, report, evaluate, workdir)


def _train_steps(
    run: Run,
    state: TrainState,
    checkpoints: Checkpoints,
    report: Report,
    evaluate: Evaluation,
    stop: StopRequest,
) -> TrainState:
    config, start_step = run.config, int(state.step)

    def every(epochs: int, step: int) -> bool:
        return step == run.total_steps or step % (epochs * run.steps_per_epoch) == 0

    def test(step: int) -> None:
        report.record({"step": step, **evaluate(run.model, state.variables, "eval")})
        report.draw()

    began = time.monotonic()
    train_step = _compile(run)
    report.say(f"compiled in {time.monotonic() - began:.1f} s")
    if start_step and every(config.eval.every_epochs, start_step) and not report.tested(start_step):
        test(start_step)  # the run was stopped before it could
    batches = train_batches(
        run.dataset,
        batch_size=config.train.batch_size,
        seed=config.seed,
        start_step=start_step,
        sharding=run.over_batch,
    )
    meter = Meter(run, report, checkpoints)
    for step in range(start_step + 1, run.total_steps + 1):
        batch = meter.wait_for(batches)
        state, metrics = train_step(state, batch)
        # The device is busy with this step now, so the numbers of the one before cost nothing.
        meter.take(step, metrics)

        test_now = every(config.eval.every_epochs, step) and not stop
        save_now = every(config.checkpoint.every_epochs, step) or stop
        if test_now or save_now:
            meter.flush()  # raises before a state that is not finite could be saved
        # A row is on disk before the checkpoint that would keep it from being written again.
        if test_now:
            test(step)
        if save_now:
            checkpoints.save(state)
        if stop.signal is not None:
            report.say(
                f"{stop.signal.name} at step {step}: saved; the same command continues from here"
            )
            break
        if test_now or save_now:
            meter.restart()
    return state


def _compile(run: Run) -> Callable[[TrainState, Batch], tuple[TrainState, Any]]:
    """The train step as a program; unlike a jitted function it cannot compile again."""
    train_step = make_train_step(
        run.model, run.task, run.optimizer, run.normalise, run.augment, run.config.seed
    )
    jitted = jax.jit(train_step, out_shardings=run.replicated, donate_argnums=0)
    return jitted.lower(run.abstract_state(), run.abstract_batch()).compile()


def _finish(
    run: Run, state: TrainState, report: Report, evaluate: Evaluation, workdir: Workdir
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
