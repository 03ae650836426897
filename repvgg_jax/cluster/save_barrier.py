"""Saves that all processes of a run make together: all succeed, or all learn why not.

Orbax's processes wait for each other while they write. If one fails it goes on alone, and the
others would wait for it until a timeout of twenty minutes, several times.
"""

import collections
import itertools
import time

import jax

from repvgg_jax.cluster import consensus
from repvgg_jax.cluster.kv_store import Folder

# Keys of Orbax's barriers: while it writes, and when it is done, written or failed; it passes the
# latter once before it writes, so the second time counts.
_WHILE_WRITING = "async_"
_DONE = "set_value_start#2"

_FOLLOWS = " has failed"  # the end of a failure that only follows from another process's


class SaveBarrier:
    """The saves of one run; its processes make the same ones in the same order."""

    _count = itertools.count()  # so that keys of two instances differ

    def __init__(self) -> None:
        self._name = f"saves{next(self._count)}"
        self._save, self._verdicts = 0, 0
        self._passed = collections.Counter[str]()

    def begin(self) -> None:
        """Begins the next save, or the next attempt of one."""
        self._save += 1
        self._passed.clear()
        if self._save > 2 and jax.process_count() > 1 and jax.process_index() == 0:
            # Delete keys of finished saves; they would accumulate in long runs.
            for kind in ("verdicts", "barriers"):
                self._folder(kind, self._save - 2).delete()

    def verdict(self, failure: str | None) -> str | None:
        """Waits for the outcome of the save so far in all processes.

        Args:
          failure: why this process failed; None if it did not.

        Returns:
          Which processes failed and why; None if none did.
        """
        if jax.process_count() == 1:
            return failure
        if failure is not None:
            self._put("failed", failure)
        self._verdicts += 1
        name = f"{self._name}/verdicts/{self._save}/{self._verdicts}"
        answers = consensus.gather(name, failure or "")
        failed = [f"process {process}: {text}" for process, text in enumerate(answers) if text]
        causes = [line for line in failed if not line.endswith(_FOLLOWS)]
        return "; ".join(causes or failed) or None

    def wait(self, *, key: str, timeout_ms: int) -> None:
        """Waits for all processes, or until one cannot come any more; called by Orbax.

        Args:
          key: of the barrier.
          timeout_ms: milliseconds.

        Raises:
          OSError: a process has failed.
          TimeoutError: a process did not come in time.
        """
        count = jax.process_count()
        if count == 1:
            return
        self._passed[key] += 1
        barrier = f"{key}#{self._passed[key]}"
        deadline = time.monotonic() + timeout_ms / 1000
        self._put(barrier, "here")
        while True:
            found = self._folder("barriers", self._save).entries()
            missing = [i for i in range(count) if f"{i}/{barrier}" not in found]
            if not missing:
                return
            for process in missing:
                done = any(
                    name.startswith(f"{process}/") and name.endswith(_DONE) for name in found
                )
                if f"{process}/failed" in found or (_WHILE_WRITING in key and done):
                    raise OSError(f"process {process}{_FOLLOWS}")
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"process {missing[0]} took more than {timeout_ms // 1000} s to write its part"
                )
            time.sleep(max(0.05, count / 128))

    def _put(self, key: str, text: str) -> None:
        self._folder("barriers", self._save).put(f"{jax.process_index()}/{key}", text)

    def _folder(self, kind: str, save: int) -> Folder:
        return Folder(f"{self._name}/{kind}/{save}")
