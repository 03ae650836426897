"""Fine-tuning a network of which only the deploy form was published.

`unfuse_params` splits every convolution into branches that compute the same function, with running
statistics that nothing was measured for. Training that normalizes by these statistics, and not by
those of its batches, starts at exactly the published function.
"""

import pathlib
import tempfile

import jax
import numpy as np
import optax
from digits import SMALL, accuracy, classification_loss, fit, init, load

import repvgg_jax as rv

(images, labels), validation = load()


def noisy(data, seed):
    """The new task: the same digits, in noise."""
    noise = np.random.default_rng(seed).normal(0.0, 0.5, data[0].shape)
    return np.float32(data[0] + noise), data[1]


model = rv.create_model(SMALL, num_classes=10)
trained = fit(classification_loss(model), init(model, images), (images, labels), steps=80)

with tempfile.TemporaryDirectory() as directory:  # what somebody publishes: 3x3 kernels and biases
    path = pathlib.Path(directory) / "deployed.safetensors"
    rv.save_weights(path, rv.fuse_params(jax.device_get(trained)), variant=SMALL)
    published = rv.load_weights(path, variant=SMALL)
assert published.deploy

shapes = jax.eval_shape(model.init, jax.random.key(1), images[:1])
start = rv.unfuse_params(published.variables, like=shapes)
deploy = model.clone(deploy=True)
expected = jax.jit(deploy.apply)(published.variables, validation[0])
difference = abs(jax.jit(model.apply)(start, validation[0]) - expected).max() / abs(expected).max()
print(f"split into branches: largest difference {difference:.1e} of the largest logit")
assert difference < 1e-4


def fixed_statistics_loss(variables, batch):
    """The cross-entropy of the network in evaluation; all branches and norms learn."""
    pixels, truth = batch
    logits = model.apply(variables, pixels)
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, truth).mean(), {}


few, unseen = noisy((images[:200], labels[:200]), seed=1), noisy(validation, seed=2)
tuned = fit(fixed_statistics_loss, start, few, steps=60, learning_rate=1e-3)
scratch = fit(classification_loss(model), init(model, images, seed=1), few, steps=60)
shares = {
    "as published": accuracy(deploy, published.variables, unseen),
    "200 images, from scratch": accuracy(model, scratch, unseen),
    "200 images, from the published network": accuracy(model, tuned, unseen),
    "the same, fused again": accuracy(deploy, rv.fuse_params(jax.device_get(tuned)), unseen),
}
print("validation accuracy on noisy digits")
for name, share in shares.items():
    print(f"  {name:<40} {share:.1%}")
published_share, scratch_share, tuned_share, fused_share = shares.values()
assert tuned_share > published_share
assert fused_share == tuned_share
