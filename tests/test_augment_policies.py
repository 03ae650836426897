"""Policies: their parameters as published, and that samples follow them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax.data.augment.base import Op, image_keys
from repvgg_jax.data.augment.policies import (
    AUTOAUGMENT_RULES,
    IMAGENET_SUB_POLICIES,
    INCREASING_RULES,
    RANDAUGMENT_RULES,
    RAUG15_RULES,
    AutoAugment,
    ColorJitter,
    RandAugment,
    Raug15,
    argument_table,
)
from tests.helpers.jit import quick_jit

SAMPLES = 20_000

# Table 9 of arXiv:1805.09501, as printed: operation, probability, magnitude, twice.
TABLE_9 = """
Posterize 0.4 8 Rotate 0.6 9
Solarize 0.6 5 AutoContrast 0.6 5
Equalize 0.8 8 Equalize 0.6 3
Posterize 0.6 7 Posterize 0.6 6
Equalize 0.4 7 Solarize 0.2 4
Equalize 0.4 4 Rotate 0.8 8
Solarize 0.6 3 Equalize 0.6 7
Posterize 0.8 5 Equalize 1.0 2
Rotate 0.2 3 Solarize 0.6 8
Equalize 0.6 8 Posterize 0.4 6
Rotate 0.8 8 Color 0.4 0
Rotate 0.4 9 Equalize 0.6 2
Equalize 0.0 7 Equalize 0.8 8
Invert 0.6 4 Equalize 1.0 8
Color 0.6 4 Contrast 1.0 8
Rotate 0.8 8 Color 1.0 2
Color 0.8 8 Solarize 0.8 7
Sharpness 0.4 7 Invert 0.6 8
ShearX 0.6 5 Equalize 1.0 9
Color 0.4 0 Equalize 0.6 3
Equalize 0.4 7 Solarize 0.2 4
Solarize 0.6 5 AutoContrast 0.6 5
Invert 0.6 4 Equalize 1.0 8
Color 0.6 4 Contrast 1.0 8
Equalize 0.8 8 Equalize 0.6 3
"""


def samples(policy, seed=0):
    """The operations of many images as NumPy arrays (images, operations)."""
    sample = quick_jit(lambda key: jax.vmap(policy.sample)(image_keys(key, SAMPLES)))
    return jax.tree.map(np.asarray, sample(jax.random.key(seed)))


@functools.cache
def randaugment_program(increasing):
    """Three operations per image, compiled once for all numbers."""

    def sample(key, magnitude, deviation, probability):
        policy = RandAugment(3, magnitude, deviation, increasing, probability)
        return jax.vmap(policy.sample)(image_keys(key, SAMPLES))

    return quick_jit(sample)


def randaugment_samples(magnitude, deviation, probability, *, increasing=True):
    program = randaugment_program(increasing)
    return jax.tree.map(np.asarray, program(jax.random.key(0), magnitude, deviation, probability))


def assert_fraction(found, expected, count):
    """Within five standard deviations of a binomial fraction."""
    bound = 5 * np.sqrt(expected * (1 - expected) / count)
    assert abs(found - expected) <= bound, (found, expected, bound)


def signed(values):
    return [sign * value for sign in (-1, 1) for value in values]


def test_the_25_sub_policies_are_the_papers():
    def name(op):
        return "".join(part.capitalize() for part in op.name.split("_"))

    printed = [
        " ".join(f"{name(op)} {chance} {level}" for op, chance, level in pair)
        for pair in IMAGENET_SUB_POLICIES
    ]
    assert printed == TABLE_9.split("\n")[1:-1]


@pytest.mark.parametrize("level", range(15))
def test_levels_mean_what_the_sources_say(level):
    """The sources' formulas in Python's double precision, for both signs."""
    tenth = level / 10.0
    expected = {
        Op.AUTO_CONTRAST: 0,
        Op.EQUALIZE: 0,
        Op.INVERT: 0,
        Op.ROTATE: tenth * 30.0,
        Op.SOLARIZE: int(tenth * 256),
        Op.SOLARIZE_ADD: int(tenth * 110),
        Op.POSTERIZE: int(tenth * 4),
        Op.COLOR: tenth * 1.8 + 0.1,
        Op.CONTRAST: tenth * 1.8 + 0.1,
        Op.BRIGHTNESS: tenth * 1.8 + 0.1,
        Op.SHARPNESS: tenth * 1.8 + 0.1,
        Op.SHEAR_X: tenth * 0.3,
        Op.SHEAR_Y: tenth * 0.3,
        Op.TRANSLATE_X: tenth * 0.45,
        Op.TRANSLATE_Y: tenth * 0.45,
    }
    ways = (Op.ROTATE, Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y)
    enhancements = (Op.COLOR, Op.CONTRAST, Op.BRIGHTNESS, Op.SHARPNESS)

    def check(rules, values):
        assert set(rules) == set(values)
        table = np.asarray(argument_table(rules, jnp.array([level])))[:, 0]
        for op, (minus, plus) in zip(rules, table, strict=True):
            both = values[op] if isinstance(values[op], tuple) else (values[op],) * 2
            both = (-both[0], both[1]) if op in ways else both
            assert (minus, plus) == pytest.approx(both, rel=1e-6, abs=1e-7), op

    check(RANDAUGMENT_RULES, expected)
    check(RAUG15_RULES, expected | {Op.CUTOUT: max(2, tenth * 40.0)})
    check(AUTOAUGMENT_RULES, expected | {Op.POSTERIZE: int(tenth * 4) + 4})
    increasing = {op: (max(0.1, 1 - tenth * 0.9), 1 + tenth * 0.9) for op in enhancements}
    check(
        INCREASING_RULES,
        expected
        | increasing
        | {Op.POSTERIZE: 4 - int(tenth * 4), Op.SOLARIZE: 256 - int(tenth * 256)},
    )


def test_raug15_samples_two_of_sixteen_at_fifteen_levels():
    sampled = samples(Raug15())
    assert sampled.op.shape == (SAMPLES, 2)
    assert set(np.unique(sampled.op)) == set(RAUG15_RULES)
    assert len(RAUG15_RULES) == 16
    for op in RAUG15_RULES:
        for turn in range(2):
            assert_fraction((sampled.op[:, turn] == op).mean(), 1 / 16, SAMPLES)
    first_rotates = sampled.op[:, 0] == Op.ROTATE
    assert_fraction((first_rotates & (sampled.op[:, 1] == Op.ROTATE)).mean(), 1 / 256, SAMPLES)
    assert_fraction(sampled.cubic.mean(), 1 / 2, 2 * SAMPLES)

    degrees = sampled.argument[sampled.op == Op.ROTATE]
    allowed = sorted({round(v, 3) for v in signed(3.0 * np.arange(15))})
    assert sorted({round(float(v), 3) + 0.0 for v in degrees}) == pytest.approx(allowed)
    assert_fraction((degrees > 0).mean(), 14 / 30, len(degrees))
    assert_fraction((np.abs(degrees) > 41).mean(), 1 / 15, len(degrees))
    sides = sampled.argument[sampled.op == Op.CUTOUT]
    assert set(sides) == {2, *range(4, 57, 4)}
    bits = sampled.argument[sampled.op == Op.POSTERIZE]
    assert_fraction((bits == 0).mean(), 3 / 15, len(bits))
    assert bits.max() == 5
    for place in (sampled.row, sampled.column):
        assert 0 <= place.min() < 0.001 < 0.999 < place.max() < 1


def test_randaugment_follows_its_settings():
    sampled = randaugment_samples(5.0, 1.0, 0.7)
    assert sampled.op.shape == (SAMPLES, 3)
    applied = sampled.op != Op.IDENTITY
    assert_fraction(applied.mean(), 0.7, 3 * SAMPLES)
    for op in RANDAUGMENT_RULES:
        assert_fraction((sampled.op == op).mean(), 0.7 / 15, 3 * SAMPLES)
    turned = sampled.argument[sampled.op == Op.ROTATE] / 3  # levels
    assert_fraction((turned > 0).mean(), 1 / 2, len(turned))
    amount = np.abs(turned)
    assert abs(amount.mean() - 5) < 5 / np.sqrt(len(amount))
    assert abs(amount.std() - 1) < 5 / np.sqrt(2 * len(amount))
    assert amount.max() <= 10


def test_randaugments_levels_stay_within_the_scale():
    sampled = randaugment_samples(9.0, 5.0, 1.0)
    amount = np.abs(sampled.argument[sampled.op == Op.SHEAR_X]) / 0.03
    assert amount.max() == pytest.approx(10)
    assert (amount > 9.999).mean() > 0.3  # a normal of 5 is above 1 with 42 %
    assert amount.min() >= 0


def test_randaugment_increasing_or_not():
    rising = randaugment_samples(9.0, 0.0, 1.0)
    falling = randaugment_samples(9.0, 0.0, 1.0, increasing=False)

    def arguments(sampled, op):
        return sorted({round(float(v), 4) for v in sampled.argument[sampled.op == op]})

    assert arguments(rising, Op.POSTERIZE) == [1]
    assert arguments(falling, Op.POSTERIZE) == [3]
    assert arguments(rising, Op.SOLARIZE) == [26]
    assert arguments(falling, Op.SOLARIZE) == [230]
    assert arguments(rising, Op.COLOR) == [0.19, 1.81]
    assert arguments(falling, Op.COLOR) == [1.72]


def test_autoaugment_applies_every_operation_as_often_as_the_table_says():
    sampled = samples(AutoAugment())
    for op in AutoAugment().possible:
        for turn in range(2):
            expected = sum(p[turn][1] for p in IMAGENET_SUB_POLICIES if p[turn][0] == op) / 25
            assert_fraction((sampled.op[:, turn] == op).mean(), expected, SAMPLES)
    # "Posterize 0.4 8" comes before "Rotate 0.6 9" and nowhere else.
    both = (sampled.op[:, 0] == Op.POSTERIZE) & (sampled.op[:, 1] == Op.ROTATE)
    assert_fraction(both.mean(), 0.4 * 0.6 / 25, SAMPLES)
    assert set(sampled.argument[both, 0]) == {7}
    np.testing.assert_allclose(np.abs(sampled.argument[both, 1]), 27, rtol=1e-6)


def test_jitter_samples_evenly_and_in_every_order():
    jitter = ColorJitter(brightness=0.4, contrast=0.4, saturation=1.5, hue=0.1)
    sampled = samples(jitter)
    for op, (least, most) in {
        Op.BRIGHTNESS: (0.6, 1.4),
        Op.CONTRAST: (0.6, 1.4),
        Op.COLOR: (0, 2.5),
        Op.HUE: (-0.1, 0.1),
    }.items():
        values = sampled.argument[sampled.op == op]
        assert len(values) == SAMPLES
        span = most - least
        assert least <= values.min() < least + 0.01 * span
        assert most - 0.01 * span < values.max() <= most
        assert abs(values.mean() - (least + most) / 2) < 5 * span / np.sqrt(12 * SAMPLES)
    orders, counts = np.unique(sampled.op, axis=0, return_counts=True)
    assert len(orders) == 24
    for count in counts:
        assert_fraction(count / SAMPLES, 1 / 24, SAMPLES)
    assert ColorJitter(contrast=0.3).possible == {Op.CONTRAST}
