"""A detector on a RepVGG backbone, whose neck is made of RepVGG blocks, too.

It finds digits in scenes of 48x48 pixels: a center per cell of 4 pixels, a class, and a size. All
blocks, those of the backbone and those of the neck, are fused by one call; everything else in the
tree stays as it is.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits import fit, load
from flax import linen as nn

import repvgg_jax as rv

SIDE, CELL, DIGITS = 48, 4, 2
TINY = rv.Variant("tiny", depths=(1, 2), channels=(24, 48), stem_channels=16)


class Detector(nn.Module):
    """Backbone, top-down neck and a head.

    `deploy` reaches the blocks of the neck; the backbone is a module of its own with such a field.
    """

    backbone: nn.Module
    deploy: bool = False

    @nn.compact
    def __call__(self, images, train=False):
        maps = self.backbone.features(images, train)
        fine, coarse = maps["stage1"], maps["stage2"]  # a pixel per 4 and per 8 pixels
        block = rv.RepVGGBlock
        coarse = block(24, deploy=self.deploy, name="neck_coarse")(coarse, train)
        merged = jnp.concatenate([fine, coarse.repeat(2, axis=1).repeat(2, axis=2)], axis=-1)
        merged = block(32, deploy=self.deploy, name="neck_fine")(merged, train)
        return {
            "center": nn.Dense(1, name="center")(merged)[..., 0],
            "digit": nn.Dense(10, name="digit")(merged),
            "box": nn.Dense(3, name="box")(merged),  # center inside the cell, and side, in cells
        }


def scenes(count, digits, seed):
    """Scenes, and per cell whether a center is there, the digit, and the box."""
    pictures, classes = digits
    rng = np.random.default_rng(seed)
    images = rng.normal(-1.0, 0.15, (count, SIDE, SIDE, 1)).astype(np.float32)
    cells = SIDE // CELL
    center = np.zeros((count, cells, cells), np.float32)
    digit = np.zeros((count, cells, cells), np.int32)
    box = np.zeros((count, cells, cells, 3), np.float32)
    for scene in range(count):
        for half in range(DIGITS):  # one in the upper half, one in the lower half
            chosen, zoom = rng.integers(len(pictures)), rng.integers(1, 3)
            side = 8 * zoom
            top = half * SIDE // 2 + rng.integers(SIDE // 2 - side + 1)
            left = rng.integers(SIDE - side + 1)
            picture = pictures[chosen].repeat(zoom, axis=0).repeat(zoom, axis=1)
            images[scene, top : top + side, left : left + side] += picture + 1
            y, x = (top + side / 2 - 0.5) / CELL, (left + side / 2 - 0.5) / CELL
            place = scene, int(y), int(x)
            center[place], digit[place] = 1.0, classes[chosen]
            box[place] = y % 1, x % 1, side / CELL
    return images, {"center": center, "digit": digit, "box": box}


def loss(variables, batch):
    """Focal loss for centers; at centers, cross-entropy for digits and L1 for boxes."""
    images, truth = batch
    out, new = model.apply(variables, images, train=True, mutable=["batch_stats"])
    there = truth["center"]
    count = there.sum()
    focal = optax.losses.sigmoid_focal_loss(out["center"], there, alpha=0.75, gamma=2.0).sum()
    digit = optax.losses.softmax_cross_entropy_with_integer_labels(out["digit"], truth["digit"])
    box = jnp.abs(out["box"] - truth["box"]).sum(-1)
    return (10 * focal + (there * (digit + box)).sum()) / count, new


def found(out, truth):
    """Shares of the digits that are among the strongest peaks: all, with class, and with box, too.

    A box is right if its intersection over union with the true one is at least 0.5.
    """
    score = out["center"]
    peaks = nn.max_pool(score[..., None], (3, 3), padding="SAME")[..., 0] == score
    score = np.where(peaks, score, -np.inf)
    threshold = np.sort(score.reshape(len(score), -1), axis=1)[:, -DIGITS][:, None, None]
    center = (score >= threshold) & (truth["center"] > 0)
    digit = center & (np.asarray(out["digit"]).argmax(-1) == truth["digit"])
    one, other = np.asarray(out["box"]), truth["box"]
    low = np.maximum(one[..., :2] - one[..., 2:] / 2, other[..., :2] - other[..., 2:] / 2)
    high = np.minimum(one[..., :2] + one[..., 2:] / 2, other[..., :2] + other[..., 2:] / 2)
    shared = np.maximum(high - low, 0).prod(-1)
    union = one[..., 2] ** 2 + other[..., 2] ** 2 - shared
    box = digit & (shared >= 0.5 * union)
    return [float(hits.sum() / truth["center"].sum()) for hits in (center, digit, box)]


train, validation = load()
model = Detector(rv.create_model(TINY, num_classes=0))
data = scenes(1500, train, seed=0)
variables = jax.jit(model.init)(jax.random.key(0), data[0][:1])
variables = fit(loss, variables, data, steps=300, batch_size=32, learning_rate=5e-3)

deployed = rv.fuse_params(jax.device_get(variables), expect=len(TINY.layers()) + 2)
fused = model.clone(deploy=True, backbone=model.backbone.clone(deploy=True))

images, truth = scenes(300, validation, seed=1)
trained_out = jax.jit(model.apply)(variables, images)
fused_out = jax.jit(fused.apply)(deployed, images)
for name, expected in trained_out.items():
    difference = float(abs(fused_out[name] - expected).max() / abs(expected).max())
    print(f"{name:<7} {expected.shape}: largest difference {difference:.1e} of the largest number")
    assert difference < 1e-4
count = [sum(leaf.size for leaf in jax.tree.leaves(v["params"])) for v in (variables, deployed)]
print(f"parameters: {count[0]:,} as trained, {count[1]:,} fused")
trained_shares, fused_shares = found(trained_out, truth), found(fused_out, truth)
for name, one, other in zip(
    ("center", "and digit", "and box"), trained_shares, fused_shares, strict=True
):
    print(f"digits of new scenes, {name:<9} right: {one:.1%} as trained, {other:.1%} fused")
assert trained_shares == fused_shares
assert trained_shares[-1] > 0.3
