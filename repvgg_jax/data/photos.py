"""Real images for proofs where there is no data set: two photographs with scikit-learn.

A temple and a flower, 427x640 pixels; © their authors, under the licences that scikit-learn
gives beside them.
"""

import numpy as np


def crops(size: int, count: int = 16) -> np.ndarray:
    """Square crops of both photographs: uint8 (count, size, size, 3).

    They are spread evenly over the photographs. Above 427 pixels pixels are repeated.
    """
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    per_photo = -(-count // len(photos))
    found = []
    for photo in photos:
        times = -(-size // min(photo.shape[:2]))
        enlarged = photo.repeat(times, axis=0).repeat(times, axis=1)
        height, width, _ = enlarged.shape
        share = np.linspace(0, 1, per_photo)
        tops = ((height - size) * share).astype(int)
        lefts = ((width - size) * ((3 * share) % 1.001)).astype(int)
        found += [
            enlarged[top : top + size, left : left + size]
            for top, left in zip(tops, lefts, strict=True)
        ]
    return np.stack(found[:count])
