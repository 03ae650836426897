"""Small runs: a few thousand parameters on the real digits."""

from typing import Any

from ml_collections import ConfigDict

from repvgg_jax import Variant
from repvgg_jax.train.config import default_config

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
