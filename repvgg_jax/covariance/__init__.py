"""An equivalent training pass that never materializes the 1x1 and the identity branch.

In training every branch is normalized by the statistics of its own output. For two of them these
are known beforehand: with the mean mu and the covariance C of the block's *input* over images
and pixels, the 1x1 branch W'x has mean W'mu and variance diag(W'CW), and the identity branch has
mean mu and variance diag(C). So both fold into one 1x1 convolution before anything of their size
is computed,

    y = ReLU( s3 * (K3 * x)  +  A'x  +  b ),      A = W diag(s1) + diag(s0),

and everything but x, K3 * x and y is as small as a kernel. Automatic differentiation would read
and write the large arrays more often than needed; the backward pass is written out.
`docs/covariance.md` derives it and says how it is conditioned.

Values, statistics and gradients are those of the branches in `repvgg_jax.block`; the tests
compare the two. Reverse mode only: forward mode needs `train_form="branches"`.
"""

from repvgg_jax.covariance.ops import BlockSettings
from repvgg_jax.covariance.train_block import train_block

__all__ = ["BlockSettings", "train_block"]
