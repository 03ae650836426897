"""Attempts to save that the processes of a run make together: all succeed, or all hear why not.

Orbax's processes wait for each other while they write. One that fails goes on alone, and the
others would wait for it until a time runs out, twenty minutes, and time and again.
"""

import collections
import itertools
import time

import jax

from repvgg_jax.cluster import consensus as distributed
from repvgg_jax.cluster import kv_store as coordination

# Where Orbax's processes meet while they write, and where they meet when they are done, whether
# they have written or failed; the second time, as they meet there before they write, too.
_WHILE_WRITING = "async_"
_DONE = "set_value_start#2"

_FOR_ANOTHER = " has failed"  # how a failure reads that is the consequence of another's


class Attempts:
    """The attempts to save of one run; its processes make the same ones in the same order."""

    _made = itertools.count()  # so that the keys of two are never the same

    def __init__(self) -> None:
        self._name = f"saves{next(self._made)}"
        self._number, self._verdicts = 0, 0
        self._met = collections.Counter[str]()

    def begin(self) -> None:
        """Begins the next attempt."""
        self._number += 1
        self._met.clear()
        if self._number > 2 and distributed.is_first():
            # A long run's would add up, and nobody is there any more.
            for kind in ("words", "places"):
                coordination.forget(self._folder(kind, self._number - 2))

    def verdict(self, failure: str | None) -> str | None:
        """Waits for what all processes say of the attempt so far.

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
        question = f"{self._folder('words', self._number)}/{self._verdicts}"
        words = distributed.all_words(question, failure or "")
        failed = [f"process {process}: {word}" for process, word in enumerate(words) if word]
        causes = [line for line in failed if not line.endswith(_FOR_ANOTHER)]
        return "; ".join(causes or failed) or None

    def meet(self, *, key: str, timeout_ms: int) -> None:
        """Waits for all processes, or until one cannot come any more; Orbax calls this.

        Args:
          key: of the place to meet.
          timeout_ms: milliseconds.

        Raises:
          OSError: one has failed.
          TimeoutError: one did not come in time.
        """
        count = jax.process_count()
        if count == 1:
            return
        self._met[key] += 1
        place, deadline = f"{key}#{self._met[key]}", time.monotonic() + timeout_ms / 1000
        self._put(place, "here")
        while True:
            found = coordination.entries(self._folder("places", self._number))
            missing = [i for i in range(count) if f"{i}/{place}" not in found]
            if not missing:
                return
            for process in missing:
                done = any(
                    name.startswith(f"{process}/") and name.endswith(_DONE) for name in found
                )
                if f"{process}/failed" in found or (_WHILE_WRITING in key and done):
                    raise OSError(f"process {process}{_FOR_ANOTHER}")
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"process {missing[0]} took more than {timeout_ms // 1000} s to write its part"
                )
            time.sleep(max(0.05, count / 128))

    def _put(self, place: str, word: str) -> None:
        folder = self._folder("places", self._number)
        coordination.put(f"{folder}/{jax.process_index()}/{place}", word)

    def _folder(self, kind: str, number: int) -> str:
        return f"{self._name}/{kind}/{number}"
