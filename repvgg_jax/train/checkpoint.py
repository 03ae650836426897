"""Checkpoints: Orbax, hardened.

Orbax restores flipped bytes silently, does not fall back from a checkpoint that it cannot read,
and does not retry if a disk is full for a moment. Here every array has a checksum, the newest
*valid* checkpoint is restored, corrupt ones are logged, and a failed save is retried.
"""

import functools
import logging
import pathlib
import shutil
import time
import types
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar

import jax
import orbax.checkpoint as ocp

from repvgg_jax import files
from repvgg_jax.cluster import consensus
from repvgg_jax.cluster.consensus import SaveBarrier
from repvgg_jax.text import first_few
from repvgg_jax.train import orbax
from repvgg_jax.train.manifest import Manifest, checksums, topology
from repvgg_jax.train.state import TrainState

_T = TypeVar("_T")
_log = logging.getLogger(__name__)

RETRIES = 3  # of a failed save, before the run stops
_DELETED = "deleted"  # holds checkpoints that are being removed


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last save.

    The newest `keep` are kept, and the one with the best validation accuracy. Corrupt checkpoints
    and failed saves are logged as warnings, by process 0.

    Attributes:
      saved_on: devices and processes that saved what `restore` returned, e.g. `8 cpu devices in
        1 process`, if they differ from this run's; else None.
    """

    def __init__(self, path: pathlib.Path, *, keep: int = 3, pause: float = 2.5):
        """Opens a directory of checkpoints.

        Args:
          path: the directory; created by the first save, in a directory that exists.
          keep: how many of the newest to keep.
          pause: seconds before the first retry of a save; the next ones wait twice and three
            times as long.
        """
        self._pause = pause
        orbax.be_quiet()
        self._path = path
        self._accuracies = {
            step: manifest.accuracy
            for step in self._on_disk()
            if (manifest := self._manifest(step)[0]) is not None
        }
        self._keep, self._barrier = keep, SaveBarrier()
        self._pending: int | None = None  # the step that is being saved in the background
        self._corrupt: list[int] = []
        self._restored: int | None = None
        self.saved_on: str | None = None
        self._manager = self._open()

    def save(self, state: TrainState, *, accuracy: float | None = None, wait: bool = False) -> None:
        """Saves in the background; what is on disk stays until the new checkpoint is complete.

        If a save fails in any process, all processes retry it, three times. A failure in the
        background shows at the next save, which is its first retry: the old state is gone.

        Args:
          state: to save.
          accuracy: validation accuracy, if the state was evaluated.
          wait: return only when it is on disk.

        Raises:
          OSError: it failed, and so did all retries.
        """
        step, failures = int(state.step), 0
        self._accuracies[step] = accuracy
        reason = self._failure(self._manager.wait_until_finished)
        if reason is not None:
            failures = 1
            self._prepare_retry(self._pending, step, failures, reason)
        self._remove_deleted()
        while (reason := self._try(state, accuracy, wait=wait or failures > 0)) is not None:
            failures += 1
            self._prepare_retry(step, step, failures, reason)
        # A retry is never in the background, where its failure would show too late.
        self._pending = None if wait or failures else step

    def restore(self, like: TrainState, *, step: int | None = None) -> TrainState | None:
        """Restores the newest valid checkpoint; None if there are no checkpoints.

        Args:
          like: a state of the same structure, concrete or of `jax.ShapeDtypeStruct`s with
            shardings.
          step: of the checkpoint; None for the newest.

        Raises:
          ValueError: all checkpoints are corrupt, there is none of that step, or the newest valid
            one is of another network or optimizer.
        """
        found = self._newest_valid(lambda candidate, _: self._read(candidate, like), step, like)
        if found is None:
            return None
        self._restored, manifest, state = found
        self.saved_on = None if manifest.saved_on == topology() else manifest.saved_on
        return state

    def restore_variables(self, step: int | None = None) -> tuple[int, dict[str, Any]]:
        """Restores the network's variables only; needs no model, optimizer or data.

        The moving averages, if the run kept them, else the trained variables. Only these arrays
        are read, and only their checksums are verified.

        Args:
          step: of the checkpoint; None for the newest valid one.

        Returns:
          The step and `{"params": …, "batch_stats": …}` of NumPy arrays, in every process.

        Raises:
          ValueError: there are no checkpoints, all are corrupt, or there is none of that step.
        """

        def read(candidate: int, manifest: Manifest) -> dict[str, Any]:
            return self._read(candidate, manifest.abstract_variables(), partial=True)

        found = self._newest_valid(read, step)
        if found is None:
            raise ValueError(f"{self._path} holds no checkpoint yet; train there first")
        newest, _, variables = found
        return newest, variables.get("ema", variables)

    def tidy(self) -> None:
        """Moves what `restore` skipped to `unsound/`, so that its steps can be saved again.

        Also removes what a process left that was killed while it saved: half a checkpoint, or an
        older one that was about to go. No other process may be saving.
        """
        self._remove_deleted()
        self._remove_unfinished()
        for step in self._corrupt if _is_first() else ():
            aside = self._path.with_name("unsound") / str(step)
            aside.parent.mkdir(exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            (self._path / str(step)).replace(aside)
        steps = self._on_disk()
        if steps and steps[0] == self._restored and _is_first():  # the newest one is valid
            for step in {*steps[self._keep :]} - {self._best_of(steps)}:
                (self._path / _DELETED).mkdir(exist_ok=True)
                (self._path / str(step)).replace(self._path / _DELETED / str(step))
            self._remove_deleted()
        consensus.all_true(True)  # wait for process 0
        self._manager.reload()
        if self._corrupt:
            self._corrupt.clear()
            self._manager.close()
            self._manager = self._open()

    def newest(self) -> int | None:
        """The step of the newest checkpoint, valid or not."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The step of the checkpoint with the best accuracy; None if none was evaluated."""
        return self._best_of(self._manager.all_steps())

    def accuracy(self, step: int) -> float | None:
        """The validation accuracy of the checkpoint of that step, if it was evaluated."""
        return self._accuracies.get(step)

    def last_good(self) -> str:
        """What a run that fails falls back to, in words."""
        newest = self.newest()
        if newest is None:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is that of step {newest}"

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
        self._remove_deleted()

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
            _warn(str(late))  # the other error is the one that ends the run

    def _read(self, step: int, like: Any, *, partial: bool = False) -> Any:
        """The arrays of a checkpoint; with `partial`, only those that `like` has."""
        wanted = ocp.args.PyTreeRestore(
            like,
            restore_args=ocp.checkpoint_utils.construct_restore_args(like),
            partial_restore=partial,
        )
        return self._manager.restore(step, args=ocp.args.Composite(state=wanted))["state"]

    def _open(self) -> ocp.CheckpointManager:
        policies, several = ocp.checkpoint_managers, jax.process_count() > 1
        # With the processes named, Orbax synchronizes in the coordination service and not by
        # collectives, which hang if one process fails.
        processes = ocp.options.MultiprocessingOptions(
            active_processes=set(range(jax.process_count())) if several else None,
            barrier_sync_key_prefix="repvgg_jax" if several else None,
        )
        return ocp.CheckpointManager(
            self._path.absolute(),
            options=ocp.CheckpointManagerOptions(
                # Not Orbax's own best-checkpoint policy: it reads metrics files that may be
                # damaged before anyone can say which.
                preservation_policy=policies.AnyPreservationPolicy(
                    [policies.LatestN(self._keep), orbax.Best(self._best_of)]
                ),
                temporary_path_class=orbax.DurablePath,
                # Renaming is atomic, removing is not: a kill would leave half a checkpoint.
                todelete_subdir=_DELETED,
                lightweight_initialize=True,
                create=False,
                async_options=ocp.options.AsyncOptions(barrier_sync_fn=self._barrier.wait),
                multiprocessing_options=processes,
            ),
            item_handlers=orbax.handlers(processes),
        )

    def _failure(self, action: Callable[[], Any]) -> str | None:
        """Runs `action`; returns why it failed in this process or another, or None."""
        reason = None
        try:
            action()
        except Exception as error:  # Orbax raises whatever its writers raise
            reason = _first_line(error)
        return self._barrier.verdict(reason)

    def _try(self, state: TrainState, accuracy: float | None, *, wait: bool) -> str | None:
        """Starts a save, or saves; returns why that failed, or None."""

        def save() -> None:
            self._manager.save(
                int(state.step),
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state),
                    manifest=ocp.args.JsonSave(Manifest.of(state, accuracy).content()),
                ),
            )
            if wait:
                self._manager.wait_until_finished()

        self._barrier.begin()
        # Not its parents: a run directory that somebody has removed must not come back half.
        make_directory = functools.partial(self._path.mkdir, exist_ok=True)
        return self._failure(make_directory) or self._failure(save)

    def _prepare_retry(self, failed: int | None, step: int, failures: int, reason: str) -> None:
        """Cleans up after a failed save and pauses; raises OSError after the last retry."""
        self._clear_unfinished()
        if failures > RETRIES:
            raise OSError(
                f"saving at step {step} failed {failures} times; {self.last_good()}: {reason}"
            )
        instead = "" if failed == step else f" with step {step}"
        _warn(f"saving at step {failed} failed, trying again{instead}: {reason}")
        time.sleep(self._pause * failures)

    def _clear_unfinished(self) -> None:
        """Frees the space of a failed save."""
        for _ in range(20 if _is_first() else 0):  # its writers may still be running
            if not self._remove_unfinished():
                break
            time.sleep(0.05)
        self._barrier.verdict(None)  # wait for process 0
        self._manager.reload()

    def _remove_unfinished(self) -> bool:
        """Removes checkpoints that are not complete; whether there were any."""
        found = list(self._path.glob("*.orbax-checkpoint-tmp*")) if _is_first() else []
        for unfinished in found:
            files.remove(unfinished)
        return bool(found)

    def _remove_deleted(self) -> None:
        """Removes the files of checkpoints that are no longer kept."""
        if _is_first():
            files.remove(self._path / _DELETED)

    def _on_disk(self) -> list[int]:
        """Steps of all checkpoints, newest first, including those that Orbax does not list."""
        found = self._path.iterdir() if self._path.is_dir() else ()
        return sorted((int(entry.name) for entry in found if entry.name.isdecimal()), reverse=True)

    def _best_of(self, steps: Sequence[int]) -> int | None:
        known = [
            (accuracy, step)
            for step in steps
            if (accuracy := self._accuracies.get(step)) is not None
        ]
        return max(known)[1] if known else None

    def _manifest(self, step: int) -> tuple[Manifest | None, str]:
        """The manifest of that checkpoint, or None and the reason."""
        try:
            return Manifest.read(self._path / str(step)), ""
        except (OSError, ValueError) as error:
            return None, f"its manifest cannot be read: {_first_line(error)}"

    def _newest_valid(
        self, read: Callable[[int, Manifest], _T], step: int | None, like: Any = None
    ) -> tuple[int, Manifest, _T] | None:
        """Step, manifest and arrays of the newest checkpoint that is valid in all processes."""
        steps = self._on_disk()
        if step is not None and step not in steps:
            found = first_few(sorted(steps), 10) or "none"
            raise ValueError(
                f"{self._path} has no checkpoint of step {step}; there are those of {found}"
            )
        candidates = steps if step is None else [step]
        for candidate in candidates:
            manifest, reason = self._manifest(candidate)
            if consensus.all_true(manifest is not None):
                assert manifest is not None
                if like is not None and (difference := manifest.difference(like)):
                    raise ValueError(
                        f"checkpoint {self._path / str(candidate)} is of another network or "
                        f"optimizer: {difference}"
                    )
                tree, reason = self._read_verified(read, candidate, manifest)
                if tree is not None:
                    return candidate, manifest, tree
            reason = reason or "another process could not read its manifest"
            self._corrupt.append(candidate)
            _warn(f"checkpoint {self._path / str(candidate)} is corrupt and is skipped: {reason}")
        if candidates:
            raise ValueError(
                f"all {len(candidates)} checkpoints in {self._path} are corrupt "
                f"(steps {first_few(sorted(candidates), 10)})"
            )
        return None

    def _read_verified(
        self, read: Callable[[int, Manifest], _T], step: int, manifest: Manifest
    ) -> tuple[_T | None, str]:
        """Reads arrays and verifies their checksums; None and the reason if either fails."""
        tree, reason = None, "another process could not read it"
        try:
            tree = read(step, manifest)
        except Exception as error:  # Orbax raises whatever its readers raise
            reason = f"it cannot be read: {_first_line(error)}"
        if not consensus.all_true(tree is not None):
            return None, reason
        sums = checksums(tree)
        damaged = [name for name in sums if sums[name] != manifest.checksums.get(name)]
        reason = "another process read damaged arrays"
        if damaged:
            reason = f"{len(damaged)} of {len(sums)} arrays are damaged, e.g. {damaged[0]}"
        return (tree if consensus.all_true(not damaged) else None), reason


def _is_first() -> bool:
    return jax.process_index() == 0


def _warn(message: str) -> None:
    """Logs what all processes agree on, once."""
    if _is_first():
        _log.warning("%s", message)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
