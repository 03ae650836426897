"""Digits before photographs: what the images are functions of, and what training never shows."""

import numpy as np
import pytest

from repvgg_jax.data import clutter, dataset
from repvgg_jax.data.settings import DataSettings
from repvgg_jax.data.sources import load_digits


@pytest.fixture(scope="module")
def small():
    return clutter.load_clutter(training=48, validation=24)


def test_an_image_is_a_function_of_seed_and_number(small):
    longer = clutter.load_clutter(training=50, validation=3)
    other = clutter.load_clutter(seed=7, training=48, validation=1)
    np.testing.assert_array_equal(longer[0].images[:48], small[0].images)
    np.testing.assert_array_equal(longer[1].images, small[1].images[:3])
    assert not (other[0].images == small[0].images).all(axis=(1, 2, 3)).any()


def test_the_class_is_that_of_the_middle_digit(small):
    train, _, classes = small
    digits, _, _ = load_digits()
    assert classes == tuple("0123456789")
    assert train.images.shape == (48, 32, 32, 3)
    assert len(set(train.labels)) == 10
    # Without photographs, covers and noise, the middle looks like a digit of that class.
    gray = clutter.Clutter(digits, (np.full((200, 200, 3), 128, np.uint8),), 0)
    made = [gray.make(index) for index in range(300)]
    middle = np.stack([np.abs(image[4:28, 4:28].astype(float) - 128).sum(-1) for image, _ in made])
    middle = middle.reshape(300, 8, 3, 8, 3).mean(axis=(2, 4)).reshape(300, -1)
    known = digits.images.reshape(len(digits), -1).astype(float)
    middle -= middle.mean(1, keepdims=True)
    known -= known.mean(1, keepdims=True)
    known /= np.linalg.norm(known, axis=1, keepdims=True)
    nearest = digits.labels[(middle @ known.T).argmax(axis=1)]
    assert (nearest == [label for _, label in made]).mean() > 0.5  # a tenth by chance


def test_validation_shows_other_digits_and_other_parts_of_photographs(monkeypatch):
    seen = []

    class Spy(clutter.Clutter):
        def __init__(self, digits, photographs, seed):
            seen.append((digits, photographs))
            super().__init__(digits, photographs, seed)

    monkeypatch.setattr(clutter, "Clutter", Spy)
    clutter.load_clutter(training=1, validation=2)
    (train, left), (evaluation, right) = seen
    assert {i.tobytes() for i in train.images}.isdisjoint(i.tobytes() for i in evaluation.images)
    from sklearn import datasets

    for a, b, photograph in zip(left, right, datasets.load_sample_images().images, strict=True):
        np.testing.assert_array_equal(np.concatenate([a, b], axis=1), photograph)


def test_a_run_reads_it_by_name(monkeypatch, small):
    monkeypatch.setattr(dataset, "load_clutter", lambda: small)
    loaded = dataset.load(DataSettings(source="clutter"))
    assert loaded.image_shape == loaded.eval_shape == (32, 32, 3)
    assert (len(loaded.train), len(loaded.evaluation)) == (48, 24)
