"""PSPNet on RepVGG and ResNet: shapes, dilation, the fold of the whole network, its start."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repvgg_jax as rv
from repvgg_jax.segmentation.network import dilations, make_backbone
from repvgg_jax.segmentation.resnet import RESNETS, ResNetVariant
from repvgg_jax.segmentation.weights import load_resnet, start_from_classifier
from repvgg_jax.text import named_leaves
from repvgg_jax.train.experiment import network_title
from tests.helpers.jit import quick_jit
from tests.helpers.pth_writer import write_zip
from tests.helpers.trees import paths, random_images, random_variables

TINY = rv.Variant("tiny", (1, 1, 6, 1), (8, 8, 16, 24), stem_channels=8, groups=2)
TINY_SE = rv.Variant(
    "tiny-se", (1, 1, 2, 1), (8, 8, 8, 16), stem_channels=8, se=rv.SqueezeExcite(4)
)
TINY_RESNET = ResNetVariant("tiny-resnet", (1, 2, 1, 1), (4, 4, 4, 8), (4, 4, 8))
CLASSES = 5
BACKBONES = {
    "plain": (TINY, {}),
    "fast": (TINY, {"fast": True}),
    "stride 16": (TINY, {"output_stride": 16}),
    "squeeze-excite": (TINY_SE, {}),
    "resnet": (TINY_RESNET, {}),
}


def tiny(variant=TINY, **options):
    options = {"width": 8, "auxiliary_width": 4, **options}
    return rv.create_segmenter(variant, CLASSES, **options)


# The core tests take the first one alone.
@pytest.fixture(
    params=[
        pytest.param(name, marks=[pytest.mark.core] if name == "plain" else [])
        for name in BACKBONES
    ]
)
def network(request):
    variant, options = BACKBONES[request.param]
    return tiny(variant, **options)


# The network.


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-12)])
def test_the_fused_segmenter_computes_the_same(network, dtype, tolerance):
    """Of whole images whose sizes are neither square nor 8 k + 1."""
    network = network.clone(dtype=dtype, param_dtype=dtype)
    with jax.enable_x64(dtype == "float64"):
        variables = random_variables(network, size=33)
        variables = jax.tree.map(lambda leaf: leaf.astype(dtype), variables)
        images = random_images((2, 42, 35, 3), dtype=dtype)
        trained = np.asarray(quick_jit(network.apply)(variables, images))
        fused = network.fuse(variables)
        deployed = np.asarray(quick_jit(network.clone(deploy=True).apply)(fused, images))
    assert trained.shape == (2, 42, 35, CLASSES)
    assert trained.dtype == deployed.dtype == dtype
    assert abs(trained - deployed).max() <= tolerance * abs(trained).max()


@pytest.mark.slow
@pytest.mark.parametrize("block", ["mobileone", "qarepvgg", "repvit"])
def test_a_backbone_of_other_blocks_fuses(block):
    """Layers are not one per block, identities leave no trace, and residual connections stay."""
    options = {"stem_stride": 4, "activation": "gelu", "head": "norm"} if block == "repvit" else {}
    strides = (1, 2, 2, 2) if options else None
    variant = rv.Variant(
        block, (1, 1, 2, 1), (8, 8, 8, 16), 8, strides=strides, block=block, **options
    )
    segmenter = tiny(variant, fast=True)
    variables = random_variables(segmenter, size=33)
    images = random_images((2, 42, 35, 3))
    trained = np.asarray(quick_jit(segmenter.apply)(variables, images))
    fused = segmenter.fuse(variables)
    deployed = np.asarray(quick_jit(segmenter.clone(deploy=True).apply)(fused, images))
    assert abs(trained - deployed).max() <= 1e-5 * abs(trained).max()


def test_fuse_params_needs_no_model(network):
    """It folds every convolution with a norm, and drops the auxiliary head alone."""
    variables = random_variables(network, size=33)
    fused = rv.fuse_params(variables)
    wanted = jax.eval_shape(
        network.clone(deploy=True).init, jax.random.key(0), jnp.zeros((1, 33, 33, 3))
    )
    assert jax.tree.map(jnp.shape, fused) == jax.tree.map(jnp.shape, wanted)
    assert variables["params"].keys() - fused["params"].keys() == {"aux_backbone"}
    assert not any("bn" in path or "aux" in path for path in paths(fused))
    np.testing.assert_array_equal(
        fused["params"]["head"]["kernel"], variables["params"]["head"]["kernel"]
    )
    as_model = network.fuse(variables)
    jax.tree.map(np.testing.assert_array_equal, fused, as_model)


def test_fuse_model_drops_the_auxiliary_head():
    network = tiny()
    variables = random_variables(network, size=33)
    images = jax.ShapeDtypeStruct((1, 33, 33, 3), jnp.float32)
    fused = rv.fuse_model(network, variables, images)
    jax.tree.map(np.testing.assert_array_equal, fused, network.fuse(variables))


def test_a_fused_segmenter_becomes_trainable_again():
    network = tiny()
    variables = random_variables(network, size=33)
    images = random_images((1, 33, 33, 3))
    again = rv.unfuse_params(network.fuse(variables), like=variables)
    assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, variables)
    before, after = (quick_jit(network.apply)(v, images) for v in (variables, again))
    assert abs(before - after).max() <= 1e-5 * abs(before).max()


def test_an_auxiliary_head_beside_no_block_stays():
    """Only heads beside what is fused are known to be for training alone."""
    head = random_variables(tiny(), size=33)["params"]["aux_backbone"]
    block = random_variables(rv.RepVGGBlock(4), size=8, channels=4)
    other = {"kernel": np.zeros((1, 1, 2, 2), np.float32)}
    tree = {
        "params": {"net": block["params"], "aux_other": head, "other": other},
        "batch_stats": {"net": block["batch_stats"], "aux_other": {}},
    }
    assert rv.fuse_params(tree)["params"]["aux_other"] is head


@pytest.mark.parametrize("size", [(33, 41), (32, 47), (1, 9), (8, 8)])
def test_every_image_size_works(size):
    network = tiny()
    variables = random_variables(network, size=33)
    images = jnp.asarray(random_images((2, *size, 3)))
    logits = jax.eval_shape(network.apply, variables, images)
    assert logits.shape == (2, *size, CLASSES)


def test_a_feature_stays_where_the_image_has_it():
    """Logits of a pixel shift with the image by whole strides, at sizes other than 8 k + 1, too."""
    shallow = rv.Variant("shallow", (1, 1, 1, 1), (8, 8, 8, 8), stem_channels=8)
    network = tiny(shallow, bins=(1,))
    variables = random_variables(network, size=33)
    # Without the pyramid, whose means see the whole image, the network is shift-equivariant.
    for name in ("scale", "bias"):
        variables["params"]["pyramid1"]["bn_single"][name][:] = 0
    image = np.zeros((1, 200, 204, 3), np.float32)
    image[0, 96:104, 96:104] = 3
    apply = quick_jit(network.apply)
    straight = apply(variables, image)
    moved = apply(variables, np.roll(image, (8, 8), (1, 2)))
    inner = np.s_[:, 90:110, 90:110]
    expected = np.roll(straight, (8, 8), (1, 2))
    np.testing.assert_allclose(moved[inner], expected[inner], atol=1e-4)
    assert np.ptp(np.asarray(straight)[inner]) > 0.1


@pytest.mark.slow
def test_training_gives_auxiliary_logits_and_needs_a_key_for_dropout():
    network = tiny()
    variables = random_variables(network, size=33)
    images = random_images((2, 33, 33, 3))

    @functools.partial(quick_jit, static_argnums=1)
    def train(seed, mutable):
        rngs = {"dropout": jax.random.key(seed)}
        return network.apply(variables, images, train=True, mutable=list(mutable), rngs=rngs)

    logits, new = train(0, ("batch_stats", "auxiliary"))
    assert new["auxiliary"]["aux_backbone"].shape == logits.shape == (2, 33, 33, CLASSES)
    again, without = train(0, ("batch_stats",))
    np.testing.assert_array_equal(again, logits)
    assert "auxiliary" not in without
    other, _ = train(1, ("batch_stats",))
    assert abs(other - logits).max() > 0
    with pytest.raises(Exception, match="dropout"):
        network.apply(variables, images, train=True, mutable=["batch_stats"])


def test_dropout_drops_whole_channels():
    """A dropped channel is 0 everywhere in an image; which one differs between images."""
    network = tiny(dropout=0.5, width=64)
    variables = random_variables(network, size=33)

    @quick_jit
    def dropped_of(images):
        _, new = network.apply(
            variables,
            images,
            train=True,
            mutable=["batch_stats", "intermediates"],
            rngs={"dropout": jax.random.key(0)},
            capture_intermediates=lambda module, _: module.name == "drop",
        )
        return new["intermediates"]["drop"]["__call__"][0]

    dropped = np.asarray(dropped_of(random_images((2, 33, 33, 3))))
    zero = (dropped == 0).all(axis=(1, 2))
    assert 16 < zero[0].sum() < 48
    assert (zero[0] != zero[1]).any()


# Dilation.


def test_dilation_of_every_layer():
    """The paper's two settings at stride 8; blocks keep the identity of the classifier."""
    plain, fast = (dilations(rv.get_variant("B1g2"), fast=fast) for fast in (False, True))
    assert plain == (1,) * 10 + (2,) * 16 + (4,)
    assert fast == (1,) * 22 + (2,) * 4 + (4,)
    for is_fast in (False, True):
        network = rv.create_segmenter("B1g2", 19, fast=is_fast)
        layers = make_backbone(network).layers
        classifier = rv.get_variant("B1g2").layers()
        assert [layer.identity for layer in layers] == [layer.identity for layer in classifier]
        assert np.prod([layer.stride for layer in layers]) == 8


def test_the_1x1_branch_is_not_dilated():
    """An impulse reaches as far as the dilated 3x3 kernel, and its center gets both branches."""
    block = rv.RepVGGBlock(2, dilation=4, activation=None)
    x = np.zeros((1, 17, 17, 2), np.float32)
    x[0, 8, 8] = 1
    variables = random_variables(block, size=17, channels=2)
    offset = block.apply(variables, np.zeros_like(x))
    response = np.abs(block.apply(variables, x) - offset).sum(-1)[0]
    assert {tuple(place) for place in np.argwhere(response > 1e-4)} == {
        (row, column) for row in (4, 8, 12) for column in (4, 8, 12)
    }


def test_dilations_must_fit_the_blocks():
    with pytest.raises(ValueError, match="3 dilations"):
        rv.create_model("A0", dilations=(1, 2, 4))
    with pytest.raises(ValueError, match="1 or more"):
        rv.create_model(rv.Variant("two", (2,), (8,), stem_channels=8), dilations=(1, 0))


@pytest.mark.parametrize("name", ["resnet50", "ResNet-50", "resnet_50"])
def test_resnets_go_by_the_usual_names(name):
    assert rv.create_segmenter(name, 19).variant == RESNETS["ResNet-50"]


def test_resnets_of_the_paper():
    """Parameters of the classifier's convolutions: torchvision's, without fc, and the deep stem."""
    deep_stem = 27 * 64 + 9 * 64 * 64 + 9 * 64 * 128 + 2 * (64 + 64 + 128)
    # The first block is twice as wide at its input as torchvision's.
    wider = 64 * (64 + 256)
    shallow_stem = 49 * 3 * 64 + 2 * 64
    for name, whole in (("ResNet-50", 25_557_032), ("ResNet-101", 44_549_160)):
        backbone = make_backbone(rv.create_segmenter(name, 19))
        shapes = jax.eval_shape(backbone.init, jax.random.key(0), jnp.zeros((1, 33, 33, 3)))
        count = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
        assert count == whole - (2048 * 1000 + 1000) - shallow_stem + deep_stem + wider
        rates = [layer.dilation for layer in backbone.layers]
        assert rates[-3:] == [4, 4, 4]
        assert set(rates[7:-3]) == {2}


@pytest.mark.parametrize(
    ("arguments", "options", "keyword"),
    [
        (("A7", 19), {}, "ResNet-50"),
        (("A0", 1), {}, "num_classes"),
        (("A0", 19), {"bins": (1, 1)}, "bins"),
        (("A0", 19), {"dropout": 1.0}, "dropout"),
        (("A0", 19), {"output_stride": 7}, "output_stride"),
        (("resnet50", 19), {"output_stride": 2}, "strides 4, 8, 16, 32"),
        (("resnet50", 19), {"fast": True}, "fast"),
        (("A0", 19), {"width": 0}, "width"),
        (("A0", 19), {"lowering": "magic"}, "lowering"),
    ],
)
def test_segmenters_that_cannot_be(arguments, options, keyword):
    with pytest.raises(ValueError, match=keyword):
        rv.create_segmenter(*arguments, **options)


def test_variables_of_other_classes_are_told_with_both_numbers():
    images = jax.ShapeDtypeStruct((1, 33, 33, 3), "float32")
    variables = jax.eval_shape(tiny().init, jax.random.key(0), images)
    other = tiny().clone(num_classes=CLASSES + 2)
    with pytest.raises(ValueError, match=rf"num_classes={CLASSES + 2}.* {CLASSES} classes"):
        jax.eval_shape(other.apply, variables, images)


# Starting from a classifier.


@functools.cache
def classifier():
    model = rv.create_model(TINY, num_classes=7)
    return model, random_variables(model, seed=3)


def loaded(variables, **options):
    return rv.load_weights(jax.device_get(named_leaves(variables)), variant=TINY, **options)


@pytest.mark.parametrize("form", ["training", "deploy"])
def test_a_segmenter_starts_from_a_classifier(form):
    """Its feature maps are the classifier's, dilated; heads stay new, and both are listed."""
    model, variables = classifier()
    source = variables if form == "training" else model.fuse(variables)
    network = tiny()
    fresh = jax.tree.map(np.asarray, random_variables(network, size=33))
    started = start_from_classifier(loaded(source), fresh)
    images = random_images((1, 33, 33, 3))
    dilated = rv.create_model(TINY, num_classes=0, output_stride=8)
    backbone = {name: tree["backbone"] for name, tree in started.variables.items()}
    expected = {
        name: {k: v for k, v in tree.items() if k != "head"} for name, tree in variables.items()
    }
    features = functools.partial(dilated.apply, method="features")
    ours, theirs = (quick_jit(features)(v, images)["stage4"] for v in (backbone, expected))
    assert abs(ours - theirs).max() <= 1e-5 * abs(theirs).max()
    assert len(started.taken) == 10
    assert set(started.replaced) == fresh["params"].keys() - {"backbone"}
    assert started.unfused == (form == "deploy")
    assert "10 blocks" in str(started)
    assert "decoder" in str(started)
    np.testing.assert_array_equal(
        started.variables["params"]["head"]["kernel"], fresh["params"]["head"]["kernel"]
    )


def test_a_deployed_classifier_of_other_blocks():
    """Its variant says what its convolutions are unfused to."""
    variant = rv.Variant("q", (1, 1), (8, 16), stem_channels=8, strides=(1, 2), block="qarepvgg")
    model = rv.create_model(variant, num_classes=7)
    deployed = model.fuse(random_variables(model))
    weights = rv.load_weights(jax.device_get(named_leaves(deployed)), variant=variant)
    network = rv.create_segmenter(
        variant, CLASSES, output_stride=4, bins=(1, 2), width=8, auxiliary_width=4
    )
    fresh = jax.tree.map(np.asarray, random_variables(network, size=33))
    started = start_from_classifier(weights, fresh, variant=variant)
    fused = model.fuse({name: tree["backbone"] for name, tree in started.variables.items()})
    for name, block in fused["params"].items():
        chex.assert_trees_all_close(block, deployed["params"][name], rtol=1e-5, atol=1e-5)


def test_another_backbone_is_refused():
    other = rv.Variant("other", (1, 1, 6, 1), (8, 8, 16, 32), stem_channels=8, groups=2)
    fresh = random_variables(tiny(other), size=33)
    with pytest.raises(ValueError, match="stage4"):
        start_from_classifier(loaded(classifier()[1]), fresh)
    with pytest.raises(ValueError, match="backbone"):
        start_from_classifier(loaded(classifier()[1]), classifier()[1])


def test_a_resnet_starts_from_semseg_weights(rng, tmp_path):
    """Under the keys of hszhao/semseg; the classifier and counters are left out."""
    network = tiny(TINY_RESNET)
    fresh = random_variables(network, size=33)
    saved = {"module.fc.weight": rng.normal(size=(10, 32)), "module.fc.bias": rng.normal(size=10)}

    def convolution(key, norm_key, outputs, inputs, size):
        saved[f"module.{key}.weight"] = rng.normal(size=(outputs, inputs, size, size))
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            saved[f"module.{norm_key}.{leaf}"] = rng.uniform(0.5, 2, outputs)
        saved[f"module.{norm_key}.num_batches_tracked"] = np.array(7)

    for index, (inputs, outputs) in enumerate([(3, 4), (4, 4), (4, 8)], start=1):
        convolution(f"conv{index}", f"bn{index}", outputs, inputs, 3)
    for stage, block, inputs, width in [
        (1, 0, 8, 4), (2, 0, 16, 4), (2, 1, 16, 4), (3, 0, 16, 4), (4, 0, 16, 8)
    ]:  # fmt: skip
        at = f"layer{stage}.{block}"
        convolution(f"{at}.conv1", f"{at}.bn1", width, inputs, 1)
        convolution(f"{at}.conv2", f"{at}.bn2", width, width, 3)
        convolution(f"{at}.conv3", f"{at}.bn3", 4 * width, width, 1)
        if not block:
            convolution(f"{at}.downsample.0", f"{at}.downsample.1", 4 * width, inputs, 1)
    started = start_from_classifier(load_resnet({"state_dict": saved}, variant="ResNet-50"), fresh)
    params = started.variables["params"]["backbone"]
    kernel = saved["module.layer2.0.downsample.0.weight"].transpose(2, 3, 1, 0)
    taken = params["stage2_block0"]["shortcut"]["conv_single"]["kernel"]
    np.testing.assert_allclose(taken, kernel, rtol=1e-6)
    np.testing.assert_allclose(
        started.variables["batch_stats"]["backbone"]["stem2"]["bn_single"]["var"],
        saved["module.bn3.running_var"],
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        params["stage2_block1"]["conv1"]["bn_single"]["scale"],
        saved["module.layer2.1.bn2.weight"],
        rtol=1e-6,
    )
    stored = {key: np.float32(value) for key, value in saved.items() if value.ndim}
    write_zip(tmp_path / "resnet.pth", stored, wrapper="state_dict")
    from_file = start_from_classifier(
        load_resnet(tmp_path / "resnet.pth", variant="ResNet-50"), fresh
    )
    chex.assert_trees_all_equal(from_file.variables, started.variables)
    del saved["module.layer2.1.conv2.weight"]
    with pytest.raises(ValueError, match="stage2_block1"):
        start_from_classifier(load_resnet(saved, variant="ResNet-50"), fresh)
    with pytest.raises(ValueError, match="deep stem"):
        load_resnet({"features.0.weight": kernel}, variant="ResNet-50")


# Names, which checkpoints outlive.


@pytest.mark.core
def test_names_outside_the_backbone_never_change():
    """Those of the backbone are the classifier's (tests/test_model.py)."""
    network = rv.create_segmenter("A0", 19)
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 33, 33, 3)))
    found = {
        f"{path} {list(leaf.shape)}"
        for path, leaf in zip(paths(shapes), jax.tree.leaves(shapes), strict=True)
        if "/backbone/" not in path
    }
    expected = {
        "params/aux_backbone/conv/kernel [3, 3, 192, 256]",
        "params/aux_backbone/logits/bias [19]",
        "params/aux_backbone/logits/kernel [1, 1, 256, 19]",
        "params/decoder/conv_single/kernel [3, 3, 2560, 512]",
        "params/head/bias [19]",
        "params/head/kernel [1, 1, 512, 19]",
        *(f"params/pyramid{bins}/conv_single/kernel [1, 1, 1280, 320]" for bins in (1, 2, 3, 6)),
    }
    for norm, width in (
        ("aux_backbone/bn", 256),
        ("decoder/bn_single", 512),
        *((f"pyramid{bins}/bn_single", 320) for bins in (1, 2, 3, 6)),
    ):
        expected |= {f"params/{norm}/{leaf} [{width}]" for leaf in ("scale", "bias")}
        expected |= {f"batch_stats/{norm}/{leaf} [{width}]" for leaf in ("mean", "var")}
    assert found == expected
    backbone = shapes["params"]["backbone"]
    classifier = jax.eval_shape(
        rv.create_model("A0", num_classes=0).init, jax.random.key(0), jnp.zeros((1, 33, 33, 3))
    )
    assert paths(backbone) == paths(classifier["params"])


def test_names_of_a_resnet_never_change():
    network = tiny(TINY_RESNET)
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 33, 33, 3)))
    kernels = [path for path in paths(shapes["params"]["backbone"]) if path.endswith("kernel")]
    convolutions = [f"stem{index}" for index in range(3)]
    for block in ("stage1_block0", "stage2_block0", "stage2_block1", "stage3_block0"):
        convolutions += [f"{block}/conv{index}" for index in range(3)]
    convolutions += [f"stage4_block0/conv{index}" for index in range(3)]
    convolutions += [f"stage{stage}_block0/shortcut" for stage in (1, 2, 3, 4)]
    assert sorted(kernels) == sorted(f"{name}/conv_single/kernel" for name in convolutions)


@pytest.mark.parametrize("backbone", ["A0", "ResNet-50"])
def test_the_name_of_an_activation_is_refused(backbone):
    with pytest.raises(ValueError, match="activation='silu' must be a function"):
        rv.create_segmenter(backbone, num_classes=3, activation="silu")


@pytest.mark.parametrize(
    ("backbone", "title"),
    [
        ("A0", "PSPNet on RepVGG A0-fast"),
        ("mobileone_s0", "PSPNet on mobileone_s0-fast"),
        ("ResNet-50", "PSPNet on ResNet-50"),
    ],
)
def test_a_title_is_that_of_the_backbone(backbone, title):
    fast = backbone != "ResNet-50"
    assert network_title(rv.create_segmenter(backbone, num_classes=3, fast=fast)) == title
