"""Named policies: their parameters as printed, and that draws follow them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax.data.augment import levels
from repvgg_jax.data.augment.autoaugment import IMAGENET
from repvgg_jax.data.augment.jitter import Jitter
from repvgg_jax.data.augment.keys import image_keys
from repvgg_jax.data.augment.kinds import Kind
from repvgg_jax.data.augment.policies import AutoAugment, RandAugment, Raug15

DRAWS = 20_000

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


def drawn(policy, seed=0):
    """Choices of many images as NumPy arrays (images, operations)."""
    draw = jax.jit(lambda key: jax.vmap(policy.draw)(image_keys(key, DRAWS)))
    return jax.tree.map(np.asarray, draw(jax.random.key(seed)))


def assert_share(found, expected, count):
    """Within five standard deviations of a binomial share."""
    bound = 5 * np.sqrt(expected * (1 - expected) / count)
    assert abs(found - expected) <= bound, (found, expected, bound)


def signed(values):
    return [sign * value for sign in (-1, 1) for value in values]


def test_the_25_sub_policies_are_the_papers():
    def name(kind):
        return "".join(part.capitalize() for part in kind.name.split("_"))

    printed = [
        " ".join(f"{name(kind)} {chance} {level}" for kind, chance, level in pair)
        for pair in IMAGENET
    ]
    assert printed == TABLE_9.split("\n")[1:-1]


@pytest.mark.parametrize("level", range(15))
def test_levels_mean_what_the_sources_say(level):
    """The sources' formulas in Python's double precision, for both signs."""
    tenth = level / 10.0
    expected = {
        Kind.AUTO_CONTRAST: 0,
        Kind.EQUALIZE: 0,
        Kind.INVERT: 0,
        Kind.ROTATE: tenth * 30.0,
        Kind.SOLARIZE: int(tenth * 256),
        Kind.SOLARIZE_ADD: int(tenth * 110),
        Kind.POSTERIZE: int(tenth * 4),
        Kind.COLOR: tenth * 1.8 + 0.1,
        Kind.CONTRAST: tenth * 1.8 + 0.1,
        Kind.BRIGHTNESS: tenth * 1.8 + 0.1,
        Kind.SHARPNESS: tenth * 1.8 + 0.1,
        Kind.SHEAR_X: tenth * 0.3,
        Kind.SHEAR_Y: tenth * 0.3,
        Kind.TRANSLATE_X: tenth * 0.45,
        Kind.TRANSLATE_Y: tenth * 0.45,
    }
    ways = (Kind.ROTATE, Kind.SHEAR_X, Kind.SHEAR_Y, Kind.TRANSLATE_X, Kind.TRANSLATE_Y)
    enhancements = (Kind.COLOR, Kind.CONTRAST, Kind.BRIGHTNESS, Kind.SHARPNESS)

    def check(rules, values):
        assert set(rules) == set(values)
        table = np.asarray(levels.arguments_of(rules, jnp.array([level])))[:, 0]
        for kind, (minus, plus) in zip(rules, table, strict=True):
            both = values[kind] if isinstance(values[kind], tuple) else (values[kind],) * 2
            both = (-both[0], both[1]) if kind in ways else both
            assert (minus, plus) == pytest.approx(both, rel=1e-6, abs=1e-7), kind

    check(levels.RANDAUGMENT, expected)
    check(levels.RAUG15, expected | {Kind.CUTOUT: max(2, tenth * 40.0)})
    check(levels.AUTOAUGMENT, expected | {Kind.POSTERIZE: int(tenth * 4) + 4})
    increasing = {kind: (max(0.1, 1 - tenth * 0.9), 1 + tenth * 0.9) for kind in enhancements}
    check(
        levels.RANDAUGMENT_INCREASING,
        expected
        | increasing
        | {Kind.POSTERIZE: 4 - int(tenth * 4), Kind.SOLARIZE: 256 - int(tenth * 256)},
    )


def test_raug15_draws_two_of_sixteen_at_fifteen_levels():
    choice = drawn(Raug15())
    assert choice.kind.shape == (DRAWS, 2)
    assert set(np.unique(choice.kind)) == set(levels.RAUG15)
    assert len(levels.RAUG15) == 16
    for kind in levels.RAUG15:
        for turn in range(2):
            assert_share((choice.kind[:, turn] == kind).mean(), 1 / 16, DRAWS)
    first_rotates = choice.kind[:, 0] == Kind.ROTATE
    assert_share((first_rotates & (choice.kind[:, 1] == Kind.ROTATE)).mean(), 1 / 256, DRAWS)
    assert_share(choice.cubic.mean(), 1 / 2, 2 * DRAWS)

    degrees = choice.argument[choice.kind == Kind.ROTATE]
    allowed = sorted({round(v, 3) for v in signed(3.0 * np.arange(15))})
    assert sorted({round(float(v), 3) + 0.0 for v in degrees}) == pytest.approx(allowed)
    assert_share((degrees > 0).mean(), 14 / 30, len(degrees))
    assert_share((np.abs(degrees) > 41).mean(), 1 / 15, len(degrees))
    sides = choice.argument[choice.kind == Kind.CUTOUT]
    assert set(sides) == {2, *range(4, 57, 4)}
    bits = choice.argument[choice.kind == Kind.POSTERIZE]
    assert_share((bits == 0).mean(), 3 / 15, len(bits))
    assert bits.max() == 5
    for place in (choice.row, choice.column):
        assert 0 <= place.min() < 0.001 < 0.999 < place.max() < 1


def test_randaugment_follows_its_settings():
    choice = drawn(RandAugment(ops=3, magnitude=5.0, deviation=1.0, probability=0.7))
    assert choice.kind.shape == (DRAWS, 3)
    applied = choice.kind != Kind.IDENTITY
    assert_share(applied.mean(), 0.7, 3 * DRAWS)
    for kind in levels.RANDAUGMENT:
        assert_share((choice.kind == kind).mean(), 0.7 / 15, 3 * DRAWS)
    turned = choice.argument[choice.kind == Kind.ROTATE] / 3  # levels
    assert_share((turned > 0).mean(), 1 / 2, len(turned))
    amount = np.abs(turned)
    assert abs(amount.mean() - 5) < 5 / np.sqrt(len(amount))
    assert abs(amount.std() - 1) < 5 / np.sqrt(2 * len(amount))
    assert amount.max() <= 10


def test_randaugments_levels_stay_within_the_scale():
    choice = drawn(RandAugment(magnitude=9.0, deviation=5.0, probability=1.0))
    amount = np.abs(choice.argument[choice.kind == Kind.SHEAR_X]) / 0.03
    assert amount.max() == pytest.approx(10)
    assert (amount > 9.999).mean() > 0.3  # a normal of 5 is above 1 with 42 %
    assert amount.min() >= 0


def test_randaugment_increasing_or_not():
    rising = drawn(RandAugment(magnitude=9.0, deviation=0.0, probability=1.0))
    falling = drawn(RandAugment(magnitude=9.0, deviation=0.0, probability=1.0, increasing=False))

    def arguments(choice, kind):
        return sorted({round(float(v), 4) for v in choice.argument[choice.kind == kind]})

    assert arguments(rising, Kind.POSTERIZE) == [1]
    assert arguments(falling, Kind.POSTERIZE) == [3]
    assert arguments(rising, Kind.SOLARIZE) == [26]
    assert arguments(falling, Kind.SOLARIZE) == [230]
    assert arguments(rising, Kind.COLOR) == [0.19, 1.81]
    assert arguments(falling, Kind.COLOR) == [1.72]


def test_autoaugment_applies_every_operation_as_often_as_the_table_says():
    choice = drawn(AutoAugment())
    for kind in AutoAugment().possible:
        for turn in range(2):
            expected = sum(p[turn][1] for p in IMAGENET if p[turn][0] == kind) / 25
            assert_share((choice.kind[:, turn] == kind).mean(), expected, DRAWS)
    # "Posterize 0.4 8" comes before "Rotate 0.6 9" and nowhere else.
    both = (choice.kind[:, 0] == Kind.POSTERIZE) & (choice.kind[:, 1] == Kind.ROTATE)
    assert_share(both.mean(), 0.4 * 0.6 / 25, DRAWS)
    assert set(choice.argument[both, 0]) == {7}
    np.testing.assert_allclose(np.abs(choice.argument[both, 1]), 27, rtol=1e-6)


def test_jitter_draws_evenly_and_in_every_order():
    jitter = Jitter(brightness=0.4, contrast=0.4, saturation=1.5, hue=0.1)
    choice = drawn(jitter)
    for kind, (least, most) in {
        Kind.BRIGHTNESS: (0.6, 1.4),
        Kind.CONTRAST: (0.6, 1.4),
        Kind.COLOR: (0, 2.5),
        Kind.HUE: (-0.1, 0.1),
    }.items():
        values = choice.argument[choice.kind == kind]
        assert len(values) == DRAWS
        span = most - least
        assert least <= values.min() < least + 0.01 * span
        assert most - 0.01 * span < values.max() <= most
        assert abs(values.mean() - (least + most) / 2) < 5 * span / np.sqrt(12 * DRAWS)
    orders, counts = np.unique(choice.kind, axis=0, return_counts=True)
    assert len(orders) == 24
    for count in counts:
        assert_share(count / DRAWS, 1 / 24, DRAWS)
    assert Jitter(contrast=0.3).possible == {Kind.CONTRAST}
