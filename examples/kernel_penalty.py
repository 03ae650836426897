"""A penalty on the kernels that deploy, not on those that train.

`fuse_params` is a differentiable function, so a loss may contain the deployed kernels. Here an L1
penalty makes them sparse, more than the same penalty on the kernels of the branches.
"""

import jax
import jax.numpy as jnp
from digits import SMALL, accuracy, classification_loss, fit, init, load

import repvgg_jax as rv

WEIGHT = 3e-4
STEPS = 150

train, validation = load()
model = rv.create_model(SMALL, num_classes=10)
fresh = init(model, train[0])
plain = classification_loss(model)


def kernels(tree):
    """The kernels of all convolutions in a tree of parameters."""
    return [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim == 4]


def l1(tree):
    """The sum of the absolute values of all kernels."""
    return sum(jnp.abs(kernel).sum() for kernel in kernels(tree))


def on_branches(variables, batch):
    """The penalty on the kernels that train."""
    loss, new = plain(variables, batch)
    return loss + WEIGHT * l1(variables["params"]), new


def on_deployed(variables, batch):
    """The penalty on the kernels that deploy, with batch normalization folded into them."""
    loss, new = plain(variables, batch)
    return loss + WEIGHT * l1(rv.fuse_params(variables)["params"]), new


found = {}
for name, loss in {"none": plain, "branches": on_branches, "deployed kernel": on_deployed}.items():
    variables = fit(loss, fresh, train, steps=STEPS)
    deployed = rv.fuse_params(jax.device_get(variables))
    share = accuracy(model.clone(deploy=True), deployed, validation)
    weights = jnp.concatenate([kernel.ravel() for kernel in kernels(deployed["params"])])
    small = float((jnp.abs(weights) < 0.01 * jnp.abs(weights).max()).mean())
    found[name] = small
    print(
        f"penalty on {name:<16} {small:.0%} of deployed weights below 1 % of the largest, "
        f"validation accuracy {share:.1%}"
    )
    assert share > 0.8
assert found["deployed kernel"] > max(found["none"], found["branches"])
