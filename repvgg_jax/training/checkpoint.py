"""Checkpoints: Orbax, and what it leaves out.

Orbax restores flipped bytes without a word and does not step back from a checkpoint that it
cannot read. Here every array has a checksum, and the newest *sound* checkpoint is used;
those that are not are named.
"""

import logging
import pathlib
import shutil
import types
import zlib
from collections.abc import Callable
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from repvgg_jax.training import distributed
from repvgg_jax.training.state import TrainState


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last one."""

    def __init__(
        self, path: pathlib.Path, *, keep: int = 3, say: Callable[[str], None] = logging.warning
    ):
        """Opens a directory of checkpoints.

        Args:
          path: the directory; made when the first one is saved.
          keep: how many of the newest to keep.
          say: told, in a line, of every checkpoint that is not sound.
        """
        self._say = say
        # Orbax reports its progress on the logger that warnings share; its failures are
        # raised anyway.
        logging.getLogger("absl").setLevel(logging.ERROR)
        self._manager = ocp.CheckpointManager(
            path.absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=False),
            item_names=("state", "checksums"),
        )
        self._path = path
        self._unsound: list[int] = []

    def save(self, state: TrainState) -> None:
        """Saves in the background; an earlier save that failed raises here."""
        self._path.mkdir(parents=True, exist_ok=True)
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), checksums=ocp.args.JsonSave(checksums(state))
            ),
        )

    def restore(self, like: TrainState) -> TrainState | None:
        """The newest sound checkpoint, or None where there is none at all.

        Args:
          like: a state of the same structure, concrete or of `jax.ShapeDtypeStruct`s with
            shardings.

        Raises:
          ValueError: there are checkpoints, but not one is sound.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            reason = "another process could not read it"
            state = None
            try:
                state = self._restore_step(step, like)
            except Exception as error:  # Orbax raises whatever its readers raise
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            # All processes continue from the same one.
            if distributed.all_say(state is not None):
                return state
            self._unsound.append(step)
            self._say(
                f"checkpoint {self._path / str(step)} is not sound and is passed over: {reason}"
            )
        if steps:
            raise ValueError(
                f"none of the {len(steps)} checkpoints in {self._path} is sound "
                f"(steps {', '.join(map(str, sorted(steps)))})"
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

    def _restore_step(self, step: int, like: TrainState) -> TrainState:
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(like), checksums=ocp.args.JsonRestore()
            ),
        )
        found, stored = checksums(restored["state"]), restored["checksums"]
        if found.keys() != stored.keys():
            raise ValueError(f"{len(stored)} arrays were saved, {len(found)} were read")
        if damaged := [name for name in found if found[name] != stored[name]]:
            raise ValueError(
                f"{len(damaged)} of {len(found)} arrays are damaged, the first: {damaged[0]}"
            )
        return restored["state"]


def checksums(tree: Any) -> dict[str, str]:
    """A CRC-32 of every array, by its path in the tree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{_crc(_whole(leaf)):08x}"
        for path, leaf in leaves
    }


def _whole(leaf: Any) -> np.ndarray:
    """The array, also where other processes hold parts of it."""
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        assert isinstance(leaf.sharding, NamedSharding)
        everywhere = NamedSharding(leaf.sharding.mesh, PartitionSpec())
        leaf = jax.jit(lambda array: array, out_shardings=everywhere)(leaf)
    return np.asarray(leaf)


def _crc(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
