"""Weight decay of the kernel that deploys, instead of the two kernels that train.

The authors' "custom L2" of RepVGGplus. The centre of the 3x3 kernel and the 1x1 kernel add
up in deploy form, each scaled by its normalisation, so the sum is what should be small:

    L = |K3|^2 - |K3 centre|^2 + sum over (K3 centre * t3 + K1 * t1)^2 / (t3^2 + t1^2)

with t = scale / sqrt(var + epsilon) per output channel, a constant to the gradient. The
identity branch has no part in it.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from repvgg_jax.reparam import algebra, grammar

PENALISED = ("conv3x3", "conv1x1")
"""Children of a block whose kernels `equivalent_l2` penalises; ordinary decay spares them."""


def equivalent_l2(variables: Any, *, epsilon: float = algebra.EPSILON) -> jax.Array:
    """The sum of L over all three-branch blocks of a tree; its gradient decays K3 and K1.

    Add `weight_decay / 2` times it to the loss, and leave the kernels of `PENALISED` out of
    ordinary weight decay.

    Args:
      variables: `{"params": …, "batch_stats": …}` of a network in training form.
      epsilon: batch normalisation's.

    Returns:
      A float32 scalar, 0 where there is no block.
    """
    total = jnp.zeros((), jnp.float32)
    for params, stats in _blocks(variables["params"], variables["batch_stats"]):
        total += _block_l2(params, stats, epsilon)
    return total


def _blocks(params: Any, stats: Any) -> list[tuple[Any, Any]]:
    if not isinstance(params, Mapping):
        return []
    if grammar.is_train_block(params):
        return [(params, stats)]
    return [
        block
        for key, child in params.items()
        if isinstance(stats, Mapping) and key in stats
        for block in _blocks(child, stats[key])
    ]


def _block_l2(params: Any, stats: Any, epsilon: float) -> jax.Array:
    def factor(norm: str) -> jax.Array:
        t = params[norm]["scale"] / jnp.sqrt(stats[norm]["var"] + epsilon)
        return jax.lax.stop_gradient(t).reshape(1, 1, 1, -1)

    three, one = params["conv3x3"]["kernel"], params["conv1x1"]["kernel"]
    t3, t1 = factor("bn3x3"), factor("bn1x1")
    centre = three[1:2, 1:2]
    deployed = (centre * t3 + one * t1) ** 2 / (t3**2 + t1**2)
    return jnp.square(three).sum() - jnp.square(centre).sum() + deployed.sum()
