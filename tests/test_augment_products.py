"""What TPUs compute in place of reading single pixels is what the others read."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax.data.augment import geometry, products, tables
from repvgg_jax.data.augment.geometry import GEOMETRY_KINDS, RESAMPLINGS
from repvgg_jax.data.augment.kinds import Choice, Kind
from repvgg_jax.data.augment.operation import operate
from repvgg_jax.data.augment.policies import Raug15

KINDS = [*sorted(GEOMETRY_KINDS), Kind.IDENTITY]


def some_choice(count: int) -> Choice:
    """Every kind in turn, by amounts beyond those of the policies."""
    rng = np.random.default_rng(count)
    kind = np.resize(KINDS, count)
    amount = rng.uniform(-1, 1, count) * np.where(kind == Kind.ROTATE, 59, 0.5)
    return Choice(
        jnp.asarray(kind, jnp.int32),
        jnp.asarray(amount, jnp.float32),
        jnp.asarray(rng.integers(0, 2, count) > 0),
        jnp.asarray(rng.uniform(size=count), jnp.float32),
        jnp.asarray(rng.uniform(size=count), jnp.float32),
    )


def some_images(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))


def as_on_a_tpu(monkeypatch):
    """Takes the TPU's way here."""

    def take_it(*operands, tpu, default):
        return tpu(*operands)

    monkeypatch.setattr(jax.lax, "platform_dependent", take_it)


@pytest.mark.parametrize("size", [(37, 52), (52, 37), (1, 5)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("resampling", RESAMPLINGS)
def test_warp(monkeypatch, size, channels, resampling):
    images = some_images(36, *size, channels)
    choice = some_choice(len(images))

    def warp(images, choice):
        return geometry.warp(images, choice, (7,) * channels, resampling)

    read = np.asarray(jax.jit(warp)(images, choice), int)
    as_on_a_tpu(monkeypatch)
    # Another jit: the first would answer from its cache.
    computed = np.asarray(jax.jit(lambda *given: warp(*given))(images, choice), int)
    # Bit for bit, but that a compiler may round a coordinate otherwise in another program:
    # one grey level then, or a pixel at the very edge.
    assert (read != computed).mean() < 1e-3
    np.testing.assert_array_equal(read[5::6], images[5::6])
    np.testing.assert_array_equal(computed[5::6], images[5::6])


def test_look_up():
    images, entries = some_images(5, 9, 14, 3), some_images(5, 3, 256)
    read = tables.look_up(images, entries)
    np.testing.assert_array_equal(products.look_up(images, entries), read)
    np.testing.assert_array_equal(read[2, 3, 4, 1], entries[2, 1, images[2, 3, 4, 1]])


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_a_tpu_reads_no_single_pixels(platform):
    images = jax.ShapeDtypeStruct((2, 24, 24, 3), jnp.uint8)
    policy = Raug15()

    def one_operation(images, choice):
        return operate(images, choice, possible=policy.possible, resampling=policy.resampling)

    traced = jax.jit(one_operation).trace(images, some_choice(2))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    found = re.findall(r"stablehlo\.gather.* -> tensor<([\dx]+)x\w+>", text)
    large = [s for s in found if math.prod(map(int, s.split("x"))) >= 24 * 24]
    assert bool(large) == (platform != "tpu"), found
