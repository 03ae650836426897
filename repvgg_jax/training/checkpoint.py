"""Checkpoints: Orbax, and what it leaves out.

Orbax restores flipped bytes without a word, does not step back from a checkpoint that it
cannot read, and does not try again when a disk is full for a moment. Here every array has a
checksum, the newest *sound* checkpoint is used, those that are not are named, and a save that
fails is tried again.
"""

import logging
import pathlib
import shutil
import time
import types
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from repvgg_jax.training import distributed
from repvgg_jax.training.checksum import checksums
from repvgg_jax.training.state import TrainState

ATTEMPTS = 3  # to save, before the run stops


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last one.

    The newest `keep` stay, and the one with the best accuracy of those that were evaluated.

    Attributes:
      saved_on: how many devices and processes saved what `restore` returned, in words, where
        these were others than now.
    """

    def __init__(
        self,
        path: pathlib.Path,
        *,
        keep: int = 3,
        say: Callable[[str], None] = logging.warning,
        pause: float = 5.0,
    ):
        """Opens a directory of checkpoints.

        Args:
          path: the directory; made when the first one is saved.
          keep: how many of the newest to keep.
          say: told, in a line, of every checkpoint that is not sound and every failed save.
          pause: seconds before a second attempt to save; the third waits twice as long.
        """
        self._say, self._pause = say, pause
        # Orbax reports its progress, and failures that are raised anyway, on this logger.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        policies = ocp.checkpoint_managers
        best = policies.BestN(get_metric_fn=_accuracy, n=1, keep_checkpoints_without_metrics=False)
        self._manager = ocp.CheckpointManager(
            path.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
                best_fn=_accuracy,  # without it Orbax would not write the metrics down
                best_mode="max",
                create=False,
            ),
            item_names=("state", "manifest"),
        )
        self._path = path
        self._unsound: list[int] = []
        self.saved_on: str | None = None

    def save(self, state: TrainState, *, accuracy: float | None = None, wait: bool = False) -> None:
        """Saves in the background; what is there stays until the new one is whole.

        A save that fails, this one or the one before it, is tried again, up to three times.

        Args:
          state: to save.
          accuracy: of its evaluation, if it was evaluated.
          wait: until it is on disk. Otherwise a failure shows at the next save.

        Raises:
          OSError: it failed three times.
        """
        step, metrics = int(state.step), None if accuracy is None else {"accuracy": accuracy}
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self._path.mkdir(parents=True, exist_ok=True)
                self._manager.wait_until_finished()
                self._manager.save(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardSave(state),
                        manifest=ocp.args.JsonSave(
                            {"checksums": checksums(state), "saved_on": _machine()}
                        ),
                    ),
                    metrics=metrics,
                )
                if wait:
                    self._manager.wait_until_finished()
                return
            except Exception as error:  # Orbax raises whatever its writers raise
                reason = _first_line(error)
                if jax.process_count() > 1:
                    # The others may have succeeded, or wait for this one: no attempt of one
                    # process alone can work.
                    raise OSError(f"saving at step {step} failed: {reason}") from error
                self._clear_unfinished()
                if attempt == ATTEMPTS:
                    newest = self._manager.latest_step()
                    raise OSError(
                        f"saving at step {step} failed {ATTEMPTS} times; the last good checkpoint "
                        f"is {'none' if newest is None else f'that of step {newest}'}: {reason}"
                    ) from error
                self._say(f"saving at step {step} failed, trying again: {reason}")
                time.sleep(self._pause * attempt)

    def restore(self, like: TrainState, *, step: int | None = None) -> TrainState | None:
        """The newest sound checkpoint, or None where there is none at all.

        Args:
          like: a state of the same structure, concrete or of `jax.ShapeDtypeStruct`s with
            shardings.
          step: that of this step, instead of the newest.

        Raises:
          ValueError: there are checkpoints, but not one is sound, or none of that step.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        if step is not None and step not in steps:
            raise ValueError(
                f"{self._path} holds no checkpoint of step {step}; there are those of "
                f"{', '.join(map(str, sorted(steps))) or 'none'}"
            )
        candidates = steps if step is None else [step]
        for candidate in candidates:
            state, reason = self._restore_step(candidate, like)
            if state is not None:
                return state
            self._unsound.append(candidate)
            self._say(
                f"checkpoint {self._path / str(candidate)} is not sound and is passed over: "
                f"{reason}"
            )
        if candidates:
            raise ValueError(
                f"none of the {len(candidates)} checkpoints in {self._path} is sound "
                f"(steps {', '.join(map(str, sorted(candidates)))})"
            )
        return None

    def set_aside_unsound(self) -> None:
        """Moves what `restore` passed over to `unsound/`, so that its steps can be saved anew."""
        for step in self._unsound if jax.process_index() == 0 else ():
            aside = self._path.with_name("unsound") / str(step)
            aside.parent.mkdir(exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            (self._path / str(step)).replace(aside)
        self._unsound.clear()
        distributed.all_say(True)  # nobody looks before process 0 is done
        self._manager.reload()

    def newest(self) -> int | None:
        """The step of the newest checkpoint, sound or not."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The step of the checkpoint with the best accuracy, or None where none was evaluated."""
        evaluated = [
            (metrics["accuracy"], step)
            for step in self._manager.all_steps()
            if (metrics := self._manager.metrics(step)) is not None
        ]
        return max(evaluated)[1] if evaluated else None

    def close(self) -> None:
        """Waits for the last save; raises if it failed."""
        self._manager.wait_until_finished()
        self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self.close()

    def _clear_unfinished(self) -> None:
        """Gives back the space of a save that failed."""
        for _ in range(20):  # its other writers may still be at it
            found = list(self._path.glob("*.orbax-checkpoint-tmp*"))
            if not found:
                break
            for unfinished in found:
                shutil.rmtree(unfinished, ignore_errors=True)
            time.sleep(0.05)
        self._manager.reload()

    def _restore_step(self, step: int, like: TrainState) -> tuple[TrainState | None, str]:
        """That checkpoint, or None and why; the same in all processes."""
        restored, reason = None, "another process could not read it"
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(like), manifest=ocp.args.JsonRestore()
                ),
            )
        except Exception as error:  # Orbax raises whatever its readers raise
            reason = _first_line(error)
        if not distributed.all_say(restored is not None):
            return None, reason
        assert restored is not None
        found, stored = checksums(restored["state"]), restored["manifest"]["checksums"]
        damaged = [name for name in found if found[name] != stored.get(name)]
        reason = "another process read damaged arrays"
        if found.keys() != stored.keys():
            reason = f"{len(stored)} arrays were saved, {len(found)} were read"
        elif damaged:
            reason = f"{len(damaged)} of {len(found)} arrays are damaged, the first: {damaged[0]}"
        sound = distributed.all_say(found == stored)
        saved_on = restored["manifest"]["saved_on"]
        self.saved_on = None if saved_on == _machine() else saved_on
        return (restored["state"], "") if sound else (None, reason)


def _machine() -> str:
    devices, processes = jax.device_count(), jax.process_count()
    kind = f"{devices} {jax.devices()[0].platform} device{'s' if devices > 1 else ''}"
    return f"{kind} in {processes} process{'es' if processes > 1 else ''}"


def _accuracy(metrics: Mapping[str, Any]) -> float:
    return metrics["accuracy"]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
