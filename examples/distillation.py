"""Distillation: a small network learns from a large one, which needs no labels.

The teacher runs in deploy form, as it would be used: it is fused once, and computes its answers
with a single convolution per layer.
"""

import jax
import numpy as np
import optax
from digits import SMALL, accuracy, classification_loss, fit, init, load

import repvgg_jax as rv

LABELED = 100
TEMPERATURE = 2.0

train, validation = load()
large = rv.Variant(
    "large", depths=(2, 3), channels=(32, 64), stem_channels=32, strides=(1, 2), stem_stride=1
)

teacher = rv.create_model(large, num_classes=10)
trained = fit(classification_loss(teacher), init(teacher, train[0]), train, steps=120)
fused, teacher = rv.fuse_params(jax.device_get(trained)), teacher.clone(deploy=True)
answers = np.asarray(jax.jit(teacher.apply)(fused, train[0]))

student = rv.create_model(SMALL, num_classes=10)
fresh = init(student, train[0], seed=1)
few = (train[0][:LABELED], train[1][:LABELED])
alone = fit(classification_loss(student), fresh, few, steps=200)


def distillation_loss(variables, batch):
    """The divergence from the teacher's softened probabilities; no label is used."""
    images, targets = batch
    logits, new = student.apply(variables, images, train=True, mutable=["batch_stats"])
    wanted = jax.nn.log_softmax(targets / TEMPERATURE)
    found = jax.nn.log_softmax(logits / TEMPERATURE)
    divergence = optax.losses.kl_divergence_with_log_targets(found, wanted)
    return TEMPERATURE**2 * divergence.mean(), new


taught = fit(distillation_loss, fresh, (train[0], answers), steps=200)

results = {
    "teacher": (teacher, fused),
    f"student, {LABELED} labels": (student, alone),
    f"student, {len(answers)} answers of the teacher": (student, taught),
    "the same student, fused": (student.clone(deploy=True), rv.fuse_params(jax.device_get(taught))),
}
shares = {}
for name, (model, variables) in results.items():
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    shares[name] = accuracy(model, variables, validation)
    print(f"{name:<40} {parameters:>9,} parameters  validation accuracy {shares[name]:.1%}")
teacher_share, alone_share, taught_share, fused_share = shares.values()
assert taught_share > alone_share
assert fused_share == taught_share
