"""Small runs: a few thousand parameters on the real digits."""

import contextlib
import dataclasses
import itertools
import json
import pathlib
import signal
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from repvgg_jax import Variant
from repvgg_jax.data.augment import RandomAffine
from repvgg_jax.train.checkpoint import Checkpoints
from repvgg_jax.train.config import default_config
from repvgg_jax.train.experiment import Experiment
from repvgg_jax.train.hooks import StopRequest
from repvgg_jax.train.settings import Settings
from repvgg_jax.train.state import TrainState

SMALL = Variant("small", (1, 1), (8, 16), 8, strides=(1, 2), stem_stride=1)


def small_config(variant: Variant = SMALL, **overrides: Any) -> ConfigDict:
    """Two epochs of eleven steps; overrides as `train__epochs=3`."""
    config = default_config(variant)
    config.data.mean, config.data.std = (0.305,), (0.376,)
    config.augment.affine.shift = 0.1
    config.train.batch_size = 128
    config.train.epochs = 2
    config.optimizer.learning_rate, config.optimizer.warmup_epochs = 0.4, 0.5
    config.eval.batch_size = 120
    config.report.every_steps = 4
    with config.unlocked():
        config.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    return config


def small_settings(variant: Variant = SMALL, **overrides: Any) -> Settings:
    """The settings of `small_config`."""
    return Settings.from_config(small_config(variant, **overrides))


def small_experiment(variant: Variant = SMALL, **overrides: Any) -> Experiment:
    """The experiment of `small_config`."""
    return Experiment.from_config(small_config(variant, **overrides))


def rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics."""
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def numbers(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows without what depends on the clock."""
    return [
        {k: v for k, v in row.items() if "per_second" not in k and k != "data_wait"}
        for row in rows(path)
    ]


def final_state(path: pathlib.Path, config: ConfigDict | None = None) -> TrainState:
    """The state in a run's newest checkpoint, NumPy arrays; default: a run of `small_config`."""
    experiment = Experiment.from_config(small_config() if config is None else config)
    with Checkpoints(path / "checkpoints") as checkpoints:
        return jax.device_get(checkpoints.restore(experiment.abstract_state()))


@contextlib.contextmanager
def stopped_at(monkeypatch: pytest.MonkeyPatch, poll: int) -> Iterator[None]:
    """SIGTERM reaches the loop when it looks for signals that many times more, from 0."""
    polls, look = itertools.count(), StopRequest.poll

    def stop(request: StopRequest) -> Any:
        if next(polls) == poll:
            request.signal = signal.SIGTERM
        return look(request)

    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "poll", stop)
        yield


@dataclasses.dataclass(frozen=True)
class _Augmentation64:
    """The affine changes of `small_config`, in float64."""

    affine: RandomAffine

    def __call__(self, key: jax.Array, images: jax.Array) -> jax.Array:
        return self.affine(key, jnp.asarray(images, jnp.float64) / 255)


@contextlib.contextmanager
def in_float64(*experiments: Experiment) -> Iterator[list[Experiment]]:
    """The same experiments in float64, while the context lasts.

    In float32 two programs for the same step differ by rounding, how much depends on the
    processor; in float64 what is left of a difference of more than 1e-10 is a mistake.
    """
    with jax.enable_x64(True):
        yield [
            dataclasses.replace(
                experiment,
                model=experiment.model.clone(dtype=jnp.float64, param_dtype=jnp.float64),
                augment=_Augmentation64(experiment.augment.affine),
            )
            for experiment in experiments
        ]


def assert_same(tree: Any, other: Any, tolerance: float = 1e-10) -> None:
    """Each array equals its counterpart, relative to its largest element."""
    leaves, others = (jax.tree.leaves_with_path(jax.device_get(t)) for t in (tree, other))
    assert [path for path, _ in leaves] == [path for path, _ in others]
    for (path, leaf), (_, found) in zip(leaves, others, strict=True):
        scale = max(np.abs(leaf).max(), np.finfo(np.float32).tiny)
        np.testing.assert_allclose(
            found / scale, leaf / scale, rtol=0, atol=tolerance, err_msg=jax.tree_util.keystr(path)
        )
