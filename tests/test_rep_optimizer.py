"""RepOptimizer: the plain network trains as the branched one does."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import repvgg_jax as rv
from repvgg_jax import reparam
from tests.helpers.jit import quick_jit
from tests.helpers.trees import random_images

SEARCH = reparam.repopt_search()
SCALES = ("scale_3x3", "scale_1x1")
TINY = rv.Variant("tiny", (1,), (4,), stem_channels=4, stem_stride=1, strides=(1,), block="repopt")
BRANCHED = rv.Variant(
    "search", (1,), (4,), stem_channels=4, stem_stride=1, strides=(1,), block="repopt_search"
)


def model(variant, dtype=jnp.float64):
    return rv.create_model(variant, num_classes=3, dtype=dtype, param_dtype=dtype, lowering="plain")


@functools.cache
def searched():
    """A branched network in float64 after its search: scales that are not at their start."""
    with jax.enable_x64(True):
        x = jnp.zeros((1, 8, 8, 3))
        variables = quick_jit(model(BRANCHED).init)(jax.random.key(0), x)
        rng = np.random.default_rng(0)
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: (
                rng.uniform(0.3, 1.5, leaf.shape)
                if str(path[-2].key).startswith("scale")
                else np.asarray(leaf)
            ),
            variables,
        )


@functools.cache
def scales():
    return reparam.extract_scales(SEARCH, searched()["params"])


def plain():
    """The plain network that computes what the branched one does, before their norms, too."""
    variables = searched()
    params = dict(variables["params"])
    for layer in TINY.layers():
        own = params[layer.name]
        geometry = layer.geometry()
        inner = BRANCHED.layers()[0].block.train.terms[0]
        kernel = reparam.affine(inner, geometry, own, {}).kernel
        params[layer.name] = {"conv": {"kernel": kernel}, "bn": own["bn"]}
    return {**variables, "params": params}


def train(network, variables, optimizer, steps):
    images = random_images((4, 6, 6, 3), dtype=np.float64)
    labels = np.arange(4) % 3

    def step(carry, _):
        variables, state = carry

        def loss_fn(params):
            logits, new = network.apply(
                {**variables, "params": params}, images, True, mutable=["batch_stats"]
            )
            loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
            return loss.mean(), new

        (loss, new), grads = jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])
        updates, state = optimizer.update(grads, state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return ({**new, "params": params}, state), loss

    variables = jax.tree.map(jnp.asarray, variables)
    start = variables, optimizer.init(variables["params"])
    (variables, _), losses = quick_jit(lambda c: jax.lax.scan(step, c, length=steps))(start)
    return variables, losses


def decayed(params):
    """Kernels, and the scale that is the identity's kernel."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key == "kernel" or path[-2].key == "scale_identity", params
    )


def frozen(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-2].key in SCALES, params)


@pytest.mark.parametrize(
    ("momentum", "decay", "nesterov"),
    [(None, 0.0, False), (0.9, 0.0, False), (0.9, 1e-2, False), (0.9, 1e-2, True)],
)
def test_sgd_equals_the_branched_network_over_100_steps(momentum, decay, nesterov):
    rest = optax.chain(
        optax.add_decayed_weights(decay, decayed),
        optax.sgd(0.02 if momentum else 0.2, momentum=momentum, nesterov=nesterov),
    )
    with jax.enable_x64(True):
        branched = optax.chain(rest, optax.masked(optax.set_to_zero(), frozen))
        expected, losses = train(model(BRANCHED), searched(), branched, 100)
        optimizer = reparam.rep_optimizer(SEARCH, scales(), rest)
        got, own = train(model(TINY), plain(), optimizer, 100)
        assert losses[-1] < losses[0] / 2
        np.testing.assert_allclose(own, losses, rtol=1e-6)
        deployed = (model(v).fuse(t) for v, t in ((TINY, got), (BRANCHED, expected)))
        chex.assert_trees_all_close(*deployed, rtol=1e-6, atol=1e-6)
        if nesterov:  # without the multiplier they part
            _, other = train(model(TINY), plain(), rest, 100)
            assert np.abs(np.asarray(other) - np.asarray(losses)).max() > 1e-3


def test_adamw_equals_the_branched_network():
    """Adam's direction does not depend on the size of gradients, up to its epsilon."""
    adam = optax.scale_by_adam(eps=1e-30)
    rest = optax.chain(optax.add_decayed_weights(0.05, decayed), optax.scale(-2e-3))
    with jax.enable_x64(True):
        branched = optax.chain(adam, rest, optax.masked(optax.set_to_zero(), frozen))
        _, losses = train(model(BRANCHED), searched(), branched, 30)
        own = reparam.rep_optimizer(SEARCH, scales(), adam, rule="adamw")
        _, got = train(model(TINY), plain(), optax.chain(own, rest), 30)
        assert losses[-1] < losses[0]
        np.testing.assert_allclose(got, losses, rtol=1e-6)


@pytest.mark.core
def test_multipliers_are_the_authors():
    """s3^2 everywhere, s1^2 at the center, 1 on its diagonal where there is an identity."""
    transform = reparam.rep_optimizer(SEARCH, scales())
    params = plain()["params"]
    ones = jax.tree.map(np.ones_like, params)
    with jax.enable_x64(True):
        got, _ = transform.update(ones, transform.init(params))
    np.testing.assert_array_equal(got["head"]["kernel"], ones["head"]["kernel"])
    for name, own in scales().items():
        three, one = (np.asarray(own[s]["scale"]) ** 2 for s in SCALES)
        expected = np.broadcast_to(three, got[name]["conv"]["kernel"].shape).copy()
        expected[1, 1] += one
        if "scale_identity" in own:
            expected[1, 1] += np.eye(4)
        np.testing.assert_allclose(got[name]["conv"]["kernel"], expected)
    assert "scale_identity" not in scales()["stem"]


def test_boxes_are_kept():
    params = jax.tree.map(np.float32, plain()["params"])
    axes = (None, None, None, "model")

    def boxed(tree):
        return jax.tree.map(lambda leaf: nn.Partitioned(leaf, axes[-np.ndim(leaf) :]), tree)

    def outcome(params, scales):
        transform = reparam.rep_optimizer(SEARCH, scales)
        updates, _ = transform.update(params, transform.init(params))
        return updates, reparam.rep_init(SEARCH, scales, params, jax.random.key(2))

    found = reparam.extract_scales(SEARCH, boxed(searched()["params"]))
    got = outcome(boxed(params), found)
    chex.assert_trees_all_equal(got, boxed(outcome(params, scales())))
    assert got[0]["stem"]["conv"]["kernel"].names == axes


def test_kernels_start_as_those_of_the_branches():
    network = model(TINY, jnp.float32)
    params = quick_jit(network.init)(jax.random.key(1), jnp.zeros((1, 8, 8, 3)))["params"]
    got = reparam.rep_init(SEARCH, scales(), params, jax.random.key(2))
    assert got["head"] is params["head"]
    backward = reparam.rep_init(SEARCH, scales(), dict(reversed(params.items())), jax.random.key(2))
    chex.assert_trees_all_equal(backward, got)
    own = scales()["stage1_block0"]
    before, after = (np.asarray(p["stage1_block0"]["conv"]["kernel"]) for p in (params, got))
    three, one, zero = (np.asarray(own[s]["scale"]) for s in (*SCALES, "scale_identity"))
    rest = after - before * three
    np.testing.assert_allclose(np.delete(rest.reshape(9, 4, 4), 4, axis=0), 0, atol=1e-6)
    drawn = (rest[1, 1] - np.diag(zero)) / one
    assert 0.3 < np.abs(drawn).max() <= 0.5  # U(-1/2, 1/2) of 4 channels
    assert np.abs(drawn).min() > 0


@pytest.mark.core
class TestRefused:
    @pytest.mark.parametrize(
        "optimizer",
        [
            optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
            optax.masked(optax.chain(optax.adaptive_grad_clip(0.1)), decayed),
            optax.inject_hyperparams(
                lambda learning_rate: optax.chain(optax.clip(1.0), optax.sgd(learning_rate))
            )(learning_rate=0.1),
            optax.adam(1e-3),
        ],
        ids=["norm", "masked", "injected", "adam"],
    )
    def test_clipping(self, optimizer):
        with pytest.raises(ValueError, match="clip"):
            reparam.rep_optimizer(SEARCH, scales(), optimizer)

    def test_clipping_before_adam(self):
        chain = optax.chain(optax.clip(1.0), optax.scale_by_adam())
        with pytest.raises(ValueError, match="rep_optimizer with clip:"):
            reparam.rep_optimizer(SEARCH, scales(), chain, rule="adamw")

    def test_scales_of_a_deeper_network(self):
        deeper = {**scales(), "stage1_block1": scales()["stage1_block0"]}
        with pytest.raises(ValueError, match=r"3 blocks.*2; .*no block for \[stage1_block1\]"):
            reparam.rep_optimizer(SEARCH, deeper).init(plain()["params"])

    def test_scales_of_a_wider_network(self):
        wider = jax.tree.map(lambda leaf: np.tile(leaf, 2), scales())
        with pytest.raises(ValueError, match=r"has .*\(8,\).*expected .*\(4,\)"):
            reparam.rep_init(SEARCH, wider, plain()["params"], jax.random.key(0))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda own: {"scale": own["scale"] * np.nan}, "scale_3x3 must hold finite numbers"),
            (lambda own: {"scale": own["scale"].astype(str)}, "scale_3x3 must hold finite numbers"),
            (lambda own: own["scale"], "scales of another network"),
        ],
    )
    def test_scales_that_are_none(self, change, message):
        stem = {**scales()["stem"], "scale_3x3": change(scales()["stem"]["scale_3x3"])}
        broken = {**scales(), "stem": stem}
        with pytest.raises(ValueError, match=message):
            reparam.rep_optimizer(SEARCH, broken).init(plain()["params"])

    def test_a_scale_of_an_identity_that_cannot_be(self):
        wrong = {**scales(), "stem": scales()["stage1_block0"]}
        with pytest.raises(ValueError, match=r"stem has .*3 -> 4 channels"):
            reparam.rep_optimizer(SEARCH, wrong).init(plain()["params"])

    @pytest.mark.parametrize("optimizer", [5, optax.MultiSteps(optax.sgd(0.1), 2)])
    def test_what_is_no_transformation(self, optimizer):
        with pytest.raises(ValueError, match="GradientTransformation, got"):
            reparam.rep_optimizer(SEARCH, scales(), optimizer)

    def test_branches_with_norms(self):
        with pytest.raises(ValueError, match=r"RepVGG .*norms belong behind the sum"):
            reparam.rep_optimizer(reparam.REPVGG, scales())

    def test_no_scales(self):
        with pytest.raises(ValueError, match="no RepOpt search block"):
            reparam.extract_scales(SEARCH, plain()["params"])

    def test_an_unknown_rule(self):
        with pytest.raises(ValueError, match="'lion'"):
            reparam.rep_optimizer(SEARCH, scales(), rule="lion")
