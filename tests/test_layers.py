import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax.layers import BatchNorm
from tests.helpers.jit import quick_jit
from tests.helpers.trees import random_images

pytestmark = pytest.mark.core


def expected(x: np.ndarray, group_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Normalized maps and new running statistics, group by group in float64."""
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
    y, updated = quick_jit(lambda v, x: norm.apply(v, x, True, mutable=["batch_stats"]))(
        variables, x
    )
    want, mean, var = expected(x, group_size or 8)
    np.testing.assert_allclose(y, want, atol=1e-5)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(updated["batch_stats"]["var"], var, rtol=1e-5)


def test_group_statistics_do_not_depend_on_the_number_of_devices():
    x = random_images((16, 4, 4, 3), dtype=np.float64)
    norm = BatchNorm(group_size=4, param_dtype=jnp.float64)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))

    with jax.enable_x64(True):
        variables = norm.init(jax.random.key(0), x)

        @jax.jit
        def apply(x):
            return norm.apply(variables, x, True, mutable=["batch_stats"])

        one, eight = apply(x), apply(jax.device_put(x, sharding))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), one, eight)


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


def test_bfloat16_inputs_are_normalized_in_float32():
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


def plainly(x: jax.Array, scale: jax.Array, bias: jax.Array, groups: int) -> jax.Array:
    """Training's arithmetic for automatic differentiation, on five axes."""
    parts = x.reshape(groups, -1, *x.shape[1:])
    mean = parts.mean(axis=(1, 2, 3), keepdims=True)
    var = parts.var(axis=(1, 2, 3), keepdims=True)
    normalized = (parts - mean) * jax.lax.rsqrt(var + 1e-5)
    return (normalized * scale.reshape(1, 1, 1, 1, -1) + bias.reshape(1, 1, 1, 1, -1)).reshape(
        x.shape
    )


@pytest.mark.parametrize("groups", [1, 4])
def test_derivatives_are_those_of_the_definition_in_both_modes(groups):
    with jax.enable_x64(True):
        x, dx = (np.float64(3 + 2 * random_images((8, 2, 3, 5), seed)) for seed in (0, 1))
        params = {"scale": np.linspace(0.5, 2, 5), "bias": np.linspace(-1, 1, 5)}
        norm = BatchNorm(group_size=8 // groups, param_dtype=jnp.float64)
        stats = norm.init(jax.random.key(0), x)["batch_stats"]

        def ours(x, params):
            variables = {"params": params, "batch_stats": stats}
            return norm.apply(variables, x, True, mutable=["batch_stats"])[0]

        def theirs(x, params):
            return plainly(x, params["scale"], params["bias"], groups)

        tangents = (dx, {"scale": params["bias"], "bias": params["scale"]})

        def derivatives(f):
            return jax.jvp(f, (x, params), tangents), jax.vjp(f, x, params)[1](dx)

        a, b = (quick_jit(lambda f=f: derivatives(f))() for f in (ours, theirs))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), a, b)


@pytest.mark.parametrize("group_size", [None, 4])
def test_means_of_a_thousand_deviations(group_size):
    x = (1000 + random_images((8, 32, 32, 4))) * np.float32([1, -1, 1e-2, 30])
    norm = BatchNorm(group_size=group_size, momentum=0.0)
    variables = norm.init(jax.random.key(0), x)
    y, updated = jax.jit(lambda x: norm.apply(variables, x, True, mutable=["batch_stats"]))(x)
    groups = np.float64(x).reshape(-1, group_size or 8, 32, 32, 4)
    var = groups.var((1, 2, 3)).mean(0) * groups[0, ..., 0].size / (groups[0, ..., 0].size - 1)
    np.testing.assert_allclose(updated["batch_stats"]["var"], var, rtol=1e-3)
    want, *_ = expected(x, group_size or 8)
    np.testing.assert_allclose(y, want, atol=3e-3)
