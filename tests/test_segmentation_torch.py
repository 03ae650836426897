"""PSPNet in PyTorch and here: resampling, forward in both modes, statistics, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repvgg_jax as rv
from repvgg_jax.segmentation.loss import segmentation_loss
from repvgg_jax.segmentation.resize import adaptive_average_pool, resize_bilinear, upsample
from repvgg_jax.segmentation.resnet import ResNetVariant

torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra: torch)")

from tests.helpers import torch_pspnet, torch_reference  # noqa: E402 (needs torch)
from tests.helpers.jit import quick_jit  # noqa: E402

F = torch.nn.functional
CLASSES = 5
SIZES = [
    ((3, 5), (17, 9)),
    ((12, 12), (90, 90)),
    ((9, 7), (4, 13)),
    ((1, 6), (5, 1)),
    ((4, 1), (4, 6)),
]


def nchw(images):
    return torch.from_numpy(np.ascontiguousarray(np.asarray(images).transpose(0, 3, 1, 2)))


def nhwc(tensor):
    return tensor.detach().numpy().transpose(0, 2, 3, 1)


# Resampling.


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(("before", "after"), [*SIZES, ((90, 90), (713, 713))])
def test_bilinear_is_that_of_pytorch(rng, before, after, align_corners, dtype):
    x = rng.normal(size=(2, *before, 3)).astype(dtype)
    theirs = F.interpolate(nchw(x), after, mode="bilinear", align_corners=align_corners)
    with jax.enable_x64(dtype == "float64"):
        ours = np.asarray(
            quick_jit(lambda x: resize_bilinear(x, after, align_corners=align_corners))(x)
        )
    assert ours.dtype == dtype
    np.testing.assert_allclose(ours, nhwc(theirs), atol=1e-6 if dtype == "float32" else 1e-12)


def test_the_gradient_of_bilinear_is_that_of_pytorch(rng):
    x, weight = rng.normal(size=(1, 6, 7, 2)), rng.normal(size=(1, 21, 15, 2))
    theirs = nchw(x).requires_grad_()
    (
        F.interpolate(theirs, (21, 15), mode="bilinear", align_corners=True) * nchw(weight)
    ).sum().backward()
    with jax.enable_x64(True):
        ours = jax.grad(
            lambda x: (resize_bilinear(x, (21, 15), align_corners=True) * weight).sum()
        )(x)
    np.testing.assert_allclose(ours, nhwc(theirs.grad), atol=1e-12)


@pytest.mark.parametrize("pixels", [1, 2, 5])
def test_upsampling_aligns_corners_at_8k_plus_1(rng, pixels):
    """And at other sizes, pixel 8 i has the value of feature i."""
    x = jnp.asarray(rng.normal(size=(1, pixels, pixels + 1, 2)), jnp.float32)
    exact = (8 * pixels - 7, 8 * pixels + 1)
    aligned = resize_bilinear(x, exact, align_corners=True)
    np.testing.assert_allclose(upsample(x, 8, exact), aligned, atol=1e-6)
    larger = upsample(x, 8, (exact[0] + 5, exact[1] + 7))
    np.testing.assert_allclose(larger[:, : exact[0], : exact[1]], aligned, atol=1e-6)
    np.testing.assert_array_equal(larger[:, ::8, ::8], x)


@pytest.mark.parametrize("size", [(12, 12), (13, 7), (5, 6), (1, 2), (90, 89)])
def test_adaptive_pooling_is_that_of_pytorch(rng, size):
    """Of every size: windows overlap, and there may be more of them than pixels."""
    x = rng.normal(size=(2, *size, 3))
    with jax.enable_x64(True):
        for bins in (1, 2, 3, 6):
            ours = adaptive_average_pool(jnp.asarray(x), (bins, bins))
            np.testing.assert_allclose(ours, nhwc(F.adaptive_avg_pool2d(nchw(x), bins)), atol=1e-12)


def test_sizes_without_pixels_are_refused():
    with pytest.raises(ValueError, match="0x4"):
        resize_bilinear(jnp.zeros((1, 2, 2, 1)), (0, 4), align_corners=True)


# The network. Each reference lists strides, dilations, groups and identities by hand.

REPVGG = rv.Variant("tiny", (1, 2, 6, 1), (8, 8, 16, 24), stem_channels=8, groups=2)


def repvgg(rates):
    """Stages of `REPVGG` at stride 8, with these dilations of the third stage."""
    third = [(16, 1, rate, 2 if index % 2 else 1, index > 0) for index, rate in enumerate(rates)]
    return torch_pspnet.RepVGGStages(
        [
            [(8, 2, 1, 1, False)],
            [(8, 2, 1, 1, False)],
            [(8, 2, 1, 2, False), (8, 1, 1, 1, True)],
            [(o, s, d, 1 if g == 2 else 2, i) for o, s, d, g, i in third],
            [(24, 1, 4, 2, False)],
        ]
    )


def resnet():
    return torch_pspnet.ResNetStages(
        (4, 4, 8), [[(4, 1, 1)], [(4, 2, 1), (4, 1, 1)], [(4, 1, 2)], [(8, 1, 4)]]
    )


NETWORKS = {
    "plain": (REPVGG, {}, lambda: repvgg([2] * 6), (24, 16)),
    "fast": (REPVGG, {"fast": True}, lambda: repvgg([1, 1, 2, 2, 2, 2]), (24, 16)),
    "resnet": (
        ResNetVariant("tiny-resnet", (1, 2, 1, 1), (4, 4, 4, 8), (4, 4, 8)),
        {},
        resnet,
        (32, 16),
    ),
}


@pytest.fixture(params=NETWORKS)
def networks(request):
    """The PyTorch network with random weights, and ours, in float64 and without dropout."""
    variant, options, backbone, (channels, before) = NETWORKS[request.param]
    reference = torch_pspnet.PSPNet(
        backbone(), channels, before, classes=CLASSES, width=8, auxiliary_width=4, bins=(1, 2, 3, 6)
    ).double()
    torch_reference.RepVGG.randomize(reference)
    ours = rv.create_segmenter(
        variant,
        CLASSES,
        width=8,
        auxiliary_width=4,
        dropout=0.0,
        dtype=jnp.float64,
        param_dtype=jnp.float64,
        **options,
    )
    return reference, ours


def conv(module, of):
    leaves = {"kernel": of(module.weight).transpose(2, 3, 1, 0)}
    return leaves if module.bias is None else {**leaves, "bias": of(module.bias)}


def norm(module, of):
    return {"scale": of(module.weight), "bias": of(module.bias)}


def moments(module, of):
    return {"mean": of(module.running_mean), "var": of(module.running_var)}


def modules(reference, ours):
    """Our path of every convolution and norm of the reference."""
    found = {}

    def pair(path, conv_norm, names=("conv_single", "bn_single")):
        for name, module in zip(names, [*conv_norm][:2], strict=True):
            found[*path, name] = module

    places = [("stem",)] if isinstance(ours.variant, rv.Variant) else []
    places += [(layer.name,) for layer in ours.variant.layers()[len(places) :]]
    blocks = [block for stage in reference.backbone.stages for block in stage]
    for (name,), block in zip(places, blocks, strict=True):
        if isinstance(ours.variant, rv.Variant):
            branches = {"3x3": block.rbr_dense, "1x1": block.rbr_1x1}
            for suffix, branch in branches.items():
                found["backbone", name, f"conv{suffix}"] = branch.conv
                found["backbone", name, f"bn{suffix}"] = branch.bn
            if hasattr(block, "rbr_identity"):
                found["backbone", name, "bn_identity"] = block.rbr_identity
        else:
            for index, pair_of in enumerate(block.convs):
                pair(("backbone", name, f"conv{index}"), pair_of)
            if block.shortcut is not None:
                pair(("backbone", name, "shortcut"), block.shortcut)
    for index, stem in enumerate(getattr(reference.backbone, "stem", ())):
        pair(("backbone", f"stem{index}"), stem)
    for windows, level in zip(reference.bins, reference.levels, strict=True):
        pair((f"pyramid{windows}",), level)
    pair(("decoder",), reference.decoder)
    found["head",] = reference.head
    pair(("aux_backbone",), reference.auxiliary, ("conv", "bn"))
    found["aux_backbone", "logits"] = reference.auxiliary_head
    return found


def translated(reference, ours, of=lambda tensor: tensor.detach().numpy().copy()):
    """The reference's parameters (or what `of` makes of them) and statistics as variables."""
    from flax.traverse_util import unflatten_dict

    params, stats = {}, {}
    for path, module in modules(reference, ours).items():
        if isinstance(module, torch.nn.Conv2d):
            params[path] = conv(module, of)
        else:
            params[path] = norm(module, of)
            stats[path] = moments(module, lambda tensor: tensor.detach().numpy().copy())
    return {"params": unflatten_dict(params), "batch_stats": unflatten_dict(stats)}


def largest_difference(ours, theirs):
    """Relative to the largest element of each leaf."""
    differences = jax.tree.map(
        lambda a, b: np.abs(np.asarray(a) - b).max() / max(np.abs(b).max(), 1e-3), ours, theirs
    )
    return max(jax.tree.leaves(differences))


def test_evaluation_is_that_of_pytorch(rng, networks):
    reference, ours = networks
    images = rng.normal(size=(2, 33, 41, 3))
    with torch.no_grad():
        theirs, _ = reference.eval()(nchw(images))
    with jax.enable_x64(True):
        logits = quick_jit(ours.apply)(translated(reference, ours), images)
    np.testing.assert_allclose(logits, nhwc(theirs), atol=1e-12 * abs(theirs).max())


def test_training_is_that_of_pytorch(rng, networks):
    """Logits, auxiliary logits, loss with ignored pixels, statistics and every gradient."""
    reference, ours = networks
    images = rng.normal(size=(3, 33, 25, 3))
    labels = rng.integers(0, CLASSES, (3, 33, 25))
    labels[rng.uniform(size=labels.shape) < 0.3] = 255
    variables = translated(reference, ours)
    main, auxiliary = reference.train()(nchw(images))
    target = torch.from_numpy(labels)
    theirs = F.cross_entropy(main, target, ignore_index=255) + 0.4 * F.cross_entropy(
        auxiliary, target, ignore_index=255
    )
    theirs.backward()

    def loss(params):
        logits, new = ours.apply(
            {**variables, "params": params},
            images,
            train=True,
            mutable=["batch_stats", "auxiliary"],
        )
        return segmentation_loss(logits, new["auxiliary"], labels), (logits, new)

    with jax.enable_x64(True):
        (value, (logits, new)), gradients = quick_jit(jax.value_and_grad(loss, has_aux=True))(
            variables["params"]
        )
    np.testing.assert_allclose(logits, nhwc(main), atol=1e-10)
    np.testing.assert_allclose(new["auxiliary"]["aux_backbone"], nhwc(auxiliary), atol=1e-10)
    np.testing.assert_allclose(value, theirs.item(), rtol=1e-12)
    after = translated(reference, ours)
    assert largest_difference(new["batch_stats"], after["batch_stats"]) < 1e-10
    expected = translated(reference, ours, of=lambda tensor: tensor.grad.numpy())["params"]
    assert largest_difference(gradients, expected) < 1e-8
