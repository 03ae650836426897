"""Short runs of the same recipe for several seeds, compiled once, and their results."""

import dataclasses
import json
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import optax

from repvgg_jax.data.batches import train_batches
from repvgg_jax.data.dataset import Dataset
from repvgg_jax.files import json_digest
from repvgg_jax.text import differences, versions
from repvgg_jax.train.evaluate import Evaluator
from repvgg_jax.train.experiment import Experiment
from repvgg_jax.train.settings import Settings
from repvgg_jax.train.state import initial_state, state_from
from repvgg_jax.train.validate import check_batches


class Trainer:
    """Trains one recipe for any seed; the step is compiled once, with the seed as an argument.

    It takes the same steps as `train.py` with that seed and writes no files.

    Attributes:
      experiment: of the recipe, with seed 0.
      evaluator: compiled once, too.
    """

    def __init__(
        self,
        settings: Settings,
        dataset: Dataset,
        *,
        optimizer: optax.GradientTransformation | None = None,
    ):
        """Builds everything.

        Args:
          settings: the recipe; its seed does not matter.
          dataset: training and validation images.
          optimizer: instead of the recipe's.

        Raises:
          ValueError: batches that the devices do not divide.
        """
        check_batches(settings, devices=jax.device_count(), processes=jax.process_count())
        self.experiment = Experiment.from_config(settings, dataset=dataset)
        if optimizer is not None:
            self.experiment = dataclasses.replace(self.experiment, optimizer=optimizer)
        self.evaluator = Evaluator(self.experiment)
        experiment = self.experiment
        average, shape = settings.ema.decay > 0, dataset.image_shape

        def init(key: jax.Array) -> Any:
            return initial_state(
                experiment.model, experiment.optimizer, key, shape, average=average
            )

        def step(seed: jax.Array, state: Any, batch: Any) -> Any:
            return dataclasses.replace(experiment.train_step, seed=seed)(state, batch)

        self._init = jax.jit(init, out_shardings=experiment.replicated)
        self._step = jax.jit(step, out_shardings=experiment.replicated, donate_argnums=1)

    def initial(self, seed: int) -> dict[str, Any]:
        """Random weights and the statistics before the first step."""
        variables: dict[str, Any] = self._init(jax.random.key(seed)).variables
        return variables

    def train(self, seed: int, variables: Any = None) -> Any:
        """The state at the end of a run.

        Args:
          seed: of initial weights, the order of images and augmentation.
          variables: to start from instead of random weights.
        """
        experiment = self.experiment
        if variables is None:
            state = self._init(jax.random.key(seed))
        else:
            average = experiment.settings.ema.decay > 0
            begun = state_from(variables, experiment.optimizer, average=average)
            state = jax.device_put(begun, experiment.replicated)
        batches = train_batches(
            experiment.dataset,
            batch_size=experiment.settings.train.batch_size,
            seed=seed,
            start_step=0,
            sharding=experiment.over_batch,
        )
        number = jax.numpy.uint32(seed)
        for _ in range(experiment.total_steps):
            state, metrics = self._step(number, state, next(batches))
        if int(metrics["first_bad_gradient"]) >= 0:
            raise FloatingPointError(f"seed {seed}: a gradient of the last step is not finite")
        return state

    def accuracy(self, model: Any, variables: Any) -> float:
        """Validation accuracy, a fraction."""
        means = self.evaluator(model, variables)
        assert means is not None, "nothing stops it"
        return float(means["accuracy"])

    def accuracies(self, state: Any) -> dict[str, float]:
        """Validation accuracy as trained and, if there is a deploy form, fused."""
        model = self.experiment.model
        found = {"accuracy": self.accuracy(model, state.result)}
        if self.experiment.obstacle is None:
            fused = model.fuse(jax.device_get(state.result))
            found["accuracy_fused"] = self.accuracy(model.clone(deploy=True), fused)
        return found


_EVALUATED = 500


class Results:
    """Lines of JSON, one per run.

    Those that were made with other settings stay in the file and do not count.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All runs; a line that was cut off when the process was killed is left out."""
        if not self.path.exists():
            return
        for line in self.path.read_text().splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue

    def of(self, name: str, settings: Settings) -> list[dict[str, Any]]:
        """The runs of that name with these settings, in the order of seeds."""
        wanted = {"name": name, "settings": digest(settings)}
        by_seed = {run["seed"]: run for run in self if wanted.items() <= run.items()}
        return [by_seed[seed] for seed in sorted(by_seed)]

    def find(self, name: str, seed: int, settings: Settings) -> dict[str, Any] | None:
        """The run of that name and seed with these settings."""
        return next((run for run in self.of(name, settings) if run["seed"] == seed), None)

    def add(
        self, name: str, seed: int, settings: Settings, found: Mapping[str, Any], began: float
    ) -> dict[str, Any]:
        """Appends a run that began at that time of `time.perf_counter` and returns its line."""
        line = {
            "name": name,
            "seed": seed,
            **found,
            "epochs": settings.train.epochs,
            "seconds": round(time.perf_counter() - began, 1),
            "settings": digest(settings),
            "versions": versions("jax"),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        old = self.path.read_bytes() if self.path.exists() else b""
        cut = "\n" if old and not old.endswith(b"\n") else ""
        with self.path.open("a") as file:
            file.write(f"{cut}{json.dumps(line)}\n")
        return line


def digest(settings: Settings) -> str:
    """What tells settings apart: all that are not the default, but the seed.

    How many images are evaluated at once changes no accuracy. It counts as `_EVALUATED`, with which
    the first results were made.
    """
    evaluation = dataclasses.replace(settings.eval, batch_size=_EVALUATED)
    changed = dataclasses.replace(settings, seed=0, eval=evaluation).as_json()
    return json_digest(differences(Settings().as_json(), changed))[:12]
