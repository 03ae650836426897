"""What the numbers of a configuration may be, each by itself or next to its neighbours."""

import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from repvgg_jax.train.compiling import parse_options

_SEEDS = 2**32  # Grain takes no others, and jax would take them for smaller ones

_LEAST: Mapping[str, float] = {
    "train.epochs": 1,
    "train.accumulate": 1,
    "train.auxiliary_weight": 0,
    "optimizer.learning_rate": 0,
    "optimizer.warmup_epochs": 0,
    "optimizer.weight_decay": 0,
    "optimizer.step_epochs": 1e-3,
    "optimizer.clip_norm": 0,
    "eval.every_epochs": 1,
    "checkpoint.every_epochs": 1,
    "checkpoint.keep": 1,
    "report.every_steps": 1,
    "augment.mix_group": 0,
}
_ABOVE_ZERO = ("optimizer.step_factor", "optimizer.epsilon")
_SHARES = (
    "train.label_smoothing",
    "ema.decay",
    "optimizer.momentum",
    "optimizer.b1",
    "optimizer.b2",
)


def check_limits(config: ConfigDict) -> None:
    """Checks the numbers that depend on neither the machine nor the data.

    Settings of `config.data` and `config.augment` that only their rooms understand are checked
    there, when a run is made of the configuration.

    Raises:
      ValueError: the first that cannot be, and what could.
    """
    for name, value in _numbers(config.to_dict()):
        if not math.isfinite(value):
            raise ValueError(f"config.{name}={value} must be a finite number")
    if not 0 <= config.seed < _SEEDS:
        raise ValueError(f"config.seed={config.seed} must be from 0 to {_SEEDS - 1}")
    for name, least in _LEAST.items():
        if (value := _of(config, name)) < least:
            raise ValueError(f"config.{name}={value} must be {least} or more")
    for name in _ABOVE_ZERO:
        if (value := _of(config, name)) <= 0:
            raise ValueError(f"config.{name}={value} must be above 0")
    for name in _SHARES:
        if not 0 <= (value := _of(config, name)) < 1:
            raise ValueError(f"config.{name}={value} must be in [0, 1)")
    if any(value <= 0 for value in config.data.std):
        raise ValueError(f"config.data.std={tuple(config.data.std)} must be above 0")
    if config.optimizer.warmup_epochs >= config.train.epochs:
        raise ValueError(
            f"config.optimizer.warmup_epochs={config.optimizer.warmup_epochs} leaves nothing of "
            f"config.train.epochs={config.train.epochs}"
        )
    _check_sizes(config.data.sizes, config.data.train_size)
    parse_options(config.train.compiler_options)


def _check_sizes(sizes: Any, train_size: int) -> None:
    example = "as ((0, 128), (60, 192), (90, 224)) does"
    if not all(_is_pair(change) for change in sizes):
        raise ValueError(
            f"config.data.sizes={sizes} must hold pairs of an epoch and a size above 0 in pixels, "
            f"{example}"
        )
    if not sizes:
        return
    if sizes[0][0] != 0 or any(a[0] >= b[0] for a, b in itertools.pairwise(sizes)):
        raise ValueError(
            f"config.data.sizes={sizes} must start with epoch 0 and go up in epochs, {example}"
        )
    if train_size < 1:
        raise ValueError(
            f"config.data.sizes={sizes} needs config.data.train_size above 0, which evaluation "
            f"follows, for example {sizes[-1][1]}"
        )


def _is_pair(change: Any) -> bool:
    return (
        isinstance(change, (tuple, list))
        and len(change) == 2
        and all(type(number) is int for number in change)
        and change[1] > 0
    )


def _of(config: ConfigDict, name: str) -> Any:
    return functools.reduce(lambda section, key: section[key], name.split("."), config)


def _numbers(settings: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    """All numbers of a configuration, those in tuples too, with the settings' names."""
    for key, value in settings.items():
        name = f"{path}{key}"
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{name}.")
        else:
            values = value if isinstance(value, (tuple, list)) else (value,)
            yield from ((name, item) for item in values if isinstance(item, (int, float)))
