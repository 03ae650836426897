"""What the fused kernels of a network look like, and what each branch adds to them.

`python -m repvgg_jax.visualize` draws a run, a deploy directory or a checkpoint.
"""

from repvgg_jax.visualize.kernels import (
    BlockKernels,
    branch_kernels,
    inspect_blocks,
    stage_shares,
)
from repvgg_jax.visualize.picture import draw_blocks, draw_kernels

__all__ = [
    "BlockKernels",
    "branch_kernels",
    "draw_blocks",
    "draw_kernels",
    "inspect_blocks",
    "stage_shares",
]
