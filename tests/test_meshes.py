"""All forms of a block on meshes with Auto and Explicit axes, under shard_map and pmap."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import repvgg_jax as rv
from repvgg_jax import meshes, reparam
from repvgg_jax.segmentation import inference
from tests.helpers.jit import quick_jit
from tests.helpers.trees import random_images, randomize

IMAGES = random_images((16, 14, 14, 3))
IMAGES_OF = re.compile(r"tensor<(\d+)x6x6x8x")  # of feature maps of six by six pixels
OVER_BATCH, EVERYWHERE = PartitionSpec("data"), PartitionSpec()


def mesh_of(kind):
    return jax.make_mesh((8,), ("data",), axis_types=(kind,))


def network(**options):
    """A first layer and a block that CPUs compute by patches, and their variables."""
    model = nn.Sequential([rv.RepVGGBlock(32, **options), rv.RepVGGBlock(32, stride=2, **options)])
    shape = jax.ShapeDtypeStruct(IMAGES.shape, jnp.float32)
    return model, randomize(jax.eval_shape(model.init, jax.random.key(0), shape))


def training_step(model, axis=None):
    def step(variables, images):
        def loss(params):
            y, new = model.apply({**variables, "params": params}, images, mutable=["batch_stats"])
            value = jnp.square(y).mean()
            return value if axis is None else jax.lax.pmean(value, axis), new["batch_stats"]

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    return step


def close(a, b, tolerance=2e-4):
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        scale = max(np.abs(left).max(), 1e-3)
        assert np.abs(np.asarray(left) - np.asarray(right)).max() <= tolerance * scale


def placed(mesh, variables, images):
    return (
        jax.device_put(variables, NamedSharding(mesh, EVERYWHERE)),
        jax.device_put(images, NamedSharding(mesh, OVER_BATCH)),
    )


@pytest.mark.parametrize("set_mesh", [False, True])
@pytest.mark.parametrize("group", [None, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["branches", "covariance"])
@pytest.mark.parametrize("kind", [AxisType.Explicit, pytest.param("Auto", marks=pytest.mark.slow)])
def test_training_on_a_mesh_is_training(kind, form, group, set_mesh):
    mesh = mesh_of(AxisType.Auto if kind == "Auto" else kind)
    model, variables = network(train_form=form, bn_group_size=group, train=True)
    expected = quick_jit(training_step(model))(variables, IMAGES)
    with jax.set_mesh(mesh) if set_mesh else contextlib.nullcontext():
        arguments = placed(mesh, variables, IMAGES)
        found = quick_jit(training_step(model))(*arguments)
        jax.jit(training_step(model)).trace(*arguments).lower(lowering_platforms=("tpu",))
    close(expected, found)


GROUPS = {"groups": 4, "bn_group_size": 2, "train": True}


def mesh_of_two_axes(kind):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


@pytest.mark.parametrize("form", ["branches", "covariance"])
@pytest.mark.parametrize(
    "kind", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)]
)
def test_channel_groups_where_images_are_on_one_axis_of_two(kind, form):
    """XLA alone sums the gradient of a kernel over the other axis, too."""
    with jax.enable_x64(True):
        wide = {"dtype": jnp.float64, "param_dtype": jnp.float64}
        block = rv.RepVGGBlock(8, train_form=form, **GROUPS, **wide)
        images = random_images((16, 6, 6, 8)).astype(np.float64)
        variables = randomize(jax.eval_shape(block.init, jax.random.key(0), images))
        variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
        expected = quick_jit(training_step(block))(variables, images)
        arguments = placed(mesh_of_two_axes(kind), variables, images)
        close(expected, quick_jit(training_step(block))(*arguments), tolerance=1e-12)


def lowered_for(platform, function, *arguments):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("kind", "form", "options"),
    [
        (AxisType.Auto, "branches", {"spmd_axis_name": "data"}),
        (AxisType.Explicit, "covariance", {}),
    ],
)
def test_blocks_in_channel_groups_are_mapped_over_an_axis_of_a_mesh(kind, form, options):
    """`jax.shard_map` cannot split images inside; several blocks of one size train at once."""
    block = rv.RepVGGBlock(8, train_form=form, **GROUPS)
    images = random_images((8, 4, 6, 6, 8))
    variables = randomize(jax.eval_shape(block.init, jax.random.key(0), images[0]))
    mapped = jax.vmap(training_step(block), (None, 0), **options)
    assert "convolution" in lowered_for("cuda", mapped, *placed(mesh_of(kind), variables, images))


@pytest.mark.parametrize("form", ["branches", "covariance"])
def test_shard_map_over_one_of_two_explicit_axes(form):
    mesh = mesh_of_two_axes(AxisType.Explicit)
    block = rv.RepVGGBlock(8, train_form=form, **GROUPS)
    images = random_images((16, 6, 6, 8))
    variables = randomize(jax.eval_shape(block.init, jax.random.key(0), images))
    mapped = jax.shard_map(
        lambda variables, images: training_step(block, "data")(variables, images)[0][0],
        mesh=mesh,
        in_specs=(EVERYWHERE, OVER_BATCH),
        out_specs=EVERYWHERE,
        axis_names={"data"},
    )
    assert jax.jit(mapped).trace(*placed(mesh, variables, images)).out_info.shape == ()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("form", ["branches", "covariance", "deploy"])
def test_gpus_compute_their_own_images_in_channel_groups(form, kind):
    images = random_images((16, 6, 6, 8))
    options = {"dtype": jnp.bfloat16, "groups": 4}
    block = rv.RepVGGBlock(8, **options, deploy=True)
    if form != "deploy":
        block = rv.RepVGGBlock(8, **options, train_form=form, train=True)
    variables = randomize(jax.eval_shape(block.init, jax.random.key(0), images))
    step = block.apply if form == "deploy" else training_step(block)
    traced = jax.jit(step).trace(*placed(mesh_of(kind), variables, images))
    convolved = {}
    for platform in ("cpu", "cuda"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        operands = re.findall(r"stablehlo.convolution.*: \((.*)\) ->", text)
        convolved[platform] = [int(size) for each in operands for size in IMAGES_OF.findall(each)]
    assert set(convolved["cpu"]) == {16}
    assert len(convolved["cuda"]) >= 1
    assert set(convolved["cuda"]) == {2}


def test_feature_maps_in_channel_groups_are_not_gathered():
    images = jax.ShapeDtypeStruct((16, 6, 6, 8), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 2, 8), jnp.float32)
    mesh = mesh_of_two_axes(AxisType.Auto)
    convolve = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=4,
    )
    split = functools.partial(meshes.grouped_convolution, convolve)
    arguments = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))
        for a, spec in ((images, PartitionSpec(("data", "model"))), (kernel, EVERYWHERE))
    ]
    texts = [quick_jit(f).lower(*arguments).compile().as_text() for f in (convolve, split)]
    assert ["all-gather(" in text for text in texts] == [True, False]


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_deploy_form_on_a_mesh(kind):
    mesh = mesh_of(kind)
    model, variables = network()
    deployed = nn.Sequential([rv.RepVGGBlock(32, deploy=True, stride=s) for s in (1, 2)])
    expected = model.apply(variables, IMAGES)
    variables, images = placed(mesh, variables, IMAGES)
    fused = rv.fuse_params(variables)
    close(expected, quick_jit(deployed.apply)(fused, images))
    close(expected, quick_jit(model.apply)(variables, images))
    platforms = ("cpu", "cuda", "tpu")
    exported = jax.export.export(jax.jit(deployed.apply), platforms=platforms)(fused, images)
    assert exported.nr_devices == 8


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("form", ["branches", "covariance"])
def test_training_under_shard_map(form, check_vma):
    """Two images per device share statistics, as do groups of two in the whole batch."""
    mesh = mesh_of(AxisType.Explicit)
    model, variables = network(train_form=form, bn_group_size=2, train=True)
    expected = quick_jit(training_step(model))(variables, IMAGES)

    def local(variables, images):
        (value, stats), gradients = training_step(model, "data")(variables, images)
        if not check_vma:  # with the check, JAX sums gradients of what is replicated
            gradients = jax.lax.pmean(gradients, "data")
        return (value, jax.lax.pmean(stats, "data")), gradients

    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(EVERYWHERE, OVER_BATCH),
        out_specs=EVERYWHERE,
        check_vma=check_vma,
    )
    close(expected, quick_jit(mapped)(*placed(mesh, variables, IMAGES)))


@pytest.mark.parametrize("set_mesh", [False, True])
@pytest.mark.parametrize("form", ["branches", "covariance"])
def test_narrow_types_under_shard_map(form, set_mesh):
    """Traced and lowered for every platform: they have passes of their own."""
    mesh = mesh_of(AxisType.Explicit)
    model, variables = network(train_form=form, dtype=jnp.bfloat16, train=True)
    step = jax.shard_map(
        lambda variables, images: training_step(model, "data")(variables, images)[1],
        mesh=mesh,
        in_specs=(EVERYWHERE, OVER_BATCH),
        out_specs=EVERYWHERE,
    )
    with jax.set_mesh(mesh) if set_mesh else contextlib.nullcontext():
        traced = jax.jit(step).trace(*placed(mesh, variables, IMAGES))
        traced.lower(lowering_platforms=("cpu", "cuda", "tpu"))


@pytest.mark.parametrize("check_vma", [False, True])
def test_statistics_over_the_devices_of_an_axis(check_vma):
    mesh = mesh_of(AxisType.Auto)
    model, variables = network(train=True)
    expected = quick_jit(training_step(model))(variables, IMAGES)
    synchronized, _ = network(train=True, axis_name="data")

    def local(variables, images):
        result, gradients = training_step(synchronized, "data")(variables, images)
        return result, gradients if check_vma else jax.lax.pmean(gradients, "data")

    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(EVERYWHERE, OVER_BATCH),
        out_specs=EVERYWHERE,
        check_vma=check_vma,
    )
    close(expected, quick_jit(mapped)(variables, IMAGES))


def test_axes_and_groups_exclude_each_other():
    model, variables = network(train=True, axis_name="data", bn_group_size=2)
    step = training_step(model, "data")
    with pytest.raises(ValueError, match=r"groups of 2 images .*axis_name"):
        jax.eval_shape(jax.vmap(step, (None, 0), axis_name="data"), variables, IMAGES[None])
    model, variables = network(train=True, axis_name="data", train_form="covariance")
    with pytest.raises(ValueError, match="does not know axis_name='data'; use 'branches'"):
        jax.eval_shape(training_step(model), variables, IMAGES)


@pytest.mark.parametrize("form", ["branches", "covariance"])
def test_pmap(form):
    model, variables = network(train_form=form, bn_group_size=2, train=True)
    mapped = jax.pmap(training_step(model, "data"), axis_name="data", in_axes=(None, 0))
    shape = jax.ShapeDtypeStruct((8, 2, *IMAGES.shape[1:]), jnp.float32)
    mapped.lower(variables, shape)


@pytest.mark.parametrize("options", [{"dtype": jnp.bfloat16}, {"dtype": jnp.float16}])
@pytest.mark.parametrize("form", ["branches", "covariance"])
def test_narrow_types_at_stride_two_warn_of_nothing(form, options):
    model, variables = network(train_form=form, train=True, **options)
    jax.eval_shape(training_step(model), variables, IMAGES)


BLOCKS = {
    "ACB": reparam.ACB,
    "DBB": reparam.DBB,
    "QARepVGG": reparam.QAREPVGG,
    "MobileOne": reparam.mobileone(3, 2),
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("train", [False, True])
def test_every_block_on_explicit_axes(name, train):
    mesh = mesh_of(AxisType.Explicit)
    block = rv.ReparamBlock(8, spec=BLOCKS[name], train=train, se=rv.SqueezeExcite(4))
    images = random_images((16, 6, 6, 8))
    variables = randomize(jax.eval_shape(block.init, jax.random.key(0), images))
    arguments = placed(mesh, variables, images)
    jax.jit(training_step(block)).trace(*arguments)


@pytest.mark.parametrize("set_mesh", [False, True])
def test_a_segmenter_on_explicit_axes(set_mesh):
    """Its dropout, upsampling and auxiliary head, too."""
    mesh = mesh_of(AxisType.Explicit)
    variant = rv.Variant("tiny", (1, 1, 4), (8, 8, 8), 8, strides=(1, 2, 2))
    options = {"bins": (1, 2), "width": 8, "auxiliary_width": 8, "lowering": "plain"}
    model = rv.create_segmenter(variant, 3, **options)
    images = random_images((8, 16, 16, 3))
    variables = randomize(jax.eval_shape(model.init, jax.random.key(0), images))

    def step(variables, images):
        def loss(params):
            logits, new = model.apply(
                {**variables, "params": params},
                images,
                train=True,
                mutable=["batch_stats", "auxiliary"],
                rngs={"dropout": jax.random.key(1)},
            )
            return jnp.square(logits).mean(), new

        return jax.grad(loss, has_aux=True)(variables["params"])

    with jax.set_mesh(mesh) if set_mesh else contextlib.nullcontext():
        jax.jit(step).trace(*placed(mesh, variables, images))


@pytest.mark.parametrize("how", ["shard_map", "explicit"])
def test_windows_of_a_segmenter(how):
    """The sum over windows is sharded, and varies over the devices, as the images do."""
    mesh = mesh_of(AxisType.Explicit)
    images = jax.ShapeDtypeStruct(
        (8, 9, 11, 3), jnp.float32, sharding=NamedSharding(mesh, OVER_BATCH)
    )

    def scores(images):
        return inference.scores(lambda x: x, images, 3, inference.Protocol(window=6, flip=True))

    if how == "shard_map":
        scores = jax.shard_map(scores, mesh=mesh, in_specs=OVER_BATCH, out_specs=OVER_BATCH)
    assert jax.jit(scores).trace(images).lower().out_info.shape == (8, 9, 11, 3)
