"""Every function on trees takes the same containers, and gives back the container that it got."""

import collections
from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict
from flax.training.train_state import TrainState

import repvgg_jax as rv
from repvgg_jax.reparam import decay_mask, equivalent_l2
from tests.helpers.jit import quick_jit
from tests.helpers.trees import TINY_AUXILIARY, random_variables

pytestmark = pytest.mark.core

MODEL = rv.create_model(TINY_AUXILIARY, num_classes=3)
BLOCKS = 5


class State(TrainState):
    batch_stats: Any = None
    ema_params: Any = None


class Pair(NamedTuple):
    params: Any
    batch_stats: Any


def plain(tree):
    return {k: plain(c) for k, c in tree.items()} if isinstance(tree, Mapping) else tree


def linen(tree):
    """A merged tree of NNX as two collections."""
    params, stats = {}, {}
    for key, child in tree.items():
        if isinstance(child, dict):
            params[key], below = linen(child)
            stats |= {key: below} if below else {}
        else:
            (stats if key in ("mean", "var") else params)[key] = child
    return params, stats


def nnx_state(variables):
    module = rv.to_nnx(MODEL, variables)
    return nnx.state(module, (nnx.Param, nnx.BatchStat))


def boxed(variables):
    return jax.tree.map(lambda leaf: nn.Partitioned(leaf, (None,) * leaf.ndim), variables)


def defaultdicts(tree):
    if not isinstance(tree, dict):
        return tree
    return collections.defaultdict(dict, {k: defaultdicts(c) for k, c in tree.items()})


def train_state(variables):
    return State.create(
        apply_fn=MODEL.apply,
        params=variables["params"],
        tx=optax.sgd(0.1, momentum=0.9),
        batch_stats=variables["batch_stats"],
    )


# How to wrap variables, and how to get (params, batch_stats) out again.
CONTAINERS = {
    "dict": (lambda v: v, lambda t: (t["params"], t.get("batch_stats", {}))),
    "FrozenDict": (FrozenDict, lambda t: (t.unfreeze()["params"], t.get("batch_stats", {}))),
    "defaultdict": (defaultdicts, lambda t: (t["params"], t.get("batch_stats", {}))),
    "a list": (lambda v: [v, 7], lambda t: (t[0]["params"], t[0].get("batch_stats", {}))),
    "a nest": (
        lambda v: {"a": ({"model": v}, None)},
        lambda t: (t["a"][0]["model"]["params"], t["a"][0]["model"].get("batch_stats", {})),
    ),
    "a named tuple": (lambda v: Pair(**v), lambda t: (t.params, t.batch_stats)),
    "TrainState": (train_state, lambda t: (t.params, t.batch_stats)),
    "nnx.State": (nnx_state, lambda t: linen(nnx.to_pure_dict(t))),
    "Partitioned": (boxed, lambda t: (nn.unbox(t)["params"], nn.unbox(t).get("batch_stats", {}))),
}


@pytest.fixture(scope="module")
def variables():
    return jax.tree.map(jnp.asarray, random_variables(MODEL))


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers(name, variables):
    wrap, unwrap = CONTAINERS[name]
    wrapped = wrap(variables)
    fused = rv.fuse_params(wrapped, expect=BLOCKS)
    assert type(fused) is type(wrapped)
    expected = rv.fuse_params(variables)["params"]
    params, stats = unwrap(fused)
    chex.assert_trees_all_equal(plain(params), expected)
    assert not stats
    assert jax.tree.structure(rv.fuse_params(fused)) == jax.tree.structure(fused)

    again = rv.unfuse_params(fused, like=wrapped)
    assert jax.tree.structure(again) == jax.tree.structure(wrapped)
    params, _ = unwrap(rv.fuse_params(again))
    chex.assert_trees_all_close(plain(params), expected, rtol=1e-4, atol=1e-5)
    penalty = equivalent_l2(variables)
    assert penalty > 1
    np.testing.assert_allclose(equivalent_l2(wrapped), penalty, rtol=1e-6)


def test_blocks_of_a_partly_fused_nnx_state_are_counted():
    variables = random_variables(MODEL)
    state = nnx_state(variables)
    count = len(rv.fuse_params(variables)["params"]) - 1  # without the head
    part = rv.fuse_params(state, exclude=("stem",), expect=count - 1)
    rv.fuse_params(part, expect=count)
    with pytest.raises(ValueError, match=f"found {count} blocks of the {count + 1}"):
        rv.fuse_params(part, expect=count + 1)


@pytest.mark.parametrize("name", ["FrozenDict", "defaultdict", "Partitioned", "nnx.State"])
def test_masks_have_the_structure_of_their_parameters(name, variables):
    wrapped = CONTAINERS[name][0](variables)
    params = wrapped if name == "nnx.State" else wrapped["params"]
    mask = decay_mask(params)
    assert type(mask) is type(params)
    # A mask is a prefix of what it masks.
    spread = jax.tree.map(lambda m, p: jax.tree.map(lambda _: m, p), mask, params)
    spread = linen(nnx.to_pure_dict(spread))[0] if name == "nnx.State" else nn.unbox(spread)
    assert plain(spread) == decay_mask(variables["params"])


def test_boxes_name_the_axes_of_what_is_in_them(variables):
    names = jax.tree.map(lambda leaf: (None, None, "in", "out")[-leaf.ndim :], variables)
    tree = jax.tree.map(nn.Partitioned, variables, names)
    fused = rv.fuse_params(tree)["params"]["stage1_block1"]["reparam"]
    assert fused["kernel"].names == (None, None, "in", "out")
    assert fused["bias"].names == ("out",)


def test_modules_and_other_objects_beside_variables_are_leaves(variables):
    tree = {"model": MODEL, "variables": variables, "name": "A", "step": 3, "none": None}
    fused = rv.fuse_params(tree, expect=BLOCKS)
    assert fused["model"] is MODEL
    assert {key: fused[key] for key in ("name", "step", "none")} == {
        "name": "A",
        "step": 3,
        "none": None,
    }


def test_the_optimizer_state_of_a_train_state_stays(variables):
    state = train_state(variables)
    fused = rv.fuse_params(state)
    assert fused.opt_state is state.opt_state
    assert fused.step == state.step
    assert fused.tx is state.tx


@pytest.mark.parametrize("own_statistics", [False, True])
def test_copies_of_the_parameters_are_fused_with_their_statistics(variables, own_statistics):
    copy = jax.tree.map(lambda leaf: 2 * leaf, variables)
    tree = {**variables, "ema_params": copy["params"], "frozen_params": {"scale": np.ones(3)}}
    if own_statistics:
        tree["ema_batch_stats"] = copy["batch_stats"]
    stats = (copy if own_statistics else variables)["batch_stats"]
    fused = rv.fuse_params(tree, expect=BLOCKS)
    assert fused.keys() == {"params", "ema_params", "frozen_params"}
    assert fused["frozen_params"] is tree["frozen_params"]
    chex.assert_trees_all_equal(fused["params"], rv.fuse_params(variables)["params"])
    expected = rv.fuse_params({"params": copy["params"], "batch_stats": stats})["params"]
    chex.assert_trees_all_equal(fused["ema_params"], expected)
    again = rv.fuse_params(rv.unfuse_params(fused, like=tree))
    chex.assert_trees_all_close(again["ema_params"], expected, rtol=1e-4, atol=1e-5)

    del tree["ema_params"]["stem"]["bn1x1"]
    with pytest.raises(ValueError, match=r"ema_params has 4 blocks.* has 5"):
        rv.fuse_params(tree)


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_like_may_be_shapes(variables, kind):
    like = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    deployed = jax.tree.map(kind, rv.fuse_params(variables))
    trainable = rv.unfuse_params(deployed, like=like)
    chex.assert_trees_all_equal_shapes_and_dtypes(trainable, like)
    assert {isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(trainable)} == {
        kind is jnp.asarray
    }
    chex.assert_trees_all_close(rv.fuse_params(trainable), deployed, rtol=1e-4, atol=1e-5)
    kernel = trainable["params"]["stem"]["conv1x1"]["kernel"]
    assert 0.1 < float(abs(kernel).max()) <= 3**-0.5
    other = trainable["params"]["stage1_block0"]["conv1x1"]["kernel"]
    assert not np.array_equal(kernel, other[:, :, :3])


def test_shapes_fuse_to_shapes(variables):
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), variables)
    fused = rv.fuse_params(shapes)
    chex.assert_trees_all_equal_shapes_and_dtypes(fused, rv.fuse_params(variables))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(fused))


@pytest.mark.parametrize("copies", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3))])
def test_a_stack_has_the_penalty_of_its_layers(variables, copies):
    penalty = quick_jit(equivalent_l2)
    one = float(penalty(variables))
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf] * copies), variables)
    assert float(penalty(stack)) == pytest.approx(copies * one, rel=1e-5)
    two_axes = jax.tree.map(lambda leaf: leaf[None], stack)
    assert float(penalty(two_axes)) == pytest.approx(copies * one, rel=1e-5)


def test_parameters_alone_have_no_penalty(variables):
    with pytest.raises(ValueError, match="batch_stats"):
        equivalent_l2(variables["params"])
