"""Handwritten digits: 1,797 real images of 8x8 pixels that come with scikit-learn.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
"""

import numpy as np

from repvgg_jax.data.arrays import ArraySource

HELD_OUT = 360  # images to evaluate on, a fifth, with every digit in the same proportion


def load() -> tuple[ArraySource, ArraySource, tuple[str, ...]]:
    """Training images, held-out images and class names; the split never changes."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)[..., None]
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, data.target, test_size=HELD_OUT, stratify=data.target, random_state=0
    )
    return (
        ArraySource(train_images, train_labels),
        ArraySource(test_images, test_labels),
        tuple(str(name) for name in data.target_names),
    )
