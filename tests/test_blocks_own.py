"""A block that a user writes: trained, fused, unfused, proven, exported without a line of fold."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import repvgg_jax as rv
from repvgg_jax import proof, reparam
from repvgg_jax.export import Network, Normalize, export
from tests.helpers.jit import quick_jit
from tests.helpers.trees import random_images, random_variables, randomize

OWN = reparam.BlockSpec(
    "own",
    reparam.Sum(
        (
            reparam.Chain((reparam.Conv("square", (5, 5)), reparam.Norm("square_norm"))),
            reparam.Chain((reparam.Conv("row", (1, 5)), reparam.Norm("row_norm"))),
            reparam.SameShape(reparam.Norm("skip")),
        )
    ),
)


class Net(nn.Module):
    """Blocks inside other modules, beside layers that are not blocks."""

    deploy: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), name="stem")(x)
        block = rv.ReparamBlock(8, spec=OWN, deploy=self.deploy, activation=nn.silu, name="first")
        x = x + block(x, train)
        x = rv.ReparamBlock(8, spec=OWN, deploy=self.deploy, stride=2, name="second")(x, train)
        return nn.Dense(3, name="head")(x.mean(axis=(1, 2)))


def test_any_linen_model(tmp_path):
    images = random_images((6, 8, 8, 3))
    labels = np.arange(6) % 3
    model, optimizer = Net(), optax.adam(1e-2)
    variables = quick_jit(model.init)(jax.random.key(0), images)

    def step(carry, _):
        variables, state = carry

        def loss_fn(params):
            net = {**variables, "params": params}
            logits, new = model.apply(net, images, True, mutable=["batch_stats"])
            loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
            return loss.mean(), new

        (loss, new), grads = jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])
        updates, state = optimizer.update(grads, state)
        params = optax.apply_updates(variables["params"], updates)
        return ({**new, "params": params}, state), loss

    start = variables, optimizer.init(variables["params"])
    (variables, _), losses = quick_jit(lambda c: jax.lax.scan(step, c, length=20))(start)
    assert losses[-1] < losses[0] / 2

    variables = jax.device_get(variables)
    fused = rv.fuse_params(variables, blocks=(OWN,), expect=2)
    assert fused["params"]["second"]["reparam"]["kernel"].shape == (5, 5, 8, 8)
    assert proof.prove(model, variables, images, deployed=fused).holds
    assert proof.prove(model, variables, images).holds  # by walking the modules
    network = Network(model, fused, images=images, normalize=Normalize((0, 0, 0), (1, 1, 1)))
    assert export("stablehlo", network, tmp_path / "own.stablehlo").proven
    again = rv.unfuse_params(fused, like=variables, blocks=(OWN,))
    again = rv.fuse_params(again, blocks=(OWN,))
    chex.assert_trees_all_close(again, fused, atol=1e-5)
    kernel = again["params"]["first"]["reparam"]["kernel"]
    again["params"]["first"]["reparam"]["kernel"] = kernel + 0.1
    assert not proof.prove(model, variables, images, deployed=again).holds


def test_a_model_that_cannot_change_its_form():
    with pytest.raises(ValueError, match="Sequential has no field `deploy`"):
        proof.prove(nn.Sequential([nn.Dense(2)]), {}, random_images((1, 8, 8, 3)))


@pytest.mark.parametrize("block", [OWN, lambda layer: OWN], ids=["spec", "function"])
def test_a_network_of_them_by_name_of_its_fields(block):
    variant = rv.Variant("own", (1,), (8,), stem_channels=8, block=block)
    model = rv.create_model(variant, num_classes=3, lowering="plain")
    variables = random_variables(model)
    assert proof.prove(model, variables, random_images((4, 16, 16, 3))).holds


def test_a_fold_inside_a_gradient():
    """E.g. a penalty on the kernel that deploys."""
    block = rv.ReparamBlock(4, spec=OWN)
    x = jax.ShapeDtypeStruct((1, 8, 8, 4), jnp.float32)
    variables = randomize(jax.eval_shape(block.init, jax.random.key(0), x))

    def penalty(params):
        fused = rv.fuse_params({**variables, "params": params}, blocks=(OWN,))
        return jnp.square(fused["params"]["reparam"]["kernel"]).sum()

    params = jax.tree.map(jnp.asarray, variables["params"])
    gradient = quick_jit(jax.grad(penalty))(params)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert float(jnp.abs(gradient["row"]["kernel"]).max()) > 0
    assert not gradient["row_norm"]["bias"].any()  # the bias is not penalized


def _beside_depthwise(*groups):
    convs = (
        reparam.Chain((reparam.Conv(f"conv{i}", (3, 3), groups=g), reparam.Norm(f"norm{i}")))
        for i, g in enumerate(groups)
    )
    return reparam.BlockSpec("beside depthwise", reparam.Sum(tuple(convs)))


@pytest.mark.core
@pytest.mark.parametrize(
    ("own", "groups", "shown"),
    [
        ((None, "depthwise"), 1, True),
        (("depthwise", None), 1, True),
        ((None, "depthwise"), 2, False),  # or one group of half the channels, twice as wide
        (("depthwise", None), 2, False),
        (("depthwise", None), 8, True),
        (("depthwise", 4), 2, True),
    ],
)
def test_groups_beside_a_depthwise_convolution(own, groups, shown):
    """`fuse_params` folds what the parameters show, and refuses the rest instead of guessing."""
    spec = _beside_depthwise(*own)
    block = rv.ReparamBlock(8, spec=spec, groups=groups, activation=None)
    x = random_images((1, 6, 6, 8))
    variables = randomize(jax.eval_shape(block.init, jax.random.key(0), x))
    expected = block.apply(variables, x)
    trees = [rv.fuse_model(block, variables, x)]
    if shown:
        trees.append(rv.fuse_params(variables, blocks=(spec,)))
    else:
        with pytest.raises(ValueError, match="fuse_model"):
            rv.fuse_params(variables, blocks=(spec,))
    for fused in trees:
        kernel = fused["params"]["reparam"]["kernel"]
        folded = nn.Conv(8, (3, 3), feature_group_count=8 // kernel.shape[-2])
        actual = folded.apply({"params": fused["params"]["reparam"]}, x)
        np.testing.assert_allclose(actual, expected, atol=1e-5 * abs(expected).max())


@pytest.mark.core
def test_a_network_fuses_depthwise_convolutions_in_blocks_without_groups():
    spec = _beside_depthwise("depthwise", "depthwise")
    variant = rv.Variant(
        "own", (2,), (8,), 8, block=lambda layer: spec if layer.index else reparam.REPVGG
    )
    model = rv.create_model(variant, num_classes=3)
    x = random_images((1, 8, 8, 3))
    variables = random_variables(model, size=8)
    logits = model.clone(deploy=True).apply(model.fuse(variables), x)
    np.testing.assert_allclose(logits, model.apply(variables, x), atol=1e-4)
