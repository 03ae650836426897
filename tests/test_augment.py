"""The pipeline: order, keys, sharding, settings; erasing, mixing and affine changes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from repvgg_jax.data.augment import (
    Augmentation,
    Mixing,
    RandomAffine,
    RandomErasing,
    make_augmentation,
    make_mixing,
)
from repvgg_jax.data.augment.base import Stage
from repvgg_jax.data.augment.policies import AutoAugment, RandAugment, Raug15
from repvgg_jax.data.settings import AugmentSettings
from repvgg_jax.data.sources import photo_crops
from repvgg_jax.normalize import Normalize
from tests.helpers.jit import quick_jit
from tests.helpers.sharding import OVER_BATCH

COLOR = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GRAY = Normalize((0.5,), (0.25,))
PHOTOS = photo_crops(40, 16)[:, :, :33]
KEY = jax.random.key(0)


def settings(**content):
    """`config.augment` with some settings, nested as there."""
    return AugmentSettings.from_mapping(content)


def collectives(compiled):
    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    return set(re.findall(rf"({names})(?:-start)?\(", compiled.as_text()))


@pytest.mark.parametrize("normalize", [COLOR, GRAY, Normalize((0.1, 0.7, 0.31), (0.3, 0.111, 1.7))])
def test_unaugmented_images_are_bitwise_those_of_evaluation(normalize):
    """In a compiled program those that NumPy computes, for every value of a pixel."""
    channels = len(normalize.mean)
    images = np.arange(256, dtype=np.uint8).reshape(2, 8, 16, 1).repeat(channels, -1)
    expected = normalize(images)
    assert expected.dtype == np.float32
    plain = make_augmentation(settings(), normalize)
    np.testing.assert_array_equal(jax.jit(plain)(KEY, images), expected)
    np.testing.assert_array_equal(jax.jit(normalize.__call__)(images), expected)
    flipped = make_augmentation(settings(flip=1.0), normalize)
    np.testing.assert_array_equal(jax.jit(flipped)(KEY, images), expected[:, :, ::-1])


def test_settings_become_stages():
    assert make_augmentation(settings(), COLOR) == Augmentation(COLOR, fill=(124, 116, 104))
    assert make_mixing(settings()) is None
    made = make_augmentation(
        settings(flip=0.5, policy="randaugment", resampling="bicubic", randaugment={"ops": 3}),
        COLOR,
    )
    assert made.flip == 0.5
    assert made.policy == RandAugment(ops=3, resampling="bicubic")
    assert made.fill == (124, 116, 104)  # the mean color
    assert made.jitter is made.affine is made.erase is None
    assert make_augmentation(settings(policy="autoaugment"), COLOR).policy == AutoAugment()
    raug15 = make_augmentation(settings(policy="raug15"), COLOR)
    assert raug15.policy == Raug15(resampling="random")
    assert raug15.fill == (128, 128, 128)
    erase = {"probability": 0.5, "mode": "zero", "least_aspect": 0.5}
    made = make_augmentation(settings(erase=erase), COLOR)
    assert made.erase == RandomErasing(0.5, "zero", least_aspect=0.5)
    assert make_mixing(settings(cutmix=1.0, mix_group=32)) == Mixing(0.0, 1.0, 32)
    recipe = make_augmentation(digits.get_config().augment, GRAY)
    assert recipe == Augmentation(GRAY, fill=(128,), affine=RandomAffine(12.0, 0.15, 0.15, 0.12))


@pytest.mark.parametrize(
    "content", [{"policy": "raug15"}, {"policy": "autoaugment"}, {"jitter": {"hue": 0.1}}]
)
def test_color_operations_need_three_channels(content):
    with pytest.raises(ValueError, match=r"config\.augment\.\w+.* 3 channels.* 1$"):
        make_augmentation(settings(**content), GRAY)


def test_everything_else_works_on_one_channel():
    augment = make_augmentation(
        settings(
            flip=0.5,
            jitter={"brightness": 0.4, "contrast": 0.4},
            erase={"probability": 1.0, "mode": "zero"},
        ),
        GRAY,
    )
    out = quick_jit(augment)(KEY, PHOTOS[..., :1])
    assert out.shape == (16, 40, 33, 1)
    assert np.isfinite(out).all()


@pytest.fixture(scope="module")
def augment():
    """All stages."""
    everything = settings(
        flip=0.5,
        policy="raug15",
        jitter={"brightness": 0.4, "saturation": 0.4, "hue": 0.1},
        affine={"rotation": 5.0},
        erase={"probability": 0.5},
    )
    return make_augmentation(everything, COLOR)


@pytest.fixture(scope="module")
def alone(augment):
    return np.asarray(jax.jit(augment)(KEY, PHOTOS))


class TestKeys:
    """What happens to an image is a function of the key and of its index in the batch."""

    @pytest.mark.slow
    def test_eight_devices_give_what_one_gives_without_communication(self, augment, alone):
        program = jax.jit(augment, in_shardings=(None, OVER_BATCH), out_shardings=OVER_BATCH)
        compiled = program.lower(KEY, PHOTOS).compile()
        assert collectives(compiled) == set()
        images = jax.device_put(PHOTOS, OVER_BATCH)
        np.testing.assert_array_equal(compiled(KEY, images), alone)

    @pytest.mark.slow
    def test_the_rest_of_the_batch_does_not_matter(self, augment, alone):
        others = np.concatenate([PHOTOS[:5], PHOTOS[:6]])
        np.testing.assert_array_equal(jax.jit(augment)(KEY, others)[:5], alone[:5])

    @pytest.mark.slow
    def test_every_image_and_every_step_differs(self, augment):
        same = np.repeat(PHOTOS[:1], 16, 0)
        program = jax.jit(augment)
        first, second = (np.asarray(program(jax.random.key(k), same)) for k in (0, 1))
        rows = {image.tobytes() for image in [*first, *second]}
        assert len(rows) == 32

    def test_a_further_stage_leaves_the_samples_of_the_others(self):
        plain, erased = (
            np.asarray(quick_jit(make_augmentation(settings(flip=0.5, **more), COLOR))(KEY, PHOTOS))
            for more in ({}, {"erase": {"probability": 1.0, "mode": "zero"}})
        )
        untouched = erased != 0
        assert 0.5 < untouched.mean() < 1
        np.testing.assert_array_equal(erased[untouched], plain[untouched])

    def test_no_stage_shares_the_key_of_an_image(self):
        assert min(stage.value for stage in Stage) > 2**31
        assert len({stage.value for stage in Stage}) == len(Stage)


def test_flips_mirror_columns_as_often_as_asked():
    numbered = np.arange(3, dtype=np.uint8).reshape(1, 1, 3, 1).repeat(4000, 0)
    program = quick_jit(Augmentation(GRAY, flip=0.3).augment_uint8)
    out = np.asarray(program(KEY, numbered))[:, 0, :, 0]
    mirrored = (out == [2, 1, 0]).all(1)
    assert (mirrored | (out == [0, 1, 2]).all(1)).all()
    assert abs(mirrored.mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / 4000)


class TestErasing:
    images = jnp.full((600, 20, 24, 2), 7.0)

    @staticmethod
    @functools.cache
    def program(mode):
        return quick_jit(lambda key, images, p: RandomErasing(p, mode)(key, images))

    def erased(self, *, probability, mode):
        out = np.asarray(self.program(mode)(KEY, self.images, probability))
        return out, out[..., 0] != 7

    def test_rectangles_have_the_areas_and_aspects_asked_for(self):
        _, gone = self.erased(probability=0.6, mode="pixel")
        hit = gone.any((1, 2))
        assert abs(hit.mean() - 0.6) < 5 * np.sqrt(0.6 * 0.4 / 600)
        tall, wide = gone.any(2).sum(1)[hit], gone.any(1).sum(1)[hit]
        np.testing.assert_array_equal(tall * wide, gone.sum((1, 2))[hit])  # no holes
        assert (tall < 20).all()
        assert (wide < 24).all()
        # Sides are rounded to whole pixels.
        assert ((tall + 0.5) * (wide + 0.5) >= 0.02 * 480).all()
        assert ((tall - 0.5) * (wide - 0.5) <= 480 / 3).all()
        assert ((tall - 0.5) / (wide + 0.5) <= 1 / 0.3).all()
        assert ((tall + 0.5) / (wide - 0.5) >= 0.3).all()
        assert (tall > wide).any()
        assert (tall < wide).any()
        assert gone.any(0).all()  # every pixel can go

    def test_what_comes_instead(self):
        noise, gone = self.erased(probability=1.0, mode="pixel")
        values = noise[gone]
        assert abs(values.mean()) < 5 / np.sqrt(values.size)
        assert abs(values.std() - 1) < 5 / np.sqrt(2 * values.size)
        color, gone = self.erased(probability=1.0, mode="color")
        for image, where in zip(color[:50], gone[:50], strict=True):
            assert len(np.unique(image[where], axis=0)) == 1
        assert len(np.unique(color[gone])) > 300
        zero, gone = self.erased(probability=1.0, mode="zero")
        assert (zero[gone] == 0).all()


class TestMixing:
    images = COLOR(PHOTOS)
    targets = jax.nn.one_hot(jnp.arange(16), 16)

    def mixed(self, mixing):
        return map(np.asarray, quick_jit(mixing)(KEY, self.images, self.targets))

    def test_mixup_blends_images_and_targets_by_one_weight_per_group(self):
        size = 4
        images, targets = self.mixed(Mixing(mixup=1.0, group=size))
        kept = np.diagonal(targets)
        for index in range(16):
            start = index // size * size
            other = 2 * start + size - 1 - index
            share = kept[index]
            assert share == pytest.approx(kept[start])
            expected = share * self.images[index] + (1 - share) * self.images[other]
            np.testing.assert_allclose(images[index], expected, atol=1e-5)
            assert targets[index, other] == pytest.approx(1 - share, abs=1e-6)
        np.testing.assert_allclose(targets.sum(1), 1, atol=1e-6)
        assert len(np.unique(kept.round(5))) == 16 // size

    def test_cutmix_pastes_a_rectangle_and_counts_its_pixels(self):
        program = quick_jit(Mixing(cutmix=1.0))
        for seed in range(8):
            key = jax.random.key(seed)
            images, targets = map(np.asarray, program(key, self.images, self.targets))
            own = (images == self.images).all((0, 3))
            other = (images == self.images[::-1]).all((0, 3))
            assert (own | other).all()
            np.testing.assert_allclose(np.diagonal(targets), own.mean(), atol=1e-6)
            rows, columns = (~own).any(1), (~own).any(0)
            assert (~own).sum() == rows.sum() * columns.sum()

    def test_weights_follow_beta(self):
        keys = jax.random.split(KEY, 4000)
        share = quick_jit(jax.vmap(lambda k: Mixing(mixup=0.2).weights(k, 1, 1)))(keys)[1]
        assert abs(share.mean() - 0.5) < 0.04
        # Beta(a, a) has the variance 1 / (4 (2 a + 1)).
        assert share.var() == pytest.approx(1 / 5.6, rel=0.03)

    def test_with_both_a_coin_decides(self):
        keys = jax.random.split(KEY, 1000)
        masks = quick_jit(jax.vmap(lambda k: Mixing(0.4, 1.0).weights(k, 16, 16)))(keys)[0]
        cut = np.asarray(((masks == 0) | (masks == 1)).all((1, 2)))
        assert abs(cut.mean() - 0.5) < 5 * np.sqrt(0.25 / 1000) + 0.02  # a weight can round to 1

    @pytest.mark.slow
    def test_eight_devices_give_what_one_gives(self):
        # The all-reduce is one flag of the sampler's loop; images stay where they are.
        allowed = {
            Mixing(cutmix=1.0): {"collective-permute"},
            Mixing(mixup=0.2, group=2): {"all-reduce"},
        }
        images, targets = (
            jax.device_put(values, OVER_BATCH) for values in (self.images, self.targets)
        )
        for mixing, communication in allowed.items():
            program = quick_jit(
                mixing,
                in_shardings=(None, OVER_BATCH, OVER_BATCH),
                out_shardings=(OVER_BATCH, OVER_BATCH),
            )
            compiled = program.lower(KEY, images, targets).compile()
            assert collectives(compiled) <= communication
            for ours, whole in zip(compiled(KEY, images, targets), self.mixed(mixing), strict=True):
                np.testing.assert_allclose(ours, whole, atol=1e-6)

    def test_a_group_that_does_not_divide_the_batch(self):
        with pytest.raises(ValueError, match=r"mix_group=5\b.* 16 images"):
            Mixing(mixup=0.2, group=5)(KEY, self.images, self.targets)


class TestRandomAffine:
    images = np.random.default_rng(0).random((16, 9, 9, 2)).astype(np.float32)

    def test_nothing_to_do_is_the_identity(self):
        moved = quick_jit(RandomAffine())(KEY, self.images)
        np.testing.assert_allclose(moved, self.images, atol=1e-6)

    def test_a_key_decides_and_every_image_has_its_own(self):
        affine = quick_jit(RandomAffine(rotation=20, shift=0.2))
        same = np.repeat(self.images[:1], 4, 0)
        moved = affine(jax.random.key(0), same)
        np.testing.assert_array_equal(moved, affine(jax.random.key(0), same))
        assert np.abs(moved[0] - moved[1]).max() > 0.1
        assert np.abs(moved - affine(jax.random.key(1), same)).max() > 0.1

    def test_shifts_reach_exactly_as_far_as_asked(self):
        dot = np.zeros((400, 9, 9, 1), np.float32)
        dot[:, 4, 4] = 1
        moved = np.asarray(quick_jit(RandomAffine(shift=2 / 9))(KEY, dot))[..., 0]
        rows = (moved.sum(2) * np.arange(9)).sum(1) - 4
        np.testing.assert_allclose(moved.sum((1, 2)), 1, atol=1e-5)
        assert 1.9 < rows.max() <= 2
        assert -2 <= rows.min() < -1.9
        assert abs(rows.mean()) < 0.2

    def test_rotations_turn_about_the_center(self):
        bar = np.zeros((200, 9, 9, 1), np.float32)
        bar[:, 4, 1:8] = 1
        moved = np.asarray(quick_jit(RandomAffine(rotation=90))(KEY, bar))[..., 0]
        np.testing.assert_allclose(moved[:, 4, 4], 1, atol=1e-5)
        upright = np.abs(moved[:, :, 4].sum(1) - 7) < 0.5
        assert 0 < upright.sum() < 60
