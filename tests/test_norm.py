import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax.norm import BatchNorm
from tests.trees import random_images


def expected(x: np.ndarray, group_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Normalised maps and new running statistics, group by group in float64."""
    y, means, variances = np.empty_like(x, dtype=np.float64), [], []
    for start in range(0, len(x), group_size):
        group = x[start : start + group_size].astype(np.float64)
        mean, var = group.mean((0, 1, 2)), group.var((0, 1, 2))
        y[start : start + group_size] = (group - mean) / np.sqrt(var + 1e-5)
        means.append(mean)
        variances.append(group.var((0, 1, 2), ddof=1))
    return y, 0.1 * np.mean(means, 0), 0.9 + 0.1 * np.mean(variances, 0)


@pytest.mark.parametrize("group_size", [None, 8, 4, 2])
def test_training_statistics_of_groups_with_unbiased_running_variance(group_size):
    x = 3 + 2 * random_images((8, 3, 5, 6))
    norm = BatchNorm(group_size=group_size)
    variables = norm.init(jax.random.key(0), x)
    y, updated = norm.apply(variables, x, True, mutable=["batch_stats"])
    want, mean, var = expected(x, group_size or 8)
    np.testing.assert_allclose(y, want, atol=1e-5)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(updated["batch_stats"]["var"], var, rtol=1e-5)


def test_group_statistics_do_not_depend_on_the_number_of_devices():
    x = random_images((16, 4, 4, 3))
    norm = BatchNorm(group_size=4)
    variables = norm.init(jax.random.key(0), x)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))

    @jax.jit
    def apply(x):
        return norm.apply(variables, x, True, mutable=["batch_stats"])

    one, eight = apply(x), apply(jax.device_put(x, sharding))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, eight)


def test_evaluation_uses_running_statistics_and_leaves_them_alone():
    x = random_images((2, 3, 3, 4))
    norm = BatchNorm()
    stats = {"mean": np.full(4, 2.0, np.float32), "var": np.full(4, 4.0, np.float32)}
    params = {"scale": np.full(4, 3.0, np.float32), "bias": np.full(4, -1.0, np.float32)}
    variables = {"params": params, "batch_stats": stats}
    y, updated = norm.apply(variables, x, False, mutable=["batch_stats"])
    np.testing.assert_allclose(y, (x - 2) / np.sqrt(4 + 1e-5) * 3 - 1, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(updated["batch_stats"]["mean"], stats["mean"])
    np.testing.assert_array_equal(updated["batch_stats"]["var"], stats["var"])


def test_bfloat16_inputs_are_normalised_in_float32():
    x = jnp.asarray(100 + random_images((8, 8, 8, 2)), jnp.bfloat16)
    norm = BatchNorm()
    variables = norm.init(jax.random.key(0), x)
    y, updated = norm.apply(variables, x, True, mutable=["batch_stats"])
    assert y.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(updated)} == {jnp.dtype("float32")}
    want, *_ = expected(np.asarray(x, np.float32), 8)
    np.testing.assert_allclose(y, want, atol=1e-4)


def test_a_group_that_does_not_divide_the_batch():
    norm = BatchNorm(group_size=3)
    with pytest.raises(ValueError, match="groups of 3 images do not divide a batch of 8"):
        norm.init_with_output(jax.random.key(0), np.zeros((8, 2, 2, 1), np.float32), True)


def test_one_value_per_channel():
    with pytest.raises(ValueError, match=r"more than one value per channel.*\(1, 1, 1, 3\)"):
        BatchNorm().init_with_output(jax.random.key(0), np.zeros((1, 1, 1, 3), np.float32), True)
