"""Batches of decoded images: the same whoever reads them, and honest about what is damaged."""

import itertools

import jax
import numpy as np
import pytest

from repvgg_jax.data.batches import eval_batches, train_batches
from repvgg_jax.data.dataset import load
from repvgg_jax.data.views import CentreCrop
from tests.pictures import damaged, images, settings, write_tree
from tests.test_data import SHARDING

FILES = images(train=20, val=11)
BAD = "train/n02/n02_007.JPEG"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("data"), FILES)


@pytest.fixture
def broken(tmp_path):
    """One training image and one held-out image are damaged."""
    val = "val/n01/n01_003.JPEG"
    return write_tree(tmp_path, FILES | {BAD: damaged(FILES[BAD]), val: damaged(FILES[val])})


def dataset(root, **changes):
    return load(settings(f"folder:{root}", **{"train_size": 24} | changes))


def train(data, steps, *, start=0, seed=0, size_at=None):
    batches = train_batches(
        data, batch_size=8, seed=seed, start_step=start, sharding=SHARDING, size_at=size_at
    )
    taken = [jax.device_get(dict(batch)) for batch in itertools.islice(batches, steps)]
    batches.close()
    return taken


def assert_equal(some, others):
    assert len(some) == len(others) > 0
    for one, other in zip(some, others, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_workers_threads_and_resuming_change_nothing(folder):
    whole = train(dataset(folder), 7)
    assert whole[0]["image"].shape == (8, 24, 24, 3)
    assert whole[0]["image"].dtype == np.uint8
    assert whole[0]["label"].dtype == np.int32
    assert set(whole[0]) == {"image", "label"}
    assert_equal(train(dataset(folder, threads=3), 7), whole)
    assert_equal(train(dataset(folder, workers=2), 7), whole)
    assert_equal(train(dataset(folder, workers=3, threads=2), 4, start=3), whole[3:])


def test_an_epoch_shows_other_parts_of_the_same_images(folder):
    batches = train(dataset(folder), 5)
    labels = np.concatenate([b["label"] for b in batches])
    pictures = np.concatenate([b["image"] for b in batches])
    assert sorted(labels[:20]) == sorted(labels[20:]) == sorted([0] * 7 + [1] * 7 + [2] * 6)
    assert len({picture.tobytes() for picture in pictures}) == 40


def test_seeds_change_order_and_parts(folder):
    one, other = (train(dataset(folder), 2, seed=seed) for seed in (0, 1))
    assert (one[0]["image"] != other[0]["image"]).any()


def test_the_size_may_change_between_epochs(folder):
    """An epoch has 20 // 8 = 2 steps; resuming finds the size of its step."""
    sizes = {0: 8, 1: 16, 2: 24}
    batches = train(dataset(folder), 6, size_at=sizes.__getitem__)
    assert [batch["image"].shape[1] for batch in batches] == [8, 8, 16, 16, 24, 24]
    assert_equal(train(dataset(folder), 3, start=3, size_at=sizes.__getitem__), batches[3:])
    assert_equal(train(dataset(folder), 2, start=4), batches[4:])


def test_sizes_need_a_crop():
    with pytest.raises(ValueError, match=r"train size that changes needs config.data.train_size"):
        train(load(settings("digits")), 1, size_at=lambda epoch: 8)


def test_arrays_can_be_cropped_and_resized():
    data = load(settings("fake", train_size=20, eval_size=24))
    assert data.image_shape == (20, 20, 3)
    assert train(data, 1)[0]["image"].shape == (8, 20, 20, 3)
    assert data.evaluation_images(3).shape == (3, 24, 24, 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_is_every_image_once(folder, workers):
    data = dataset(folder, workers=workers, eval_size=32)
    batches = list(eval_batches(data, batch_size=8, sharding=SHARDING))
    mask = np.concatenate([batch["mask"] for batch in batches])
    assert mask.tolist() == [True] * 11 + [False] * 5
    seen = np.concatenate([batch["image"] for batch in batches])
    expected = [CentreCrop(32)(data.evaluation[i]) for i in range(11)]
    np.testing.assert_array_equal(seen[:11], expected)
    assert not seen[11:].any()


class TestUndecodable:
    @pytest.mark.parametrize("workers", [0, 1])
    def test_the_first_one_stops_the_run_and_is_named(self, broken, workers):
        with pytest.raises(
            ValueError, match=f"^training image {BAD} cannot be decoded: .*trunc.*"
        ) as error:
            train(dataset(broken, workers=workers), 3)
        assert "config.data.max_bad=0" in str(error.value)
        assert "\n" not in str(error.value)

    def test_some_are_allowed_named_once_and_replaced_by_the_next(self, broken, folder):
        data, lines = dataset(broken, max_bad=2), []
        data.undecodable.say = lines.append
        batches, sound = train(data, 5), train(dataset(folder), 5)
        assert len(lines) == 1
        assert f"training image {BAD} cannot be decoded" in lines[0]
        assert "the next one takes its place (1 of at most 2 bad images)" in lines[0]
        differing = [
            (new, old)
            for b, s in zip(batches, sound, strict=True)
            for new, old in zip(b["image"], s["image"], strict=True)
            if (new != old).any()
        ]
        assert len(differing) == 2  # in 40 images of 20
        assert_equal(train(dataset(broken, max_bad=2, threads=2), 3, start=2), batches[2:])

    def test_held_out_ones_are_left_out_and_counted_together(self, broken):
        data, lines = dataset(broken, max_bad=2), []
        data.undecodable.say = lines.append
        train(data, 5)
        for _ in range(2):
            batches = list(eval_batches(data, batch_size=8, sharding=SHARDING))
            assert sum(int(batch["mask"].sum()) for batch in batches) == 10
        assert len(lines) == 2
        assert "held-out image val/n01/n01_003.JPEG cannot be decoded" in lines[1]
        assert "it is left out (2 of at most 2 bad images)" in lines[1]
        data = dataset(broken, max_bad=1)
        data.undecodable.say = lines.append
        train(data, 5)
        with pytest.raises(ValueError, match=r"\(and 1 more, .*config.data.max_bad=1"):
            list(eval_batches(data, batch_size=8, sharding=SHARDING))

    def test_a_whole_row_of_them(self, tmp_path):
        files = {n: damaged(c) if n.startswith("train") else c for n, c in FILES.items()}
        data = dataset(write_tree(tmp_path, files), max_bad=3)
        data.undecodable.say = lambda line: None
        with pytest.raises(ValueError, match=r"and 3 more.*config.data.max_bad=3"):
            train(data, 1)

    def test_a_file_that_vanished(self, tmp_path):
        data = dataset(write_tree(tmp_path, FILES))
        (tmp_path / BAD).unlink()
        with pytest.raises(ValueError, match=f"No such file.*{BAD}"):
            train(data, 3)
