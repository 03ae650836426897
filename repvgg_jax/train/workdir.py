"""A run directory, its paths, and the rule that it belongs to one configuration.

`FILES` describes what is in it, which `README.txt` there repeats.
"""

import contextlib
import dataclasses
import json
import logging
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, Self

from repvgg_jax import files
from repvgg_jax.cluster import lock
from repvgg_jax.data.identity import DataIdentity
from repvgg_jax.files import write_text
from repvgg_jax.normalize import Normalize
from repvgg_jax.text import differences, first_few, one_line
from repvgg_jax.train.settings import Settings
from repvgg_jax.typed import typed

FILES = """\
config.json        the configuration
metadata.json      classes, image shapes and normalization: what using the weights takes; what
                   tells the run's data from others
scales.safetensors of a RepOptimizer: the scales that the run trains with
checkpoints/       one directory per checkpoint, named by its step
unsound/           checkpoints that were found corrupt, if any
metrics.jsonl      one JSON object per row
tensorboard/       the same for TensorBoard
curves.png         the same as a picture
confusion.png      confusion matrix of the final evaluation
examples.png       of segmentation: images, labels, predictions and errors of the last evaluation
report.html        the same as a page, with the configuration and the machine
evaluation.json    what --eval_only found, with evaluation_confusion.png and evaluation_worst.png
profile/           a trace, with --profile_steps
owner.json         which process holds the directory, while a run is at work
"""

_README = f"""\
A training run of repvgg_jax. report.html shows it: curves, results, configuration.

{FILES}
What to do with it, where RUN is this directory; an installed package has repvgg-train and
repvgg-convert in the place of "python train.py" and "python convert.py":

  python train.py --workdir RUN                          go on after an interruption
  python train.py --workdir RUN --eval_only              evaluate it again
  python train.py --workdir RUN --config.train.epochs=N --extend
  python train.py --workdir NEW --init_from RUN          train on other data from here
  python convert.py --workdir RUN --output DEPLOY        fuse, verify and export it
"""

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RunMetadata:
    """What using a run's weights takes beside its configuration, without its data.

    Attributes:
      classes: class names, by label.
      image_shape: (height, width, channels) of training images.
      eval_shape: the same of validation images.
      normalize: pixels to the network's input.
      data: of the data set; None if an older version wrote the file.
    """

    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    eval_shape: tuple[int, int, int]
    normalize: Normalize
    data: DataIdentity | None = None

    def as_json(self) -> dict[str, Any]:
        """The content of `metadata.json`."""
        data = {} if self.data is None else {"data": self.data.as_json()}
        return {
            "classes": list(self.classes),
            "image_shape": list(self.image_shape),
            "eval_shape": list(self.eval_shape),
            "mean": list(self.normalize.mean),
            "std": list(self.normalize.std),
            **data,
        }

    @classmethod
    def from_json(cls, content: Any) -> Self:
        """The inverse of `as_json`; raises ValueError for anything else."""
        found = typed(_Metadata, content, "metadata")
        return cls(
            classes=found.classes,
            image_shape=found.image_shape,
            eval_shape=found.eval_shape,
            normalize=Normalize(found.mean, found.std),
            data=found.data,
        )


@dataclasses.dataclass(frozen=True)
class _Metadata:
    """The fields of `metadata.json`."""

    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    eval_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    data: DataIdentity | None = None

    def __post_init__(self) -> None:
        if not all(0 < size <= 10**6 for size in (*self.image_shape, *self.eval_shape)):
            raise ValueError("sizes of images must be positive")


@dataclasses.dataclass(frozen=True)
class Workdir:
    """The paths in a run directory, and the rule that it belongs to one configuration."""

    path: pathlib.Path

    @property
    def config(self) -> pathlib.Path:
        """`config.json`, the configuration."""
        return self.path / "config.json"

    @property
    def metadata(self) -> pathlib.Path:
        """`metadata.json`: classes, image shapes, normalization and the data's identity."""
        return self.path / "metadata.json"

    @property
    def checkpoints(self) -> pathlib.Path:
        """`checkpoints/`, one directory per checkpoint, named by its step."""
        return self.path / "checkpoints"

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is any checkpoint, valid or not; unfinished ones do not count."""
        return self.newest_step is not None

    @property
    def newest_step(self) -> int | None:
        """The step of the newest checkpoint, valid or not; None if there is none."""
        steps = [int(e.name) for e in self.checkpoints.glob("*") if e.name.isdecimal()]
        return max(steps, default=None)

    @property
    def metrics(self) -> pathlib.Path:
        """`metrics.jsonl`, one JSON object per row."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> pathlib.Path:
        """`tensorboard/`, the metrics for TensorBoard."""
        return self.path / "tensorboard"

    @property
    def curves(self) -> pathlib.Path:
        """`curves.png`, the metrics as a picture."""
        return self.path / "curves.png"

    @property
    def readme(self) -> pathlib.Path:
        """`README.txt`, which describes the directory."""
        return self.path / "README.txt"

    @property
    def confusion(self) -> pathlib.Path:
        """`confusion.png`, the confusion matrix of the final evaluation."""
        return self.path / "confusion.png"

    @property
    def examples(self) -> pathlib.Path:
        """`examples.png`: images, labels, predictions and errors of the last evaluation."""
        return self.path / "examples.png"

    @property
    def report(self) -> pathlib.Path:
        """`report.html`, the metrics with the configuration and the machine."""
        return self.path / "report.html"

    @property
    def profile(self) -> pathlib.Path:
        """`profile/`, a trace of the steps that are profiled."""
        return self.path / "profile"

    @contextlib.contextmanager
    def claimed(self, settings: Settings, *, replacing: Settings | None = None) -> Iterator[None]:
        """A context in which the directory belongs to this process and these settings.

        Raises:
          ValueError: it belongs to another configuration, holds other files, or is in use.
          OSError: it cannot be written.
        """
        if self.path.is_file():
            raise ValueError(f"{self.path} is a file; give a directory as --workdir")
        self.path.mkdir(parents=True, exist_ok=True)
        with lock.locked(self.path):
            self.claim(settings, replacing=replacing)
            files.remove_leftovers(self.path)
            if not self.readme.exists():
                write_text(self.readme, _README)
            yield

    def claim(self, settings: Settings, *, replacing: Settings | None = None) -> None:
        """Writes the configuration, or checks that it is the one that is there.

        Without any checkpoint, another configuration replaces the one that is there.

        Args:
          settings: of the run.
          replacing: those that may be there although there are checkpoints.

        Raises:
          ValueError: the directory belongs to another configuration, or holds other files.
          OSError: it cannot be written.
        """
        if self.config.exists():
            stored, changed = self._compared(settings)
            if not changed:
                return
            if self.has_checkpoint:
                if stored != replacing:
                    raise ValueError(
                        f"{self.path} holds a run with another configuration: "
                        f"{first_few(changed)}. Give another --workdir, or the configuration that "
                        "the run started with"
                    )
                self._write_settings(settings)
                return
            logger.info(
                "%s has no checkpoint: starting anew with %s", self.path, first_few(changed)
            )
            self.metadata.unlink(missing_ok=True)  # it belongs to the old configuration
            shutil.rmtree(self.tensorboard, ignore_errors=True)
            self._write_settings(settings)
            return
        self.path.mkdir(parents=True, exist_ok=True)
        # A start that was killed leaves these two.
        ours = {self.path / lock.FILE, *files.leftovers(self.config)}
        if others := sorted(entry.name for entry in self.path.iterdir() if entry not in ours):
            raise ValueError(
                f"{self.path} is not a run directory (no config.json); it contains "
                f"{first_few(others)}; give another --workdir"
            )
        self._write_settings(settings)

    def _compared(self, settings: Settings) -> tuple[Settings | None, list[str]]:
        """The settings that are there, None if they are of no use, and how others differ."""
        try:
            stored = self.read_settings()
        except ValueError as error:
            if self.has_checkpoint:
                raise
            return None, [f"another config.json ({one_line(error)})"]
        return stored, differences(stored.as_json(), settings.as_json())

    def _write_settings(self, settings: Settings) -> None:
        write_text(self.config, json.dumps(settings.as_saved(), indent=2) + "\n")

    def check_there(self) -> None:
        """Checks that nobody has removed the directory while its run is at work.

        Raises:
          OSError: it is gone; what is written now would be of no use.
        """
        if not self.config.exists():
            raise OSError(
                f"the run directory {self.path} was removed or moved while this run was using it "
                f"(no {self.config.name}); its checkpoints are lost, too, unless they were moved"
            )

    def write_metadata(self, metadata: RunMetadata) -> None:
        """Writes `metadata.json`."""
        write_text(self.metadata, json.dumps(metadata.as_json(), indent=2) + "\n")

    def read_settings(self) -> Settings:
        """The settings that the run started with.

        Raises:
          ValueError: there are none, or they cannot be read.
        """
        if not self.path.is_dir():
            what = "is a file" if self.path.exists() else "does not exist"
            raise ValueError(f"{self.path} {what}; give the --workdir of a training run")
        if not self.config.exists():
            raise ValueError(
                f"{self.path} is not a run directory (no config.json); "
                "give the --workdir of a training run"
            )
        try:
            return Settings.from_mapping(files.read_json(self.config))
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.config} cannot be read: {error}") from error

    def read_metadata(self) -> RunMetadata | None:
        """`metadata.json`; None if a version that did not write it made the run.

        Raises:
          ValueError: it cannot be read.
        """
        if not self.metadata.exists():
            return None
        try:
            return RunMetadata.from_json(files.read_json(self.metadata))
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.metadata} cannot be read: {error}") from error
