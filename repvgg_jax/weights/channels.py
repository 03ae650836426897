"""Weights for images with other channels than those they were trained on."""

from collections.abc import Mapping

import numpy as np

from repvgg_jax.variants import Variant
from repvgg_jax.weights.tree import leaves

Path = tuple[str, ...]


def adapt_channels(
    arrays: Mapping[Path, np.ndarray], variant: Variant, *, deploy: bool, taken: int, channels: int
) -> dict[Path, np.ndarray]:
    """Kernels of the stem for images of other channels, as timm adapts them.

    For one channel they are summed over their channels, which is the network on images that repeat
    this channel; for n they are repeated in turn and scaled by `taken` / n, which keeps the size of
    the sums.

    Args:
      arrays: of the network, by path.
      variant: the architecture.
      deploy: whether they are of the fused form.
      taken: channels that they take now.
      channels: channels that they are to take.

    Raises:
      ValueError: a stem that is no convolution of all channels.
    """
    adapted = dict(arrays)
    for leaf in leaves(variant, deploy=deploy, num_classes=0, in_channels=channels):
        kernel = arrays.get(leaf.path)
        if kernel is None or kernel.shape == leaf.shape:  # another network is refused elsewhere
            continue
        if leaf.path[-1] != "kernel" or kernel.shape != (*leaf.shape[:2], taken, leaf.shape[3]):
            raise ValueError(
                f"{'/'.join(leaf.path)} cannot be adapted from {taken} to {channels} channels of "
                f"images: {kernel.shape} must become {leaf.shape}"
            )
        if channels == 1:
            adapted[leaf.path] = kernel.sum(axis=2, keepdims=True)
        else:
            repeated = np.take(kernel, np.arange(channels) % taken, axis=2)
            adapted[leaf.path] = repeated * np.float32(taken / channels)
    return adapted
