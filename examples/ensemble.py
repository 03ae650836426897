"""An ensemble: four networks trained, fused and evaluated as one by `jax.vmap`.

`fuse_params` takes the stacked variables as they are: leading axes are blocks beside each other.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits import fit, load

import repvgg_jax as rv

MEMBERS = 4
TINY = rv.Variant(
    "tiny", depths=(1, 1), channels=(8, 16), stem_channels=8, strides=(1, 2), stem_stride=1
)

train, (images, labels) = load()
model = rv.create_model(TINY, num_classes=10)
keys = jax.random.split(jax.random.key(0), MEMBERS)
stacked = jax.jit(jax.vmap(model.init, in_axes=(0, None)))(keys, images[:1])


def loss(variables, batch):
    """The mean loss of all members; each sees the same batch."""
    pixels, truth = batch

    def of_member(member):
        return model.apply(member, pixels, train=True, mutable=["batch_stats"])

    logits, new = jax.vmap(of_member)(variables)
    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
    return cross_entropy(logits, jnp.broadcast_to(truth, logits.shape[:2])).sum(0).mean(), new


stacked = fit(loss, stacked, train, steps=120, learning_rate=2e-2)

deployed = rv.fuse_params(jax.device_get(stacked), expect=3)
kernel = deployed["params"]["stage1_block0"]["reparam"]["kernel"]
print(f"stage1_block0/reparam/kernel of {MEMBERS} networks: {kernel.shape}")

fused = jax.jit(jax.vmap(model.clone(deploy=True).apply, in_axes=(0, None)))(deployed, images)
logits = jax.jit(jax.vmap(model.apply, in_axes=(0, None)))(stacked, images)
difference = float(abs(fused - logits).max() / abs(logits).max())
print(f"largest difference between the two forms: {difference:.1e} of the largest logit")
assert difference < 1e-4

alone = (fused.argmax(-1) == labels).mean(axis=1)
together = (jax.nn.softmax(fused).mean(axis=0).argmax(-1) == labels).mean()
print("validation accuracy of the members:", ", ".join(f"{share:.1%}" for share in alone))
print(f"of their mean probabilities: {together:.1%}")
assert together > np.mean(alone) > 0.8
