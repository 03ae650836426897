"""Real images for proofs without a data set: two photographs that come with scikit-learn.

A temple and a flower, 427x640 pixels; © their authors, under the licenses that scikit-learn
states beside them.
"""

import numpy as np


def crops(size: int, count: int = 16) -> np.ndarray:
    """Square crops of both photographs: uint8 (count, size, size, 3).

    They are spread evenly over the photographs. Above a size of 427, pixels are repeated.
    """
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    per_photo = -(-count // len(photos))
    found = []
    for photo in photos:
        times = -(-size // min(photo.shape[:2]))
        enlarged = photo.repeat(times, axis=0).repeat(times, axis=1)
        height, width, _ = enlarged.shape
        fraction = np.linspace(0, 1, per_photo)
        tops = ((height - size) * fraction).astype(int)
        lefts = ((width - size) * ((3 * fraction) % 1.001)).astype(int)
        found += [
            enlarged[top : top + size, left : left + size]
            for top, left in zip(tops, lefts, strict=True)
        ]
    return np.stack(found[:count])
