"""The train loop: restore or start, then step, evaluate and save until the end."""

import contextlib
import dataclasses
import logging
import math
import pathlib
import signal
import time

import jax
from ml_collections import ConfigDict

from repvgg_jax.cluster import consensus, watchdog
from repvgg_jax.data.batches import train_batches
from repvgg_jax.data.dataset import Dataset, load
from repvgg_jax.data.identity import DataIdentity
from repvgg_jax.progress import announced
from repvgg_jax.train import memory, resume, scales
from repvgg_jax.train.by_class import ByClass
from repvgg_jax.train.checkpoint import Checkpoints
from repvgg_jax.train.classes import for_resuming
from repvgg_jax.train.evaluate import Evaluator, counted, metrics_row
from repvgg_jax.train.experiment import Experiment
from repvgg_jax.train.hooks import Profile, StopRequest
from repvgg_jax.train.metrics import MetricsWriter, StepMetrics
from repvgg_jax.train.restore import check_start, starting_state
from repvgg_jax.train.settings import Settings
from repvgg_jax.train.state import TrainState
from repvgg_jax.train.step import Batch, Sums
from repvgg_jax.train.validate import check_batches, check_compiler_options
from repvgg_jax.train.workdir import RunMetadata, Workdir

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended.

    Attributes:
      step: steps taken, including those before this call.
      accuracy: the task's headline, accuracy or mIoU, of the training form on the validation
        images, a fraction; None if stopped.
      accuracy_fused: of the fused form; None if stopped, or if the network has none.
      accuracy_int8: of the fused form in int8, simulated, after quantization-aware training.
      stopped_by: the signal that stopped the run before its end, or None.
    """

    step: int
    accuracy: float | None = None
    accuracy_fused: float | None = None
    accuracy_int8: float | None = None
    stopped_by: signal.Signals | None = None


def train(
    config: ConfigDict | Settings,
    path: str | pathlib.Path,
    *,
    init_from: str | None = None,
    init_entry: str | None = None,
    other_data: bool = False,
    extend: bool = False,
    profile_steps: range = range(0),
    recipe: str = "",
) -> Outcome:
    """Trains what `config` describes in the directory `path`, or resumes there.

    A run that was interrupted at any step and resumed ends bitwise identical, in parameters,
    statistics and optimizer state, to one that never was.

    Args:
      config: from `default_config`, as a recipe changes it.
      path: the run directory; see `repvgg_jax.train.workdir`.
      init_from: replaces `config.init_from`.
      init_entry: replaces `config.init_entry`.
      other_data: resume with other images than the run began with; their classes are matched
        by name.
      extend: resume with another number of epochs or batch size, see `repvgg_jax.train.resume`.
      profile_steps: steps to write a trace of, for TensorBoard or Perfetto.
      recipe: where `config` is from, for the log.

    Raises:
      ValueError: a setting that cannot work, or a directory of another configuration or in
        use by another run.
      FloatingPointError: the loss or a gradient is not finite.
      OSError: the directory cannot be written.
    """
    settings = Settings.from_config(config)
    if init_from is not None:
        settings = dataclasses.replace(settings, init_from=init_from)
    if init_entry is not None:
        settings = dataclasses.replace(settings, init_entry=init_entry)
    consensus.require_same(settings.as_saved())
    check_batches(settings, devices=jax.device_count(), processes=jax.process_count())
    consensus.announce(
        batch_size=settings.train.batch_size,
        details=f"batch normalization over {settings.statistics_group}",
    )
    workdir = Workdir(pathlib.Path(path))

    with contextlib.ExitStack() as stack:
        # First, so that a signal during start-up waits for the first poll.
        stop = stack.enter_context(StopRequest(watchdog.agree_to_stop))
        begun = _Begun.at(workdir)
        if begun is None:
            settings = resume.started(settings, jax.default_backend())
            dataset = load(settings.data)
        else:
            settings, dataset = begun.resumed(settings, extend=extend, other_data=other_data)
        kept = None if begun is None else scales.of_run(workdir)
        experiment = Experiment.from_config(settings, dataset=dataset, scales=kept)
        check_compiler_options(settings, experiment.mesh)
        if begun is None:
            check_start(settings)  # before anything is written
        if jax.process_index() == 0:
            replacing = None if begun is None else begun.settings
            stack.enter_context(workdir.claimed(settings, replacing=replacing))
            if begun is None or begun.metadata is None or other_data:
                workdir.write_metadata(_metadata(experiment))
            if experiment.scales is not None and kept is None:
                scales.keep(experiment.scales, workdir)
        consensus.barrier("claimed")
        source = f"recipe={recipe} " if recipe else ""
        logger.info("%s%s workdir=%s", source, experiment.describe(), workdir.path)

        checkpoints = stack.enter_context(
            Checkpoints(workdir.checkpoints, keep=settings.checkpoint.keep)
        )
        state = _restore_or_start(experiment, checkpoints)
        writer = stack.enter_context(MetricsWriter(workdir, experiment, start_step=int(state.step)))
        evaluator = Evaluator(experiment)
        if int(state.step) < experiment.total_steps:
            profile = stack.enter_context(Profile(workdir.profile, profile_steps))
            state = _train_steps(experiment, state, checkpoints, writer, evaluator, stop, profile)
        if stop.signal is None:
            return _finish(experiment, state, checkpoints, writer, evaluator, stop, workdir)
        return Outcome(int(state.step), stopped_by=stop.signal)


@dataclasses.dataclass(frozen=True)
class _Begun:
    """A run that has a checkpoint, as its directory describes it."""

    path: pathlib.Path
    settings: Settings
    metadata: RunMetadata | None
    step: int

    @classmethod
    def at(cls, workdir: Workdir) -> "_Begun | None":
        step = workdir.newest_step
        if step is None or not workdir.config.exists():
            return None
        return cls(workdir.path, workdir.read_settings(), workdir.read_metadata(), step)

    def resumed(
        self, given: Settings, *, extend: bool, other_data: bool
    ) -> tuple[Settings, Dataset]:
        """Settings and data that it goes on with; raises ValueError where it must not."""
        data = None if self.metadata is None else self.metadata.data
        changes = resume.check_changes(
            self.settings, given, owner=str(self.path), extend=extend, known_data=data is not None
        )
        dataset = for_resuming(
            load(given.data), self.metadata, owner=str(self.path), other_data=other_data
        )
        settings = resume.resumed(
            self.settings,
            given,
            step=self.step,
            images=len(dataset.train),
            images_before=None if data is None else data.train.images,
        )
        if changes:
            logger.info("%s goes on with %s", self.path, "; ".join(changes))
        length = settings.train.epochs, settings.train.batch_size
        if length != (self.settings.train.epochs, self.settings.train.batch_size):
            old, new = (
                Experiment.from_config(s, dataset=dataset, scales=scales.of_run(Workdir(self.path)))
                for s in (self.settings, settings)
            )
            logger.info(
                "extended: epoch %g to %d, with the learning rates of a run that had this length "
                "and batch from its start: %.4g, then %.4g",
                new.position(self.step) / new.steps_per_epoch,
                settings.train.epochs,
                old.learning_rate(self.step),
                new.learning_rate(self.step + 1),
            )
        elif settings.train.step_offset != self.settings.train.step_offset:
            logger.info(
                "the epochs of the run have another number of images from here on; the learning "
                "rates follow the epochs"
            )
        return settings, dataset


def _train_steps(
    experiment: Experiment,
    state: TrainState,
    checkpoints: Checkpoints,
    writer: MetricsWriter,
    evaluator: Evaluator,
    stop: StopRequest,
    profile: Profile,
) -> TrainState:
    step_fn, settings = CompiledStep(experiment), experiment.settings
    devices = experiment.mesh.size
    with memory.explained(
        lambda: memory.of_step(settings, step_fn.programs, devices),
        lambda: memory.advice_for_step(settings),
    ):
        return _run_steps(experiment, state, step_fn, checkpoints, writer, evaluator, stop, profile)


def _run_steps(
    experiment: Experiment,
    state: TrainState,
    step_fn: "CompiledStep",
    checkpoints: Checkpoints,
    writer: MetricsWriter,
    evaluator: Evaluator,
    stop: StopRequest,
    profile: Profile,
) -> TrainState:
    settings, start_step = experiment.settings, int(state.step)
    if _stopped_before(start_step, stop):
        return state
    step_fn.compile(
        experiment.size_at(experiment.position(start_step) // experiment.steps_per_epoch)
    )
    if _evaluation_is_missing(experiment, writer, start_step):
        _evaluate(experiment, state, evaluator, writer, stop)
    if _stopped_before(start_step, stop):
        return state

    batches = train_batches(
        experiment.dataset,
        batch_size=settings.train.batch_size,
        seed=settings.seed,
        start_step=experiment.position(start_step),
        sharding=experiment.over_batch,
        size_at=experiment.size_at if settings.data.sizes else None,
    )
    metrics = StepMetrics(experiment, writer, checkpoints)
    for step in range(start_step + 1, experiment.total_steps + 1):
        profile.before(step)
        with metrics.waiting_for_data():
            batch = next(batches)
        state, of_step = step_fn(state, batch)
        profile.after(step, of_step)
        metrics.push(step, of_step)  # reads those of the step before: the device never waits

        evaluate = not stop.poll() and experiment.is_due(settings.eval.every_epochs, step)
        save = experiment.is_due(settings.checkpoint.every_epochs, step) or bool(stop)
        if evaluate or save:
            metrics.flush(state)  # raises before a state that is not finite is saved
        # A row is on disk before the checkpoint after which it would not be written again.
        accuracy = _evaluate(experiment, state, evaluator, writer, stop) if evaluate else None
        if save or stop:
            wait = bool(stop) or step == experiment.total_steps
            checkpoints.save(state, accuracy=accuracy, wait=wait)
        if stop.signal is not None:
            logger.info("%s at step %d: saved; rerun to resume", stop.signal.name, step)
            break
        if evaluate or save:
            metrics.restart()
    return state


class CompiledStep:
    """The train step, compiled once per image size.

    Compiled ahead of time, as a jitted function might compile a second time for other layouts.
    """

    def __init__(self, experiment: Experiment):
        self._experiment = experiment
        self._compiled: dict[tuple[int, int], jax.stages.Compiled] = {}

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        """Takes a step; consumes `state`."""
        return self.compile(batch["image"].shape[1:3])(state, batch)

    @property
    def programs(self) -> list[jax.stages.Compiled]:
        """What was compiled so far."""
        return list(self._compiled.values())

    def compile(self, size: tuple[int, int]) -> jax.stages.Compiled:
        """The step for images of this height and width."""
        if size not in self._compiled:
            began = time.monotonic()
            with announced("compiling for %dx%d", *size):
                self._compiled[size] = self._experiment.lower_step(size).compile()
            logger.info("compiled for %dx%d in %.1f s", *size, time.monotonic() - began)
            consensus.barrier(f"compiled {size}")
        return self._compiled[size]


def _metadata(experiment: Experiment) -> RunMetadata:
    return RunMetadata(
        classes=experiment.dataset.classes,
        image_shape=experiment.dataset.image_shape,
        eval_shape=experiment.dataset.eval_shape,
        normalize=experiment.normalize,
        data=DataIdentity.of(experiment.dataset),
    )


def _restore_or_start(experiment: Experiment, checkpoints: Checkpoints) -> TrainState:
    restored = checkpoints.restore(experiment.abstract_state())
    checkpoints.tidy()
    if restored is None:
        return starting_state(experiment)
    logger.info("resuming from step %d of %d", int(restored.step), experiment.total_steps)
    if checkpoints.saved_on is not None:
        logger.info(
            "the checkpoint was saved by %s: from here on the results equal that run's up to "
            "rounding, but are not bitwise identical",
            checkpoints.saved_on,
        )
    return restored


def _stopped_before(start_step: int, stop: StopRequest) -> bool:
    """Whether a stop was requested before the first step."""
    if stop.poll() and stop.signal is not None:
        logger.info(
            "%s at step %d: nothing new to save; rerun to resume", stop.signal.name, start_step
        )
    return bool(stop)


def _evaluation_is_missing(experiment: Experiment, writer: MetricsWriter, step: int) -> bool:
    """Whether the run was stopped before the evaluation that is due at this step."""
    due = step > 0 and experiment.is_due(experiment.settings.eval.every_epochs, step)
    return due and not consensus.broadcast(writer.evaluated(step))


def _evaluate(
    experiment: Experiment,
    state: TrainState,
    evaluator: Evaluator,
    writer: MetricsWriter,
    stop: StopRequest,
) -> float | None:
    """The headline; None if a stop was requested, the evaluation is then left to the next run."""
    means = evaluator(*experiment.evaluated(state.result), stop)
    if means is None:
        return None
    writer.write({"step": int(state.step), **metrics_row("eval", means)})
    writer.refresh(evaluator.picture)
    headline = float(means[experiment.task.headline])
    return headline if math.isfinite(headline) else None  # no label counted


def _finish(
    experiment: Experiment,
    state: TrainState,
    checkpoints: Checkpoints,
    writer: MetricsWriter,
    evaluator: Evaluator,
    stop: StopRequest,
    workdir: Workdir,
) -> Outcome:
    step = int(state.step)
    trained = evaluator(experiment.model, state.result, stop)
    if trained is None:
        return Outcome(step, stopped_by=stop.signal)
    final, results = metrics_row("final", trained), [trained]
    if experiment.obstacle is None:
        fused = evaluator(experiment.model.clone(deploy=True), experiment.fuse(state.result), stop)
        if fused is None:
            return Outcome(step, stopped_by=stop.signal)
        final |= metrics_row("final", fused, "_fused")
        results.append(fused)
    if experiment.qat is not None:
        quantized = evaluator(*experiment.evaluated(state.result), stop)
        if quantized is None:
            return Outcome(step, stopped_by=stop.signal)
        final |= metrics_row("final", quantized, "_int8")
    writer.write({"step": step, **final})
    by_class = ByClass.of(experiment.dataset.classes, results[-1])
    writer.draw(by_class, picture=evaluator.picture)
    (headline, word), (beside, beside_word) = experiment.task.names.items()
    accuracy, accuracy_fused = final[f"final/{headline}"], final.get(f"final/{headline}_fused")
    images = counted(trained, len(experiment.dataset.evaluation))
    fused_text = "" if accuracy_fused is None else f", {accuracy_fused:.2%} fused"
    logger.info(f"validation {word}: {accuracy:.2%} as trained{fused_text} ({images})")
    accuracy_int8 = final.get(f"final/{headline}_int8")
    if accuracy_int8 is not None:
        logger.info(f"in int8, simulated: {accuracy_int8:.2%}")
    logger.info(
        "%s: %.2f%%; lowest by class: %s",
        beside_word,
        100 * float(results[-1][beside]),
        by_class.line(),
    )
    if experiment.obstacle is not None:
        logger.info("%s has no deploy form: %s", workdir.path, experiment.obstacle)
    best = checkpoints.best()
    if best is not None and best != step:
        logger.info(
            "the best evaluated checkpoint is that of step %d with %.2f%%; to evaluate it: "
            "python train.py --workdir %s --eval_only --step %d",
            best,
            100 * (checkpoints.accuracy(best) or 0),
            workdir.path,
            best,
        )
    logger.info("report: %s", workdir.report)
    if experiment.obstacle is None:
        logger.info("next: python convert.py --workdir %s --output deploy", workdir.path)
    return Outcome(step, accuracy, accuracy_fused, accuracy_int8)
