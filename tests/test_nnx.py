"""The NNX bridge: the same network, trained a step as NNX users do it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import repvgg_jax as rv
from tests.helpers.jit import quick_jit
from tests.helpers.weights_samples import CLASSES, random_variables

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
    return random_variables(TINY)


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
