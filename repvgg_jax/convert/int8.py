"""`--quantize int8`: quantizes the fused network, writes it and measures what that costs."""

import dataclasses
import logging
import math
import pathlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from repvgg_jax.convert.calibration import (
    Calibrate,
    calibration_images,
    evaluation_examples,
)
from repvgg_jax.convert.subject import Source
from repvgg_jax.export import INT8_FORMATS, Artifact, Network, export_int8
from repvgg_jax.export.format import Run, size
from repvgg_jax.export.int8 import float_layers, simulated
from repvgg_jax.proof import Forward
from repvgg_jax.quantization import Quantized, Settings, quantize
from repvgg_jax.quantization.settings import TRAINED
from repvgg_jax.segmentation.task import exact_type
from repvgg_jax.text import plural

logger = logging.getLogger(__name__)

KEY = "int8"
"""Key of the measurements in `proof.json`."""

TIMED_ROUNDS = 3, 15  # at least, at most
TIMED_SECONDS = 6.0  # no further round after this
PAUSE = 0.05  # seconds before a turn, and of a turn at least


@dataclasses.dataclass(frozen=True)
class Int8:
    """What `--quantize int8` and the flags beside it ask for.

    Attributes:
      calibrate: which images.
      settings: how the network is quantized.
      formats: what to write, names of `INT8_FORMATS`.
      calibrator_given: whether the calibrator is a user's choice; else the ranges of
        quantization-aware training come first.
    """

    calibrate: Calibrate
    settings: Settings = Settings()  # noqa: RUF009 (frozen)
    formats: tuple[str, ...] = ("onnx",)
    calibrator_given: bool = False

    def __post_init__(self) -> None:
        if unknown := [name for name in self.formats if name not in INT8_FORMATS]:
            raise ValueError(f"no int8 in {unknown[0]}; formats: {', '.join(INT8_FORMATS)}")


@dataclasses.dataclass(frozen=True)
class Measured:
    """How the float and the int8 artifact of a runtime compare.

    Attributes:
      metrics: of the task, by name, of both; none without labels.
      agreement: share of images, or of their pixels, that get the same class from both.
      bytes: of both files; of the simulation none.
      images_per_second: of both, in batches of up to 32, in their fastest turn; of the simulation
        none.
      float_layers: those that the runtime computes in float, although they are quantized.
    """

    metrics: Mapping[str, tuple[float, float]]
    agreement: float
    bytes: tuple[int, int] | None = None
    images_per_second: tuple[float, float] | None = None
    float_layers: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Everything, for `proof.json`."""
        pairs = {**self.metrics, "bytes": self.bytes, "images_per_second": self.images_per_second}
        found: dict[str, Any] = {"agreement": self.agreement}
        for name, pair in pairs.items():
            for form, value in zip(("float", "int8"), pair or (), strict=False):
                found[f"{form}_{name}"] = value
        return {**found, "float_layers": list(self.float_layers)}


class Conversion:
    """A quantized network, ready to be written.

    The constructor checks the network and its images. `write` fails only if an artifact cannot be
    written, or disagrees with the simulation.

    Attributes:
      quantized: the network.
      artifacts: what was written.
    """

    def __init__(self, source: Source, fused: Any, asked: Int8):
        """Calibrates and quantizes.

        Raises:
          ValueError: a network without classes, or as `calibration_images` and `quantize`.
        """
        if not source.model.num_classes:
            raise ValueError(
                "--quantize int8 is judged by the classes that a network finds, but this one has 0"
            )
        self.asked = asked
        self.source = source
        self.calibration = calibration_images(source, asked.calibrate)
        self.evaluation = evaluation_examples(source)
        start = time.perf_counter()
        images = np.asarray(source.normalize(self.calibration.images))
        wanted = asked.settings.calibrator == TRAINED or not asked.calibrator_given
        self.quantized: Quantized
        if source.trained is not None and wanted:
            self.quantized = source.trained.quantized(fused, images, asked.settings)
        else:
            model = source.model.clone(deploy=True)
            self.quantized = quantize(model, fused, images, asked.settings)
        self.seconds = time.perf_counter() - start
        for line in self.quantized.warnings:
            logger.warning("%s", line)
        self.artifacts: list[Artifact] = []
        self._measured: dict[str, dict[str, Measured]] = {}

    def write(self, network: Network, directory: pathlib.Path) -> list[Artifact]:
        """Writes the artifacts, proves and measures them.

        Args:
          network: the float network, with its settings of graphs.
          directory: where to write.

        Raises:
          ValueError: as `export_int8`.
        """
        rounded = Network(
            network.model,
            {"params": self.quantized.params},
            images=network.images,
            normalize=network.normalize,
            labels=network.labels,
            with_preprocessing=network.with_preprocessing,
            dynamic_size=network.dynamic_size,
        )
        for name in self.asked.formats:
            path = directory / INT8_FORMATS[name].filename
            artifact = export_int8(name, rounded, self.quantized, path)
            self.artifacts.append(artifact)
            self._measured[name] = self._measure(name, network, artifact)
        self._measured["jax"] = {"simulation": self._simulation(network)}
        return self.artifacts

    def _measure(self, name: str, network: Network, artifact: Artifact) -> dict[str, Measured]:
        """Runs the float and the int8 artifact in every runtime on the evaluation images."""
        found = {}
        form = INT8_FORMATS[name].format
        timed = self._fed(network, slice(self.source.batch))
        with tempfile.TemporaryDirectory() as temporary:
            path = pathlib.Path(temporary, form.filename)
            form.write(network, path, "float32")
            for runtime in form.runtimes:
                if runtime.name in artifact.unproven:
                    continue
                runs = runtime.open(path, network), runtime.open(artifact.path, network)
                found[runtime.name] = dataclasses.replace(
                    self._compared(network, runs),
                    bytes=(size(path), artifact.size),
                    images_per_second=_images_per_second(runs, timed),
                    float_layers=float_layers(
                        name, runtime.name, artifact.path, network, self.quantized
                    ),
                )
                del runs
        return found

    def _simulation(self, network: Network) -> Measured:
        batch = min(self.source.batch, len(self.evaluation.images))
        of_float = Forward(network.apply, network.params, batch_size=batch)
        return self._compared(
            network, (of_float, lambda images: simulated(network, self.quantized, images))
        )

    def _fed(self, network: Network, part: slice) -> np.ndarray:
        """Some evaluation images, as artifacts take them."""
        images = self.evaluation.images[part]
        return images if network.with_preprocessing else np.asarray(network.normalize(images))

    def _compared(self, network: Network, runs: tuple[Run, Run]) -> Measured:
        """The metrics of the float and the int8 form, and how often their classes agree."""
        task, labels, count = self.source.task, self.evaluation.labels, len(self.evaluation.images)
        sums: tuple[list[Any], list[Any]] = [], []
        same = []
        for start in range(0, count, self.source.batch):
            part = slice(start, min(start + self.source.batch, count))
            fed = self._fed(network, part)
            outputs = [np.asarray(run(fed)) for run in runs]
            before, after = (output.argmax(-1) for output in outputs)
            same.append((before == after).mean((*range(1, before.ndim),)))
            if labels is None:
                continue
            batch = {"label": labels[part], "mask": np.ones(len(fed), bool)}
            for found, output in zip(sums, outputs, strict=True):
                of_batch = task.evaluate(jnp.asarray(output), batch)
                found.append({n: np.asarray(one, exact_type(one)) for n, one in of_batch.items()})
        metrics = {}
        if labels is not None:
            before, after = map(task.means, sums)
            metrics = {name: (float(before[name]), float(after[name])) for name in task.names}
        return Measured(metrics, float(np.concatenate(same).mean()))

    @property
    def _headline(self) -> Measured:
        """What the first runtime measured, or else the simulation."""
        return next(iter(next(found for found in self._measured.values() if found).values()))

    def as_dict(self) -> dict[str, Any]:
        """The object `int8` of `proof.json`."""
        headline = self._headline
        metrics: dict[str, float | None] = {}
        for name in self.source.task.names:
            pair = headline.metrics.get(name, (None, None))
            metrics |= {f"float_{name}": pair[0], f"int8_{name}": pair[1]}
        return {
            **metrics,
            "agreement": headline.agreement,
            "images": len(self.evaluation.images),
            "evaluation": self.evaluation.what,
            "calibration": {
                "source": str(self.asked.calibrate),
                "images": len(self.calibration.images),
                "what": self.calibration.what,
            },
            "settings": self.quantized.settings.as_dict(),
            "logit_errors": dict(self.quantized.errors),
            "layer_noise": dict(self.quantized.noise),
            "warnings": list(self.quantized.warnings),
            "runtimes": {
                name: {runtime: measured.as_dict() for runtime, measured in found.items()}
                for name, found in self._measured.items()
            },
        }

    @property
    def lines(self) -> tuple[str, ...]:
        """A table of all that was measured."""
        settings = self.quantized.settings
        steps = ", ".join(f"{error:.2%} {step}" for step, error in self.quantized.errors.items())
        head = [
            f"int8 for {settings.target}, {_calibrator(settings)}, calibrated on "
            f"{self.calibration.what}, {self.seconds:.0f} s",
            f"  change of the logits, root mean square: {steps}",
        ]
        if settings.float_layers:
            head.append(f"  in float as asked: {', '.join(self.quantized.plan.float_layers)}")
        rows = [("", "", "float", "int8", "")]
        for name, found in self._measured.items():
            for runtime, measured in found.items():
                rows += self._rows(name, runtime, measured)
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        table = [
            "  ".join(
                cell.ljust(width) if column in (0, 1, 4) else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        notes = [f"  {self.evaluation.note}"] if self.evaluation.note else []
        notes += [f"  warning: {line}" for line in self.quantized.warnings]
        return (*head, *(f"  {line.rstrip()}" for line in table), *notes)

    def _rows(
        self, name: str, runtime: str, measured: Measured
    ) -> list[tuple[str, str, str, str, str]]:
        task = self.source.task
        where = "" if task.each == "image" else f"the {task.each}s of "
        same = f"same class on {measured.agreement:.2%} of {where}{self.evaluation.what}"
        pair = measured.metrics.get(task.headline)
        before, after = ("–", "–") if pair is None else (f"{value:.2%}" for value in pair)
        rows = [(runtime, task.names[task.headline], before, after, same)]
        if measured.bytes is not None:
            large, small = measured.bytes
            rows.append(("", "bytes", f"{large:,}", f"{small:,}", f"{small / large:.1%}, {name}"))
        if measured.images_per_second is not None:
            slow, fast = measured.images_per_second
            ratio = f"{fast / slow:.2f}x"
            rows.append(("", "images/s", _speed(slow), _speed(fast), ratio))
        total = len(self.quantized.plan.layers)
        if runtime != "simulation":
            left = measured.float_layers
            text = "all layers in int8"
            if left:
                text = f"{len(left)} of {plural(total, 'layer')} in float: {', '.join(left)}"
            rows.append(("", "", "", "", text))
        return rows


def _calibrator(settings: Settings) -> str:
    if settings.calibrator == TRAINED:
        return "ranges as trained"
    if settings.calibrator == "percentile":
        return f"calibrator percentile {settings.percentile:g}"
    return f"calibrator {settings.calibrator}"


def _speed(images_per_second: float) -> str:
    return f"{images_per_second:,.0f}" if images_per_second >= 10 else f"{images_per_second:.2g}"


def _images_per_second(runs: Sequence[Run], batch: np.ndarray) -> tuple[float, float]:
    """Images per second of both artifacts, each in the fastest of several turns.

    Threads of a runtime go on waiting for work for a while, which slows the other one down: a turn
    begins with a pause and a run that does not count.
    """
    fastest = [math.inf for _ in runs]
    least, most = TIMED_ROUNDS
    began = time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - began > TIMED_SECONDS:
            break
        for i, run in enumerate(runs):
            time.sleep(PAUSE)
            run(batch)
            start, repeats = time.perf_counter(), 0
            while repeats == 0 or time.perf_counter() - start < PAUSE:
                run(batch)
                repeats += 1
            fastest[i] = min(fastest[i], (time.perf_counter() - start) / repeats)
    first, second = (len(batch) / seconds for seconds in fastest)
    return first, second
