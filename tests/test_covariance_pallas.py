"""The kernel for NVIDIA GPUs: what it computes, step by step on the CPU, and where it is used."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import repvgg_jax as rv
from repvgg_jax.covariance import pallas_gpu

EVERYWHERE, OVER_BATCH = PartitionSpec(), PartitionSpec("data")
KERNEL = re.compile(r"@__gpu\$xla.gpu.triton\(.*: \(tensor<(\d+)x8xbf16>")


def operands(rng, features, channels, dtype, images=3):
    shapes = [(images, 5, 9, size) for size in (channels, features, channels)]
    shapes += [(features, channels), (channels, channels), (channels,)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def worst(reference, other):
    reference, other = (np.asarray(a, np.float64) for a in (reference, other))
    return np.abs(reference - other).max() / np.abs(reference).max()


@pytest.mark.parametrize(
    ("dtype", "features", "channels", "tolerance"),
    [
        pytest.param("float64", 40, 24, 1e-12, marks=pytest.mark.core),
        ("float64", 16, 136, 1e-12),
        ("float32", 16, 136, 1e-5),
        ("bfloat16", 40, 24, 2**-8),
    ],
)
def test_sums_and_products_in_tiles_that_do_not_divide_them(
    dtype, features, channels, tolerance, rng
):
    """135 pixels are two tiles, 136 channels are, and 40 features are multiplied in two steps."""
    with jax.enable_x64(True):
        args = operands(rng, features, channels, dtype)
        base, dz, x, to_dz, to_x, level = (np.asarray(a, np.float64) for a in args)
        found = pallas_gpu.one_pass(*args, interpret=True)
        assert found.dtype == jnp.dtype(dtype)
        assert worst(base + dz @ to_dz + x @ to_x + level, found) <= tolerance


def test_differentiated_and_mapped(rng, monkeypatch):
    interpreted = functools.partial(pallas_gpu.one_pass, interpret=True)
    monkeypatch.setattr(pallas_gpu, "one_pass", interpreted)

    def loss(kernel, *args):
        return jnp.square(kernel(*args)).sum()

    with jax.enable_x64(True):
        args = operands(rng, 4, 8, "float64")
        functions = [pallas_gpu._by_xla, pallas_gpu._differentiable]
        gradients = [
            jax.grad(functools.partial(loss, each), tuple(range(6)))(*args) for each in functions
        ]
        assert max(map(worst, *gradients)) <= 1e-12
        axes = (0, 0, 0, None, None, None)
        several = [
            jnp.stack([a, 2 * a]) if axis == 0 else a for a, axis in zip(args, axes, strict=True)
        ]
        assert worst(*(jax.vmap(each, axes)(*several) for each in functions)) <= 1e-12


def rows_of_kernels(step, *arguments, platform="cuda"):
    """How many pixels the kernels of a program for a platform are given."""
    text = jax.jit(step).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    return [int(rows) for rows in KERNEL.findall(text)]


def gradient_of(dtype="bfloat16"):
    block = rv.RepVGGBlock(
        8, train_form="covariance_pallas", dtype=jnp.dtype(dtype), identity=False
    )

    def gradient(variables, x):
        def loss(x):
            y, _ = block.apply(variables, x, train=True, mutable=["batch_stats"])
            return jnp.square(y.astype(jnp.float32)).mean()

        return jax.grad(loss)(x)

    shape = jax.ShapeDtypeStruct((1, 6, 6, 8), jnp.dtype(dtype))
    variables = jax.eval_shape(block.init, jax.random.key(0), shape)
    return gradient, jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), variables)


def images_of(count, dtype="bfloat16"):
    return jnp.ones((count, 6, 6, 8), dtype)


def test_where_the_kernel_is_used():
    gradient, variables = gradient_of()
    assert rows_of_kernels(gradient, variables, images_of(2)) == [2 * 36]
    assert rows_of_kernels(gradient, variables, images_of(2), platform="cpu") == []
    mapped = jax.vmap(gradient, (None, 0))
    assert rows_of_kernels(mapped, variables, images_of(2)[None]) == []
    wide, variables = gradient_of("float32")
    assert rows_of_kernels(wide, variables, images_of(2, "float32")) == []


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_every_device_computes_its_own_images(kind):
    gradient, variables = gradient_of()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    variables = jax.device_put(variables, NamedSharding(mesh, EVERYWHERE))
    images = jax.device_put(images_of(16), NamedSharding(mesh, OVER_BATCH))
    assert rows_of_kernels(gradient, variables, images) == [2 * 36]
    per_device = jax.shard_map(
        gradient, mesh=mesh, in_specs=(EVERYWHERE, OVER_BATCH), out_specs=OVER_BATCH
    )
    assert rows_of_kernels(per_device, variables, images) == [2 * 36]


def test_images_that_cannot_be_split_are_left_to_the_compiler():
    gradient, variables = gradient_of()
    for shape, names, count in (((8,), ("data",), 12), ((4, 2), ("data", "model"), 16)):
        mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))
        placed = jax.device_put((variables, images_of(count)), NamedSharding(mesh, EVERYWHERE))
        assert rows_of_kernels(gradient, *placed) == []
