"""The same network in PyTorch and here: forward, statistics, gradients, training."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from jax.tree_util import keystr, tree_flatten_with_path

import repvgg_jax as rv

torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra: torch)")

from tests.helpers import torch_reference  # noqa: E402 (needs torch)
from tests.helpers.jit import quick_jit  # noqa: E402

CLASSES = 5
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 1e-2
ROUNDED = 2 * float(np.finfo(np.float32).eps)  # how far float32 may be from float64
PLUS_TAPS = {(1, 1): "stage1_aux", (2, 0): "stage2_aux", (3, 0): "stage3_first_aux"}

# Every feature once: groups and dilation, squeeze-and-excite before the ReLU, and after it with
# auxiliary heads.
NETWORKS = {
    "grouped-dilated": (
        rv.Variant("dilated", (2, 1, 2), (8, 16, 16), stem_channels=8, groups=4),
        {"depths": (2, 1, 2), "channels": (8, 16, 16), "groups": 4, "dilated_from": 2},
        4,
    ),
    "se-before": (
        rv.Variant("se", (1, 2), (8, 16), stem_channels=8, se=rv.SqueezeExcite(4)),
        {"depths": (1, 2), "channels": (8, 16), "reduction": 4},
        None,
    ),
    "se-after": (
        rv.Variant(
            "plus",
            (2, 1, 3),
            (8, 16, 16),
            stem_channels=8,
            se=rv.SqueezeExcite(2, after_relu=True),
            auxiliary=("stage1_block1", "stage2_block0", "stage3_block0"),
        ),
        {
            "depths": (2, 1, 3),
            "channels": (8, 16, 16),
            "reduction": 2,
            "gate_last": True,
            "dialect": "plus",
            "taps": PLUS_TAPS,
        },
        None,
    ),
}


@pytest.fixture(params=NETWORKS)
def networks(request):
    """The PyTorch network, ours, and a function from its state dicts to our variables."""
    variant, options, output_stride = NETWORKS[request.param]
    reference = torch_reference.RepVGG(**options, num_classes=CLASSES).randomize()
    model = rv.create_model(variant, num_classes=CLASSES, output_stride=output_stride)

    def translate(state):
        return rv.load_weights(state, variant=variant).variables

    return reference, model, translate


@pytest.fixture
def batch(rng):
    images = rng.normal(size=(8, 32, 32, 3)).astype(np.float32)
    return images, rng.integers(0, CLASSES, 8)


def nchw(images):
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def relative(ours, reference):
    """The largest difference relative to the largest element."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    return np.abs(ours - reference).max() / np.abs(reference).max()


def assert_close(ours, reference, tolerance):
    ours, reference = tree_flatten_with_path(ours)[0], tree_flatten_with_path(reference)[0]
    assert [path for path, _ in ours] == [path for path, _ in reference]
    errors = {
        keystr(path): relative(leaf, other)
        for (path, leaf), (_, other) in zip(ours, reference, strict=True)
    }
    worst = max(errors, key=errors.get)
    assert errors[worst] <= tolerance, f"{worst}: {errors[worst]:.2e} > {tolerance}"


def torch_loss(reference, images, labels):
    logits, auxiliary = reference(nchw(images))
    labels = torch.from_numpy(labels)
    cross_entropy = torch.nn.functional.cross_entropy
    return cross_entropy(logits, labels) + 0.1 * sum(cross_entropy(a, labels) for a in auxiliary)


def our_loss(params, stats, model, images, labels):
    logits, new = model.apply(
        {"params": params, "batch_stats": stats},
        images,
        train=True,
        mutable=["batch_stats", "auxiliary"],
    )
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    loss = cross_entropy(logits, labels).mean()
    for auxiliary in new.get("auxiliary", {}).values():
        loss += 0.1 * cross_entropy(auxiliary, labels).mean()
    return loss, new["batch_stats"]


OPTIMIZER = optax.chain(
    optax.add_decayed_weights(WEIGHT_DECAY), optax.sgd(LEARNING_RATE, momentum=MOMENTUM)
)


# One program per network, compiled without optimization: it runs ten times.
@functools.partial(quick_jit, static_argnums=3)
def our_step(params, stats, state, model, images, labels):
    (loss, stats), gradients = jax.value_and_grad(our_loss, has_aux=True)(
        params, stats, model, images, labels
    )
    updates, state = OPTIMIZER.update(gradients, state, params)
    return loss, gradients, optax.apply_updates(params, updates), stats, state


def test_evaluation_and_deploy_form_are_pytorchs(networks, batch):
    reference, model, translate = networks
    images, _ = batch
    with torch.no_grad():
        expected = reference.eval()(nchw(images))[0].numpy()
    variables = translate(reference.state_dict())
    assert relative(quick_jit(model.apply)(variables, images), expected) <= 1e-5
    fused = rv.fuse_params(variables)
    logits = quick_jit(model.clone(deploy=True).apply)(fused, images)
    assert relative(logits, expected) <= 1e-5


@pytest.mark.parametrize("output_stride", [2, 4, 8])
def test_dilation_as_in_timm(output_stride, batch):
    options = {"depths": (2, 2, 3), "channels": (8, 12, 16)}
    variant = rv.Variant("timm", **options, stem_channels=8, dilation="timm")
    start = {2: 1, 4: 2, 8: 3}[output_stride]
    reference = torch_reference.RepVGG(**options, dilated_from=start, as_timm=True).randomize()
    with torch.no_grad():
        expected = reference.eval()(nchw(batch[0]))[0].numpy()
    variables = rv.load_weights(reference.state_dict(), variant=variant).variables
    model = rv.create_model(variant, num_classes=CLASSES, output_stride=output_stride)
    assert relative(quick_jit(model.apply)(variables, batch[0]), expected) <= 1e-5
    other = model.clone(variant=dataclasses.replace(variant, dilation="stage"))
    assert relative(quick_jit(other.apply)(variables, batch[0]), expected) > 1e-3


@pytest.fixture
def networks64(networks):
    """The same in float64, and our variables.

    What both compute in float64 is then the same to ten digits, whatever the order of the sums;
    translating PyTorch's rounds it to float32, once.
    """
    reference, model, translate = networks
    with jax.enable_x64(True):
        variables = jax.tree.map(np.float64, translate(reference.state_dict()))
        model = model.clone(dtype=np.float64, param_dtype=np.float64)
        yield reference.double(), model, variables, translate


def test_training_is_pytorchs(networks64, batch):
    """Loss, gradients and statistics of the first step, and everything after ten."""
    reference, model, variables, translate = networks64
    images, labels = batch[0].astype(np.float64), batch[1]
    start = jax.tree.map(np.copy, variables)
    theirs = torch.optim.SGD(
        reference.train().parameters(),
        lr=LEARNING_RATE,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
    )
    params, stats = variables["params"], variables["batch_stats"]
    state = OPTIMIZER.init(params)
    for step in range(10):
        theirs.zero_grad()
        expected_loss = torch_loss(reference, images, labels)
        expected_loss.backward()
        loss, gradients, params, stats, state = our_step(
            params, stats, state, model, images, labels
        )
        if step == 0:
            assert relative(loss, expected_loss.item()) <= 1e-10
            assert_close(stats, translate(reference.state_dict())["batch_stats"], ROUNDED)
            # Gradients are translated under the names of their parameters.
            grads = {name: parameter.grad for name, parameter in reference.named_parameters()}
            grads = translate({**reference.state_dict(), **grads})
            assert_close(gradients, grads["params"], ROUNDED)
        theirs.step()

    expected = translate(reference.state_dict())
    assert_close({"params": params, "batch_stats": stats}, expected, ROUNDED)
    moved = jax.tree.map(relative, expected, start)
    assert min(jax.tree.leaves(moved)) > 1e-2, "the steps must change every array"
