"""A run's directory: its configuration, and the paths of what else is in it.

config.json        the configuration, as the run began
checkpoints/       one directory a checkpoint, named by its step
unsound/           those that were found damaged, if there ever were any
metrics.jsonl      one JSON object a report
tensorboard/       the same for TensorBoard
curves.png         the same as a picture
report.html        the same as a page, with the configuration and the machine
profile/           a trace, if one was asked for
owner.json         whose it is, while a run is at work
"""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator

from ml_collections import ConfigDict

from repvgg_jax.cluster import lock
from repvgg_jax.text import differences
from repvgg_jax.train.config import from_plain, plain


@dataclasses.dataclass(frozen=True)
class Workdir:
    """Paths in a run's directory, and the rule that it belongs to one configuration."""

    path: pathlib.Path

    @property
    def config(self) -> pathlib.Path:
        """The configuration, as the run began."""
        return self.path / "config.json"

    @property
    def checkpoints(self) -> pathlib.Path:
        """Checkpoints, by step."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> pathlib.Path:
        """One JSON object a report."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> pathlib.Path:
        """TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def curves(self) -> pathlib.Path:
        """A picture of the metrics."""
        return self.path / "curves.png"

    @property
    def page(self) -> pathlib.Path:
        """All of a run on one page."""
        return self.path / "report.html"

    @property
    def profile(self) -> pathlib.Path:
        """Traces of the steps that were profiled."""
        return self.path / "profile"

    @contextlib.contextmanager
    def claimed(self, config: ConfigDict) -> Iterator[None]:
        """A context in which the directory is this configuration's and nobody else's.

        Args:
          config: of the run.

        Raises:
          ValueError: it is another configuration's, holds other things, or is in use.
          OSError: it cannot be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with lock.locked(self.path):
            self.claim(config)
            yield

    def claim(self, config: ConfigDict) -> None:
        """Makes the directory this configuration's, or finds that it is already.

        Raises:
          ValueError: it is another configuration's, or holds other things.
          OSError: it cannot be written.
        """
        if self.config.exists():
            changed = differences(plain(self.read_config()), plain(config))
            if changed:
                raise ValueError(
                    f"{self.path} holds a run with another configuration: {'; '.join(changed)}. "
                    "Give another --workdir, or the configuration that the run began with"
                )
            return
        self.path.mkdir(parents=True, exist_ok=True)
        if others := sorted(e.name for e in self.path.iterdir() if e.name != lock.FILE):
            raise ValueError(
                f"{self.path} is no run's directory (it has no config.json) but holds "
                f"{', '.join(others[:5])}{', …' if len(others) > 5 else ''}; give another --workdir"
            )
        write_atomically(self.config, json.dumps(plain(config), indent=2) + "\n")

    def read_config(self) -> ConfigDict:
        """The configuration, as the run began.

        Raises:
          ValueError: there is none, or it cannot be read.
        """
        if not self.path.is_dir():
            raise ValueError(f"{self.path} does not exist; give the --workdir of a training run")
        if not self.config.exists():
            raise ValueError(
                f"{self.path} is no run's directory: it has no config.json; "
                "give the --workdir of a training run"
            )
        try:
            return from_plain(json.loads(self.config.read_text()))
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.config} cannot be read: {error}") from error


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes a file that is, whatever happens, either the old one or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
