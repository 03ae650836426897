"""A block in training."""

import jax

from repvgg_jax.covariance.branches import by_branches
from repvgg_jax.covariance.first_layer import by_patches
from repvgg_jax.covariance.form import Form, Params, Statistics


def train_block(form: Form, x: jax.Array, params: Params) -> tuple[jax.Array, Statistics]:
    """A block in training, with or without its ReLU.

    Args:
      form: what is fixed about the block.
      x: (images, height, width, channels) in the dtype of the convolutions.
      params: the parameters of its branches by the names in `repvgg_jax.block`.

    Returns:
      The output, (images, height/stride, width/stride, features) in the dtype of `x`, and by
      batch normalisation the mean and the biased variance it used, (G, features) each, in
      float32 (float64 for float64 inputs).
    """
    features = params["conv3x3"]["kernel"].shape[-1]
    few = 9 * x.shape[-1] <= features and form.groups == 1
    return (by_patches if few else by_branches)(form, x, params)
