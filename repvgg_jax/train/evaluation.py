"""Loss and accuracy over all held-out images, each counted once."""

from typing import Any

import jax
import numpy as np

from repvgg_jax.cluster import consensus
from repvgg_jax.data.batches import eval_batches
from repvgg_jax.model import RepVGG
from repvgg_jax.train.run import Run
from repvgg_jax.train.signals import StopRequest
from repvgg_jax.train.step import EvalStep


class Evaluation:
    """Evaluates networks on a run's held-out images; compiles each form once."""

    def __init__(self, run: Run):
        self._run = run
        self._steps: dict[RepVGG, jax.stages.Compiled] = {}

    def __call__(
        self, model: RepVGG, variables: Any, stop: StopRequest | None = None
    ) -> dict[str, np.ndarray] | None:
        """Means over the images: `loss`, `accuracy`, `top5`, and `class_accuracy` by label.

        And `images`, how many were counted: all that could be decoded.

        Args:
          model: in either form.
          variables: in the same form.
          stop: asked before every batch.

        Returns:
          None where `stop` was asked for. `class_accuracy` is NaN for a class without images.
        """
        run = self._run
        batches = eval_batches(
            run.dataset,
            batch_size=run.config.eval.batch_size,
            sharding=run.over_batch,
        )
        parts = []
        for batch in batches:
            if stop is not None and stop.poll():
                return None
            parts.append(self._step(model, variables, batch)(variables, batch))
        sums = jax.device_get(jax.tree.map(lambda *values: sum(values), *parts))
        count, class_count = sums.pop("count"), sums.pop("class_count")
        class_right = sums.pop("class_accuracy")
        with np.errstate(invalid="ignore"):
            means = {name: np.asarray(value / count) for name, value in sums.items()}
            means["class_accuracy"] = class_right / class_count
        return {**means, "images": np.asarray(count, np.int64)}

    def _step(self, model: RepVGG, variables: Any, batch: Any) -> jax.stages.Compiled:
        if model not in self._steps:
            step = jax.jit(EvalStep(model, self._run.task, self._run.normalise))
            self._steps[model] = step.lower(variables, batch).compile()
            consensus.barrier(f"compiled evaluation {len(self._steps)}")
        return self._steps[model]


def row(prefix: str, means: dict[str, np.ndarray], suffix: str = "") -> dict[str, float]:
    """What of an evaluation goes into a row of the report: `{"eval/accuracy": 0.7, …}`."""
    return {f"{prefix}/{name}{suffix}": float(means[name]) for name in scalars(means)}


def scalars(means: dict[str, np.ndarray]) -> list[str]:
    """Names of what is one number for all images."""
    return [name for name, value in means.items() if np.ndim(value) == 0 and name != "images"]


def counted(means: dict[str, np.ndarray], held_out: int) -> str:
    """How many images an evaluation counted, in words: those that cannot be decoded are not.

    Args:
      means: as `Evaluation` gives them.
      held_out: how many images there are.
    """
    images = int(means["images"])
    return f"{images:,} images" if images == held_out else f"{images:,} of {held_out:,} images"
