"""Loss and accuracy over all held-out images, each counted once."""

from collections.abc import Callable
from typing import Any

import jax

from repvgg_jax.data.batches import eval_batches
from repvgg_jax.model import RepVGG
from repvgg_jax.training.report import as_floats
from repvgg_jax.training.run import Run
from repvgg_jax.training.step import make_eval_step


class Evaluation:
    """Evaluates networks on a run's held-out images; compiles each form once."""

    def __init__(self, run: Run):
        self._run = run
        self._steps: dict[RepVGG, Callable[..., Any]] = {}

    def __call__(self, model: RepVGG, variables: Any, prefix: str) -> dict[str, float]:
        """`{"eval/loss": …, "eval/accuracy": …}` for prefix `eval`.

        Args:
          model: in either form.
          variables: in the same form.
          prefix: of the names.
        """
        run = self._run
        if model not in self._steps:
            self._steps[model] = jax.jit(make_eval_step(model, run.task, run.normalise))
        batches = eval_batches(
            run.dataset,
            batch_size=run.config.eval.batch_size,
            sharding=run.over_batch,
        )
        parts = [self._steps[model](variables, batch) for batch in batches]
        sums = as_floats(jax.tree.map(lambda *values: sum(values), *parts))
        count = sums.pop("count")
        return {f"{prefix}/{name}": value / count for name, value in sums.items()}
