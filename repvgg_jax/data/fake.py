"""Images made of noise, with a brightness that gives the class away.

They try out a configuration, a machine or a loop without any data at hand; nothing else
can be learnt from them.
"""

import numpy as np

from repvgg_jax.data.arrays import ArraySource

CLASSES = 4
SIZE = 32


def load() -> tuple[ArraySource, ArraySource, tuple[str, ...]]:
    """Training images, held-out images and class names."""
    return _images(512, seed=0), _images(100, seed=1), tuple(f"shade {i}" for i in range(CLASSES))


def _images(count: int, seed: int) -> ArraySource:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    shade = 40 + 50 * labels[:, None, None, None]
    noise = rng.integers(-20, 20, (count, SIZE, SIZE, 3))
    return ArraySource((shade + noise).astype(np.uint8), labels)
