"""Checkpoints: Orbax, and what it leaves out.

Orbax restores flipped bytes without a word, does not step back from a checkpoint that it
cannot read, and does not try again when a disk is full for a moment. Here every array has a
checksum, the newest *sound* checkpoint is used, those that are not are named, and a save that
fails is tried again.
"""

import functools
import logging
import pathlib
import shutil
import time
import types
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from repvgg_jax.cluster import consensus as distributed
from repvgg_jax.cluster.save_barrier import Attempts
from repvgg_jax.train import leftovers
from repvgg_jax.train.checksum import checksums
from repvgg_jax.train.manifest import Manifest, machine
from repvgg_jax.train.state import TrainState

RETRIES = 3  # of a save that failed, before the run stops


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last one.

    The newest `keep` stay, and the one with the best accuracy of those that were evaluated.

    Attributes:
      say: told, in a line, of every checkpoint that is not sound and every failed save.
      saved_on: how many devices and processes saved what `restore` returned, in words, where
        these were others than now.
    """

    def __init__(
        self,
        path: pathlib.Path,
        *,
        keep: int = 3,
        say: Callable[[str], None] = logging.warning,
        pause: float = 2.5,
    ):
        """Opens a directory of checkpoints.

        Args:
          path: the directory; made when the first one is saved.
          keep: how many of the newest to keep.
          say: the attribute.
          pause: seconds before the first retry of a save; those after it wait twice and three
            times as long.
        """
        self.say = say
        self._pause = pause
        # Orbax reports its progress, and failures that are raised anyway, on this logger.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        leftovers.hush()
        self._path = path
        self._accuracies = {
            step: manifest.accuracy
            for step in self._on_disk()
            if (manifest := self._manifest(step)[0]) is not None
        }
        self._keep, self._attempts = keep, Attempts()
        self._pending: int | None = None  # the step that is being saved in the background
        self._unsound: list[int] = []
        self.saved_on: str | None = None
        self._manager = self._open()

    def save(self, state: TrainState, *, accuracy: float | None = None, wait: bool = False) -> None:
        """Saves in the background; what is there stays until the new one is whole.

        A save that fails in any process is tried again by all of them, three times. One that
        failed in the background is: its state is gone, so this newer one is the retry.

        Args:
          state: to save.
          accuracy: of its evaluation, if it was evaluated.
          wait: until it is on disk. Otherwise a failure shows at the next save.

        Raises:
          OSError: it failed, and so did all retries.
        """
        step, failures = int(state.step), 0
        self._accuracies[step] = accuracy
        reason = self._failure(self._manager.wait_until_finished)
        if reason is not None:
            failures = 1
            self._prepare_retry(self._pending, step, failures, reason)
        while (reason := self._try(state, accuracy, wait=wait or failures > 0)) is not None:
            failures += 1
            self._prepare_retry(step, step, failures, reason)
        # Nobody would see in time that a retry in the background failed, too.
        self._pending = None if wait or failures else step

    def restore(self, like: TrainState, *, step: int | None = None) -> TrainState | None:
        """The newest sound checkpoint, or None where there is none at all.

        Args:
          like: a state of the same structure, concrete or of `jax.ShapeDtypeStruct`s with
            shardings.
          step: that of this step, instead of the newest.

        Raises:
          ValueError: there are checkpoints, but not one is sound, or none of that step, or the
            newest sound one is that of another network or optimiser.
        """
        steps = self._on_disk()
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
            self.say(
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
        distributed.all_say(True)  # nobody looks before process 0 is done
        if self._unsound:
            self._unsound.clear()
            self._manager.close()
            self._manager = self._open()

    def newest(self) -> int | None:
        """The step of the newest checkpoint, sound or not."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The step of the checkpoint with the best accuracy, or None where none was evaluated."""
        return self._best_of(self._manager.all_steps())

    def close(self) -> None:
        """Waits for the last save.

        Raises:
          OSError: it failed.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # Orbax raises whatever its writers raise
            raise OSError(f"saving at step {self._pending} failed: {_first_line(error)}") from error
        self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        try:
            self.close()
        except OSError as late:
            if error is None:
                raise
            self.say(str(late))  # what ends the run is the other one

    def _open(self) -> ocp.CheckpointManager:
        policies, together = ocp.checkpoint_managers, jax.process_count() > 1
        return ocp.CheckpointManager(
            self._path.absolute(),
            options=ocp.CheckpointManagerOptions(
                # Not Orbax's own policy for the best, whose files of metrics it reads before
                # anyone can say which of them is damaged; nor does it read what is left of those.
                preservation_policy=policies.AnyPreservationPolicy(
                    [policies.LatestN(self._keep), _Best(self._best_of)]
                ),
                lightweight_initialize=True,
                create=False,
                async_options=ocp.options.AsyncOptions(barrier_sync_fn=self._attempts.meet),
                # Without the processes they would meet in collectives, in which those that come
                # hang where one does not.
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    active_processes=set(range(jax.process_count())) if together else None,
                    barrier_sync_key_prefix="repvgg_jax" if together else None,
                ),
            ),
            item_names=("state", "manifest"),
        )

    def _failure(self, action: Callable[[], Any]) -> str | None:
        """Does it, and says why it failed, in this process or another; None if it did not."""
        reason = None
        try:
            action()
        except Exception as error:  # Orbax raises whatever its writers raise
            reason = _first_line(error)
        return self._attempts.verdict(reason)

    def _try(self, state: TrainState, accuracy: float | None, *, wait: bool) -> str | None:
        """Begins to save, or saves; returns why that failed, if it did."""

        def save() -> None:
            self._manager.save(
                int(state.step),
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    manifest=ocp.args.JsonSave(Manifest.of(state, accuracy).content()),
                ),
            )
            if wait:
                self._manager.wait_until_finished()

        self._attempts.begin()
        make_directory = functools.partial(self._path.mkdir, parents=True, exist_ok=True)
        return self._failure(make_directory) or self._failure(save)

    def _prepare_retry(self, failed: int | None, step: int, failures: int, reason: str) -> None:
        """Cleans up after a failed save at one step and waits; raises where it was the last."""
        self._clear_unfinished()
        if failures > RETRIES:
            newest = self._manager.latest_step()
            raise OSError(
                f"saving at step {step} failed {failures} times; the last good checkpoint "
                f"is {'none' if newest is None else f'that of step {newest}'}: {reason}"
            )
        instead = "" if failed == step else f" with step {step}"
        self.say(f"saving at step {failed} failed, trying again{instead}: {reason}")
        time.sleep(self._pause * failures)

    def _clear_unfinished(self) -> None:
        """Gives back the space of a save that failed."""
        for _ in range(20 if distributed.is_first() else 0):  # other writers may still be at it
            found = list(self._path.glob("*.orbax-checkpoint-tmp*"))
            if not found:
                break
            for unfinished in found:
                shutil.rmtree(unfinished, ignore_errors=True)
            time.sleep(0.05)
        self._attempts.verdict(None)  # nobody looks before process 0 is done
        self._manager.reload()

    def _on_disk(self) -> list[int]:
        """Steps of all checkpoints, newest first; Orbax passes over unfinished ones in silence."""
        found = self._path.iterdir() if self._path.is_dir() else ()
        return sorted((int(entry.name) for entry in found if entry.name.isdigit()), reverse=True)

    def _best_of(self, steps: Sequence[int]) -> int | None:
        known = [
            (accuracy, step)
            for step in steps
            if (accuracy := self._accuracies.get(step)) is not None
        ]
        return max(known)[1] if known else None

    def _manifest(self, step: int) -> tuple[Manifest | None, str]:
        """What that checkpoint says of itself, or None and why not."""
        try:
            return Manifest.read(self._path / str(step)), ""
        except (OSError, ValueError) as error:
            return None, f"its manifest cannot be read: {_first_line(error)}"

    def _restore_step(self, step: int, like: TrainState) -> tuple[TrainState | None, str]:
        """That checkpoint, or None and why; the same in all processes."""
        manifest, reason = self._manifest(step)
        if not distributed.all_say(manifest is not None):
            return None, reason or "another process could not read its manifest"
        assert manifest is not None
        if difference := manifest.difference(like):
            raise ValueError(
                f"checkpoint {self._path / str(step)} is of another network or optimiser: "
                f"{difference}"
            )
        restored, reason = None, "another process could not read it"
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like))
            )["state"]
        except Exception as error:  # Orbax raises whatever its readers raise
            reason = f"it cannot be read: {_first_line(error)}"
        if not distributed.all_say(restored is not None):
            return None, reason
        assert restored is not None
        found, stored = checksums(restored), manifest.checksums
        damaged = [name for name in found if found[name] != stored.get(name)]
        reason = "another process read damaged arrays"
        if found.keys() != stored.keys():
            reason = f"{len(stored)} arrays were saved, {len(found)} were read"
        elif damaged:
            reason = f"{len(damaged)} of {len(found)} arrays are damaged, the first: {damaged[0]}"
        if not distributed.all_say(found == stored):
            return None, reason
        self.saved_on = None if manifest.saved_on == machine() else manifest.saved_on
        return restored, ""


class _Best:
    """Orbax's question which checkpoints to keep, answered with the best one."""

    def __init__(self, best_of: Callable[[Sequence[int]], int | None]):
        self._best_of = best_of

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Which of these to keep."""
        best = self._best_of([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step == best for checkpoint in checkpoints]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
