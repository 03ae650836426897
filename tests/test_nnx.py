"""The NNX bridge: the same network, trained a step as NNX users do it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import repvgg_jax as rv
from tests.helpers.jit import quick_jit
from tests.helpers.weights_samples import CLASSES, random_weights

TINY = rv.Variant("tiny", (2,), (8,), stem_channels=4)


@pytest.fixture
def batch(rng):
    return rng.normal(size=(4, 16, 16, 3)).astype(np.float32), rng.integers(0, CLASSES, 4)


@pytest.fixture
def float64():
    """Two programs for the same step differ by rounding; in float64 by nearly nothing."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def variables():
    return random_weights(TINY)


def loss_of(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def test_evaluation_is_linens(variables, batch):
    model = rv.create_model(TINY, num_classes=CLASSES)
    module = rv.to_nnx(model, variables)
    np.testing.assert_array_equal(module(batch[0]), model.apply(variables, batch[0]))
    deployed = rv.fuse_params(variables)
    fused = rv.to_nnx(model.clone(deploy=True), deployed)
    np.testing.assert_array_equal(
        fused(batch[0]), model.clone(deploy=True).apply(deployed, batch[0])
    )


def test_variables_are_found_by_kind_and_name(variables):
    module = rv.to_nnx(rv.create_model(TINY, num_classes=CLASSES), variables)
    assert isinstance(module.stem["conv3x3"]["kernel"], nnx.Param)
    count = len(jax.tree.leaves(variables["params"]))
    assert len(jax.tree.leaves(nnx.state(module, nnx.Param))) == count
    stats = len(jax.tree.leaves(variables["batch_stats"]))
    assert len(jax.tree.leaves(nnx.state(module, nnx.BatchStat))) == stats


@pytest.mark.usefixtures("float64")
def test_a_training_step_is_linens(variables, batch):
    images, labels = batch[0].astype(np.float64), batch[1]
    variables = jax.tree.map(np.float64, variables)
    model = rv.create_model(TINY, num_classes=CLASSES, dtype=jnp.float64, param_dtype=jnp.float64)
    module = rv.to_nnx(model, variables)
    optimizer = nnx.Optimizer(module, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer, images, labels):
        loss, gradients = nnx.value_and_grad(lambda m: loss_of(m(images, train=True), labels))(
            module
        )
        optimizer.update(module, gradients)
        return loss

    @quick_jit
    def linen_step(params, stats):
        def loss(params):
            logits, new = model.apply(
                {"params": params, "batch_stats": stats},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            return loss_of(logits, labels), new["batch_stats"]

        (value, stats_after), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), stats_after

    value, params, stats = linen_step(variables["params"], variables["batch_stats"])
    np.testing.assert_allclose(step(module, optimizer, images, labels), value, rtol=1e-10)
    for block in ("stem", "stage1_block1"):
        kernel = getattr(module, block)["conv3x3"]["kernel"]
        np.testing.assert_allclose(
            kernel[...], params[block]["conv3x3"]["kernel"], rtol=1e-10, atol=1e-10
        )
        mean = getattr(module, block)["bn3x3"]["mean"]
        assert isinstance(mean, nnx.BatchStat)
        np.testing.assert_allclose(mean[...], stats[block]["bn3x3"]["mean"], rtol=1e-10, atol=1e-10)
    assert not np.array_equal(
        module.stem["bn3x3"]["mean"][...],
        jnp.asarray(variables["batch_stats"]["stem"]["bn3x3"]["mean"]),
    )


def test_parameters_alone_are_not_enough(variables):
    with pytest.raises(ValueError, match="to_nnx needs a model's variables"):
        rv.to_nnx(rv.create_model(TINY), variables["params"])


class Around(nnx.Module):
    """A user's module that contains a network."""

    def __init__(self, network):
        self.network = network

    def __call__(self, images):
        return self.network(images)


AUXILIARY = rv.Variant("heads", (1,), (8,), stem_channels=4, auxiliary=("stage1_block0",))


def test_train_and_eval_are_respected_from_outside_too(variables, batch):
    images = batch[0]
    model = rv.create_model(TINY, num_classes=CLASSES)
    module = rv.to_nnx(model, variables)
    whole = Around(module)
    before = module.stem["bn3x3"]["mean"][...]
    whole.train()
    expected, new = model.apply(variables, images, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(whole(images), expected, rtol=1e-4, atol=1e-4)
    mean = module.stem["bn3x3"]["mean"][...]
    np.testing.assert_allclose(mean, new["batch_stats"]["stem"]["bn3x3"]["mean"], rtol=1e-4)
    whole.eval()
    module(images)
    np.testing.assert_array_equal(module.stem["bn3x3"]["mean"][...], mean)
    module(images, train=True)
    assert not np.array_equal(module.stem["bn3x3"]["mean"][...], mean)
    assert not np.array_equal(mean, before)


def test_auxiliary_heads_keep_their_parameters(batch):
    images = batch[0]
    model = rv.create_model(AUXILIARY, num_classes=CLASSES)
    variables = random_weights(AUXILIARY)
    module = rv.to_nnx(model, variables)
    expected, new = model.apply(variables, images, train=True, mutable=["batch_stats", "auxiliary"])
    logits, heads = module(images, train=True, auxiliary=True)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    head = "aux_stage1_block0"
    assert heads.keys() == {head}
    np.testing.assert_allclose(heads[head], new["auxiliary"][head], rtol=1e-4, atol=1e-4)
    assert isinstance(getattr(module, head)["conv"]["kernel"], nnx.Param)
    norm = getattr(module, head)["bn"]["mean"]
    np.testing.assert_allclose(norm[...], new["batch_stats"][head]["bn"]["mean"], rtol=1e-4)
    assert module(images, auxiliary=True)[1] == {}


def test_a_split_module_fuses_and_unfuses(batch):
    images = batch[0]
    model = rv.create_model(AUXILIARY, num_classes=CLASSES)
    module = rv.to_nnx(model, random_weights(AUXILIARY))
    expected = module(images)
    graph, state = nnx.split(module)
    _, fused = rv.fuse_params((graph, state), expect=2)
    deployed = rv.to_nnx(model.clone(deploy=True), fused)
    np.testing.assert_allclose(deployed(images), expected, rtol=1e-3, atol=1e-3)
    _, params, stats = nnx.split(module, nnx.Param, nnx.BatchStat)
    apart = rv.fuse_params({"params": params, "batch_stats": stats}, expect=2)
    kernels = [tree["stem"]["reparam"]["kernel"][...] for tree in (apart["params"], fused)]
    np.testing.assert_array_equal(*kernels)
    again = rv.to_nnx(model, rv.unfuse_params(fused, like=state))
    np.testing.assert_allclose(again(images), expected, rtol=1e-3, atol=1e-3)
