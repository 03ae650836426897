"""train.py that kills itself: `python -m tests.helpers.killed PLACE COUNT ARGUMENT…`.

At the COUNT-th time that it comes to PLACE, one of `PLACES`, it sends itself SIGKILL.
"""

import functools
import importlib
import os
import pathlib
import signal
import sys

# Where to die: before or after this method of this class.
PLACES = {
    "restoring": ("checkpoint", "Checkpoints", "restore", "before"),
    "stepping": ("loop", "CompiledStep", "__call__", "after"),
    "reporting": ("metrics", "MetricsWriter", "write", "after"),
    "saving": ("checkpoint", "Checkpoints", "save", "after"),  # in the background
}


def deadly(place: str, count: int) -> None:
    """Patches the method of a place."""
    module_name, class_name, name, when = PLACES[place]
    owner = getattr(importlib.import_module(f"repvgg_jax.train.{module_name}"), class_name)
    real, left = getattr(owner, name), [count]

    @functools.wraps(real)
    def method(*args, **options):
        left[0] -= 1
        if when == "before" and not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **options)
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, method)


if __name__ == "__main__":
    from repvgg_jax.train import command

    deadly(sys.argv[1], int(sys.argv[2]))
    root = pathlib.Path(__file__).resolve().parents[2]
    sys.argv = ["train.py", *sys.argv[3:]]
    command.run(root / "configs" / "digits.py")
