"""Batches: the same for any number of processes, workers and threads; bad images are reported."""

import dataclasses
import hashlib
import itertools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax.data.batches import eval_batches, train_batches
from repvgg_jax.data.dataset import BadImages, load
from repvgg_jax.data.images import CenterCrop
from repvgg_jax.data.sampling import draws
from repvgg_jax.data.settings import DataSettings
from repvgg_jax.data.sources import ArraySource
from repvgg_jax.data.transforms import TrainSizes
from tests.helpers.pictures import damaged, encoded, images, in_memory, photo, write_tree
from tests.helpers.sharding import OVER_BATCH

FILES = images(train=20, val=11)
BAD_TRAIN, BAD_VAL = "train/n02/n02_007.JPEG", "val/n01/n01_003.JPEG"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("data"), FILES)


@pytest.fixture
def broken(tmp_path):
    """One training image and one validation image are damaged."""
    bad = {name: damaged(FILES[name]) for name in (BAD_TRAIN, BAD_VAL)}
    return write_tree(tmp_path, FILES | bad)


def dataset(root, **changes):
    return load(DataSettings(source=f"folder:{root}", **{"train_size": 24} | changes))


def train(data, steps, *, start=0, seed=0, size_at=None):
    batches = train_batches(
        data, batch_size=8, seed=seed, start_step=start, sharding=OVER_BATCH, size_at=size_at
    )
    taken = [jax.device_get(dict(batch)) for batch in itertools.islice(batches, steps)]
    batches.close()
    return taken


def assert_equal(some, others):
    assert len(some) == len(others) > 0
    for one, other in zip(some, others, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


def numbered(count: int) -> ArraySource:
    """Images labeled with their own number."""
    return ArraySource(np.zeros((count, 2, 2, 1), np.uint8), np.arange(count))


def labels(source, steps, **options):
    return [batch["label"].tolist() for batch in train(in_memory(source), steps, **options)]


class TestOrder:
    def test_every_epoch_is_another_permutation_of_all_images(self):
        first, second = np.array(labels(numbered(40), 10)).reshape(2, 40)
        assert sorted(first) == sorted(second) == list(range(40))
        assert (first != second).any()
        assert (first != np.arange(40)).any()

    def test_is_a_function_of_the_seed(self):
        assert labels(numbered(40), 5) == labels(numbered(40), 5)
        assert labels(numbered(40), 5) != labels(numbered(40), 5, seed=1)

    @pytest.mark.parametrize("start", [1, 7, 13])
    def test_starting_later_gives_the_same_batches(self, start):
        assert labels(numbered(40), 3, start=start) == labels(numbered(40), start + 3)[start:]

    @pytest.mark.parametrize("processes", [2, 4])
    def test_processes_read_their_parts_of_the_same_batches(self, monkeypatch, processes):
        whole = labels(numbered(40), 6)
        monkeypatch.setattr(jax, "process_count", lambda: processes)
        monkeypatch.setattr(jax, "make_array_from_process_local_data", lambda _, values: values)
        parts = []
        for process in range(processes):
            monkeypatch.setattr(jax, "process_index", lambda p=process: p)
            parts.append(labels(numbered(40), 6))
        assert [list(itertools.chain(*of)) for of in zip(*parts, strict=True)] == whole

    @pytest.mark.parametrize("count", [16, 17, 3])
    def test_evaluation_sees_every_image_once(self, count):
        batches = list(eval_batches(in_memory(numbered(count)), batch_size=8, sharding=OVER_BATCH))
        assert all(batch["label"].shape == (8,) for batch in batches)
        mask = np.concatenate([batch["mask"] for batch in batches])
        seen = np.concatenate([batch["label"] for batch in batches])[mask]
        assert seen.tolist() == list(range(count))


class TestBalancedSampling:
    """Classes of 30, 6, 0 and 4 images: 13 seats of each class that has any, per pass."""

    LABELS = np.repeat([0, 1, 3], [30, 6, 4])

    def draws(self, passes):
        source = ArraySource(np.zeros((40, 2, 2, 1), np.uint8), self.LABELS)
        data = dataclasses.replace(in_memory(source), sampling="balanced")
        stream = draws(data, seed=5)
        return [stream[i] for i in range(39 * passes)]

    def test_every_class_and_every_image_of_a_class_as_often(self):
        numbers = np.array([number for number, _ in self.draws(10)])
        for of_pass in numbers.reshape(10, 39):
            assert np.bincount(self.LABELS[of_pass]).tolist() == [13, 13, 0, 13]
        drawn = np.bincount(numbers)
        for label in (0, 1, 3):
            assert np.ptp(drawn[label == self.LABELS]) <= 1

    def test_no_draw_is_that_of_another(self):
        """So that an image that comes again is cropped anew."""
        taken = self.draws(10)
        assert len(set(taken)) == len(taken)
        first = [number for number, before in taken if before == 0]
        assert sorted(first) == list(range(40))

    def test_is_found_without_what_comes_before(self, folder):
        whole = train(dataset(folder, sampling="balanced"), 7)
        later = dataset(folder, sampling="balanced", workers=2, threads=2)
        assert_equal(train(later, 4, start=3), whole[3:])
        other = train(dataset(folder, sampling="balanced"), 7, seed=1)
        assert any((a["label"] != b["label"]).any() for a, b in zip(whole, other, strict=True))

    def test_a_source_that_does_not_know_its_labels_is_read_once(self):
        class Unknown:
            def __len__(self):
                return 6

            def __getitem__(self, index):
                if index == 2:
                    raise OSError("damaged")
                return {"image": np.zeros((2, 2, 1), np.uint8), "label": int(index > 3)}

        data = dataclasses.replace(in_memory(numbered(4)), train=Unknown(), sampling="balanced")
        taken = [draws(data, seed=0)[i][0] for i in range(12)]
        assert sorted({*taken}) == [0, 1, 3, 4, 5]
        assert sum(number > 3 for number in taken) == 6


def test_batches_are_sharded_over_all_devices():
    data = in_memory(numbered(40))
    batch = next(train_batches(data, batch_size=16, seed=0, start_step=0, sharding=OVER_BATCH))
    assert {shard.data.shape for shard in batch["image"].addressable_shards} == {(2, 2, 2, 1)}
    assert batch["image"].dtype == jnp.uint8
    assert batch["label"].dtype == jnp.int32


class TestDigits:
    def test_are_real_and_split_with_every_digit_in_proportion(self):
        data = load(DataSettings())
        assert (len(data.train), len(data.evaluation)) == (1437, 360)
        assert data.image_shape == (8, 8, 1)
        assert data.classes == tuple("0123456789")
        assert data.train.images.dtype == np.uint8
        assert (data.train.images.min(), data.train.images.max()) == (0, 255)
        fraction = np.bincount(data.evaluation.labels) / 360
        np.testing.assert_allclose(fraction, np.bincount(data.train.labels) / 1437, atol=0.003)
        rows = {image.tobytes() for image in data.train.images}
        assert sum(image.tobytes() in rows for image in data.evaluation.images) == 0

    def test_the_recipes_mean_and_deviation_are_those_of_the_training_pixels(self):
        from configs import digits

        pixels = load(DataSettings()).train.images / 255
        config = digits.get_config()
        assert config.data.mean == pytest.approx([pixels.mean()], abs=1e-3)
        assert config.data.std == pytest.approx([pixels.std()], abs=1e-3)

    def test_batches_are_those_of_the_published_results(self):
        """The digest of what the results in docs/results.md were trained on."""
        batches = train_batches(
            load(DataSettings()), batch_size=64, seed=3, start_step=5, sharding=OVER_BATCH
        )
        digest = hashlib.sha256()
        for batch in itertools.islice(batches, 30):
            digest.update(np.asarray(batch["image"]).tobytes())
            digest.update(np.asarray(batch["label"]).tobytes())
        assert digest.hexdigest()[:16] == "0a2b42efa81efac5"


class TestDecodedBatches:
    def test_workers_threads_and_resuming_change_nothing(self, folder):
        whole = train(dataset(folder), 7)
        assert whole[0]["image"].shape == (8, 24, 24, 3)
        assert whole[0]["image"].dtype == np.uint8
        assert set(whole[0]) == {"image", "label"}
        assert_equal(train(dataset(folder, threads=3), 7), whole)
        assert_equal(train(dataset(folder, workers=3, threads=2), 4, start=3), whole[3:])

    def test_an_epoch_shows_other_crops_of_the_same_images(self, folder):
        batches = train(dataset(folder), 5)
        labels = np.concatenate([b["label"] for b in batches])
        pictures = np.concatenate([b["image"] for b in batches])
        assert sorted(labels[:20]) == sorted(labels[20:]) == sorted([0] * 7 + [1] * 7 + [2] * 6)
        assert len({picture.tobytes() for picture in pictures}) == 40
        other = train(dataset(folder), 1, seed=1)
        assert (other[0]["image"] != batches[0]["image"]).any()

    def test_the_size_may_change_between_epochs(self, folder):
        """An epoch has 20 // 8 = 2 steps; resuming finds the size of its step."""
        sizes = TrainSizes(((0, 8), (1, 16), (2, 24)), otherwise=24)
        batches = train(dataset(folder), 6, size_at=sizes)
        assert [batch["image"].shape[1] for batch in batches] == [8, 8, 16, 16, 24, 24]
        assert_equal(train(dataset(folder), 3, start=3, size_at=sizes), batches[3:])
        assert_equal(train(dataset(folder), 2, start=4), batches[4:])

    def test_images_may_be_rectangular(self, folder):
        data = dataset(folder, train_size=(16, 40), eval_size=[24, 12])
        assert (data.image_shape, data.eval_shape) == ((16, 40, 3), (24, 12, 3))
        whole = train(data, 4)
        assert whole[0]["image"].shape == (8, 16, 40, 3)
        assert_equal(train(dataset(folder, train_size=(16, 40), threads=2), 2, start=2), whole[2:])
        batch = next(iter(eval_batches(data, batch_size=8, sharding=OVER_BATCH)))
        np.testing.assert_array_equal(batch["image"][1], CenterCrop((24, 12))(data.evaluation[1]))
        sizes = TrainSizes(((0, (8, 20)), (1, 16)), otherwise=(16, 40))
        batches = train(data, 4, size_at=sizes)
        assert [b["image"].shape[1:3] for b in batches] == [(8, 20), (8, 20), (16, 16), (16, 16)]

    def test_sizes_need_a_crop(self):
        with pytest.raises(ValueError, match=r"config\.data\.train_size"):
            train(load(DataSettings()), 1, size_at=TrainSizes(((0, 8),), otherwise=8))

    def test_arrays_can_be_cropped_and_resized(self):
        data = load(DataSettings(source="fake", train_size=20, eval_size=24))
        assert data.image_shape == (20, 20, 3)
        assert train(data, 1)[0]["image"].shape == (8, 20, 20, 3)
        assert data.evaluation_images(3).shape == (3, 24, 24, 3)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_evaluation_is_every_image_once(self, folder, workers):
        data = dataset(folder, workers=workers, eval_size=32)
        batches = list(eval_batches(data, batch_size=8, sharding=OVER_BATCH))
        assert set(batches[0]) == {"image", "label", "mask"}
        mask = np.concatenate([batch["mask"] for batch in batches])
        assert mask.tolist() == [True] * 11 + [False] * 5
        seen = np.concatenate([batch["image"] for batch in batches])
        expected = [CenterCrop(32)(data.evaluation[i]) for i in range(11)]
        np.testing.assert_array_equal(seen[:11], expected)
        assert not seen[11:].any()


class TestBadImages:
    """An image that cannot be decoded."""

    @pytest.fixture
    def warnings(self, caplog):
        """Messages of this package's logger at level WARNING."""
        caplog.set_level(logging.WARNING, "repvgg_jax")
        return lambda: [
            record.getMessage()
            for record in caplog.records
            if record.name.startswith("repvgg_jax") and record.levelno == logging.WARNING
        ]

    @pytest.mark.parametrize("workers", [0, 1])
    def test_the_first_one_stops_the_run_and_is_named(self, broken, workers):
        with pytest.raises(ValueError, match=rf"image {BAD_TRAIN} .*max_bad=0.*check") as error:
            train(dataset(broken, workers=workers), 3)
        assert "\n" not in str(error.value)

    def test_some_are_allowed_named_once_and_replaced_by_the_next(self, broken, folder, warnings):
        batches, sound = train(dataset(broken, max_bad=2), 5), train(dataset(folder), 5)
        (line,) = warnings()
        assert re.search(rf"training image {BAD_TRAIN} .*1 of at most 2", line)
        differing = [
            (new, old)
            for b, s in zip(batches, sound, strict=True)
            for new, old in zip(b["image"], s["image"], strict=True)
            if (new != old).any()
        ]
        assert len(differing) == 2  # in 40 images of 20
        assert_equal(train(dataset(broken, max_bad=2, threads=2), 3, start=2), batches[2:])

    def test_validation_images_are_masked_and_counted_together(self, broken, warnings):
        data = dataset(broken, max_bad=2)
        train(data, 5)
        for _ in range(2):
            batches = list(eval_batches(data, batch_size=8, sharding=OVER_BATCH))
            assert sum(int(batch["mask"].sum()) for batch in batches) == 10
        first, second = warnings()
        assert BAD_TRAIN in first
        assert re.search(rf"validation image {BAD_VAL} .*2 of at most 2", second)
        data = dataclasses.replace(data, bad_images=BadImages(allowed=1))
        train(data, 5)
        with pytest.raises(ValueError, match=rf"{BAD_VAL} .*1 more.*max_bad=1"):
            list(eval_batches(data, batch_size=8, sharding=OVER_BATCH))

    def test_no_image_for_a_proof(self, tmp_path):
        files = {name: damaged(content) for name, content in FILES.items()}
        data = dataset(write_tree(tmp_path, files))
        with pytest.raises(ValueError, match="none of the first 5 validation images of folder:"):
            data.evaluation_images(5)

    def test_several_in_a_row(self, tmp_path):
        files = {n: damaged(c) if n.startswith("train") else c for n, c in FILES.items()}
        data = dataset(write_tree(tmp_path, files), max_bad=3)
        with pytest.raises(ValueError, match=r"3 more.*max_bad=3"):
            train(data, 1)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_the_first_of_several_frames_is_said_once(self, tmp_path, warnings, workers):
        frames = [photo(number, 30, 30).quantize(8) for number in range(2)]
        gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
        names = [f"train/n01/{number}.gif" for number in range(4)]
        data = dataset(write_tree(tmp_path, FILES | dict.fromkeys(names, gif)), workers=workers)
        train(data, 3)
        list(eval_batches(data, batch_size=8, sharding=OVER_BATCH))
        (line,) = warnings()
        assert re.search(r"training image train/n01/\d\.gif .*several.* first", line)

    def test_a_file_that_vanished(self, tmp_path):
        data = dataset(write_tree(tmp_path, FILES))
        (tmp_path / BAD_TRAIN).unlink()
        with pytest.raises(ValueError, match=f"No such file.*{BAD_TRAIN}"):
            train(data, 3)
