"""The loop: restore or start, then step, report, evaluate and save until the end.

It reads from top to bottom in the order in which things happen.
"""

import contextlib
import dataclasses
import functools
import pathlib
import signal
import time

import jax
from ml_collections import ConfigDict

from repvgg_jax.cluster import consensus
from repvgg_jax.data.batches import train_batches
from repvgg_jax.reparam import fuse_params
from repvgg_jax.train import config as configs
from repvgg_jax.train.checkpoint import Checkpoints
from repvgg_jax.train.compiling import try_options
from repvgg_jax.train.evaluation import Evaluation, counted, row
from repvgg_jax.train.meter import Meter
from repvgg_jax.train.profile import Profile
from repvgg_jax.train.report import Report
from repvgg_jax.train.run import Run
from repvgg_jax.train.signals import StopRequest
from repvgg_jax.train.start import starting_state
from repvgg_jax.train.state import TrainState
from repvgg_jax.train.workdir import Workdir


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


def train(
    config: ConfigDict, path: str | pathlib.Path, *, profile_steps: range = range(0)
) -> Outcome:
    """Trains what `config` describes in the directory `path`, or continues there.

    A run that was interrupted at any step and continues ends with the same bits, in
    parameters, statistics and optimiser state, as one that never was.

    Args:
      config: from `default_config`, as a recipe changes it.
      path: the run's directory; see `Workdir` for what it will hold.
      profile_steps: steps to write a trace of, for TensorBoard or Perfetto.

    Raises:
      ValueError: a setting that cannot work, or a directory of another configuration or in
        use by another run.
      FloatingPointError: the loss or a gradient is not finite any more.
      OSError: the directory cannot be written.
    """
    consensus.require_same(configs.plain(config))
    configs.check(config, devices=jax.device_count(), processes=jax.process_count())
    group = configs.bn_group_size(config) or config.train.batch_size
    consensus.announce(
        batch_size=config.train.batch_size, details=f"batch normalization over {group}"
    )
    workdir = Workdir(pathlib.Path(path))

    with contextlib.ExitStack() as stack:
        # First, so that a signal while the run starts waits for the first question.
        stop = stack.enter_context(StopRequest(consensus.agree_to_stop))
        run = Run.from_config(config)
        try_options(config.train.compiler_options, run.mesh)
        if jax.process_index() == 0:
            stack.enter_context(workdir.claimed(config))
        consensus.barrier("claimed")
        checkpoints = stack.enter_context(
            Checkpoints(workdir.checkpoints, keep=config.checkpoint.keep)
        )
        restored = checkpoints.restore(run.abstract_state())
        checkpoints.set_aside_corrupt()
        state, beginning = starting_state(run) if restored is None else (restored, None)
        report = Report(
            workdir,
            title=f"RepVGG {run.model.variant.name} on {run.dataset.name}",
            config=configs.plain(config),
            start_step=int(state.step),
            total_steps=run.total_steps,
        )
        stack.callback(report.close)
        run.dataset.undecodable.say = report.say_for_itself
        report.say(f"{run.describe()} -> {workdir.path}")
        if beginning is not None:
            report.say(beginning)
        if restored is not None:
            report.say(f"continuing from step {int(state.step)} of {run.total_steps}")
            if checkpoints.saved_on is not None:
                report.say(
                    f"it was saved by {checkpoints.saved_on}: from here on numbers agree with that "
                    "run's to rounding, not to the bit"
                )

        evaluate = Evaluation(run)
        if int(state.step) < run.total_steps:
            profile = stack.enter_context(Profile(workdir.profile, profile_steps, report.say))
            state = _train_steps(run, state, checkpoints, report, evaluate, stop, profile)
        if stop.signal is not None:
            return Outcome(int(state.step), stopped_by=stop.signal)
        return _finish(run, state, checkpoints, report, evaluate, workdir, stop)


def _train_steps(
    run: Run,
    state: TrainState,
    checkpoints: Checkpoints,
    report: Report,
    evaluate: Evaluation,
    stop: StopRequest,
    profile: Profile,
) -> TrainState:
    config, start_step = run.config, int(state.step)

    def every(epochs: int, step: int) -> bool:
        return step == run.total_steps or step % (epochs * run.steps_per_epoch) == 0

    def test(step: int) -> float | None:
        means = evaluate(run.model, state.result, stop)
        if means is None:
            return None  # stopped; the run that continues will do it
        report.record({"step": step, **row("eval", means)})
        report.draw()
        return float(means["accuracy"])

    # Unlike a jitted function, a compiled one cannot compile again.
    @functools.cache
    def compiled(size: int) -> jax.stages.Compiled:
        began = time.monotonic()
        program = run.lower_step(size).compile()
        pixels = f" for images of {size}x{size}" if config.data.sizes else ""
        report.say(f"compiled{pixels} in {time.monotonic() - began:.1f} s")
        consensus.barrier(f"compiled {size}")
        return program

    def stopped_before_the_first_step() -> bool:
        if stop.poll() and stop.signal is not None:
            report.say(
                f"{stop.signal.name} at step {start_step}: nothing new to save; the same command "
                "continues from here"
            )
        return bool(stop)

    if stopped_before_the_first_step():
        return state
    compiled(run.size_at(start_step // run.steps_per_epoch))
    untested = start_step and every(config.eval.every_epochs, start_step)
    if untested and not consensus.broadcast(report.tested(start_step)):
        test(start_step)  # the run was stopped before it could
    if stopped_before_the_first_step():
        return state
    batches = train_batches(
        run.dataset,
        batch_size=config.train.batch_size,
        seed=config.seed,
        start_step=start_step,
        sharding=run.over_batch,
        size_at=run.size_at if config.data.sizes else None,
    )
    meter = Meter(run, report, checkpoints)
    for step in range(start_step + 1, run.total_steps + 1):
        profile.before(step)
        batch = meter.wait_for(batches)
        state, metrics = compiled(batch["image"].shape[1])(state, batch)
        profile.after(step, metrics)
        # The device is busy with this step now, so the numbers of the one before cost nothing.
        meter.take(step, metrics)

        test_now = not stop.poll() and every(config.eval.every_epochs, step)
        save_now = every(config.checkpoint.every_epochs, step)
        if test_now or save_now or stop:
            meter.flush()  # raises before a state that is not finite could be saved
        # A row is on disk before the checkpoint that would keep it from being written again.
        accuracy = test(step) if test_now else None
        if save_now or stop:
            checkpoints.save(state, accuracy=accuracy, wait=bool(stop) or step == run.total_steps)
        if stop.signal is not None:
            report.say(
                f"{stop.signal.name} at step {step}: saved; the same command continues from here"
            )
            break
        if test_now or save_now:
            meter.restart()
    return state


def _finish(
    run: Run,
    state: TrainState,
    checkpoints: Checkpoints,
    report: Report,
    evaluate: Evaluation,
    workdir: Workdir,
    stop: StopRequest,
) -> Outcome:
    step, fused_model = int(state.step), run.model.clone(deploy=True)
    trained = evaluate(run.model, state.result, stop)
    deployed = evaluate(fused_model, fuse_params(state.result), stop)
    if trained is None or deployed is None:
        return Outcome(step, stopped_by=stop.signal)
    final = {**row("final", trained), **row("final", deployed, "_fused")}
    report.record({"step": step, **final})
    report.draw()
    report.say(
        f"held-out accuracy: {final['final/accuracy']:.2%} as trained, "
        f"{final['final/accuracy_fused']:.2%} fused "
        f"({counted(trained, len(run.dataset.evaluation))})"
    )
    best = checkpoints.best()
    if best not in (None, step):
        report.say(f"the best of the checkpoints that were evaluated is that of step {best}")
    report.say(f"report: {workdir.page}")
    report.say(f"next: python convert.py --workdir {workdir.path} --output deploy")
    return Outcome(step, final["final/accuracy"], final["final/accuracy_fused"])
