"""Fine-tuning a network of which only the deploy form was published.

`unfuse_params` splits every convolution into branches that compute the same function, so the
network trains with its three branches, and with batch normalization, again.
"""

import pathlib
import tempfile

import jax
import numpy as np
from digits import SMALL, accuracy, classification_loss, fit, init, load

import repvgg_jax as rv

(images, labels), validation = load()


def turned(data):
    """The new task: the same digits, a quarter turned."""
    return np.rot90(data[0], axes=(1, 2)).copy(), data[1]


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

few = tuple(array[:200] for array in turned((images, labels)))
tuned = fit(classification_loss(model), start, few, steps=60)
scratch = fit(classification_loss(model), init(model, images, seed=1), few, steps=60)
shares = {
    "as published": accuracy(deploy, published.variables, turned(validation)),
    "200 images, from scratch": accuracy(model, scratch, turned(validation)),
    "200 images, from the published network": accuracy(model, tuned, turned(validation)),
    "the same, fused again": accuracy(
        deploy, rv.fuse_params(jax.device_get(tuned)), turned(validation)
    ),
}
print("validation accuracy on turned digits")
for name, share in shares.items():
    print(f"  {name:<40} {share:.1%}")
published_share, scratch_share, tuned_share, fused_share = shares.values()
assert tuned_share > published_share
assert fused_share == tuned_share
