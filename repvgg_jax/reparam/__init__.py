"""Structural re-parameterization as pure functions on trees.

`algebra` is the arithmetic of the paper, `grammar` says what a block looks like in a tree,
`fusing` and `unfusing` walk trees. None of them knows flax: they work on whatever carries
arrays under the right names: NumPy or JAX arrays, traced, sharded, stacked along leading
axes, alone or deep inside a larger model.
"""

from repvgg_jax.reparam.fusing import fuse_params
from repvgg_jax.reparam.unfusing import unfuse_params

__all__ = ["fuse_params", "unfuse_params"]
