"""Every source: what it reads, that it crosses into workers, and what it says of bad data."""

import itertools
import json
import os
import pathlib
import pickle
import re
import subprocess
import sys

import pytest

from repvgg_jax.data import records
from repvgg_jax.data.batches import train_batches
from repvgg_jax.data.dataset import load
from tests.pictures import CLASSES, images, settings, write_tree
from tests.test_data import SHARDING

FILES = images()
ROOT = pathlib.Path(__file__).resolve().parents[1]


def write_records(root, files):
    """Two shards a split, as `prepare` would leave them."""
    from array_record.python.array_record_module import ArrayRecordWriter

    root.mkdir()
    splits = {}
    for split in ("train", "val"):
        names = sorted(name for name in files if name.startswith(split))
        splits[split] = []
        for half in range(2):
            path = root / f"{split}-{half:05}-of-00002.array_record"
            writer = ArrayRecordWriter(str(path), "group_size:1")
            for name in names[half::2]:
                label = CLASSES.index(name.split("/")[1])
                writer.write(records.pack(encoded=files[name], label=label, name=name))
            writer.close()
            shard = records.Shard(path.name, len(names[half::2]), path.stat().st_size, "")
            splits[split].append(shard)
    records.Manifest(CLASSES, splits, {}).write(root)
    return root


def write_tfds(root, files, file_format="array_record"):
    """What TFDS's own preparation leaves on disk."""
    from tests.pictures_tfds import Pictures

    Pictures(files=files, data_dir=str(root), file_format=file_format).download_and_prepare()
    return root


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory):
    """The settings of the same pictures in every kind of place."""
    root = tmp_path_factory.mktemp("data")
    write_tree(root / "folder", FILES)
    write_records(root / "records", FILES)
    write_tfds(root / "tfds", FILES)
    return {
        "folder": settings(f"folder:{root / 'folder'}", train_size=32),
        "records": settings(f"records:{root / 'records'}", train_size=32),
        "tfds": settings("tfds:pictures", directory=str(root / "tfds"), train_size=32),
    }


def take_training_images(data):
    """Every training image once."""
    batches = train_batches(data, batch_size=8, seed=0, start_step=0, sharding=SHARDING)
    for _ in itertools.islice(batches, 2):
        pass
    batches.close()


KINDS = ["folder", "records", "tfds"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_holds_every_file_once_with_its_label(everywhere, kind):
    data = load(everywhere[kind])
    assert data.classes == CLASSES
    assert data.image_shape == data.eval_shape == (32, 32, 3)
    for split, source in (("train", data.train), ("val", data.evaluation)):
        source = pickle.loads(pickle.dumps(source))
        found = {
            e["name"]: (e["encoded"], CLASSES[e["label"]])
            for e in map(source.__getitem__, range(len(source)))
        }
        wanted = {n: (c, n.split("/")[1]) for n, c in FILES.items() if n.startswith(split)}
        assert found == wanted
        assert len(source) == len(wanted)


def test_a_folders_order_is_that_of_names(everywhere):
    names = [load(everywhere["folder"]).train[i]["name"] for i in range(12)]
    assert names == sorted(names)


@pytest.mark.parametrize("kind", ["digits", "fake", *KINDS])
def test_tensorflow_is_never_imported(everywhere, tmp_path, kind):
    """Not even where it is installed: here as a package that cannot stand being imported."""
    (tmp_path / "tensorflow").mkdir()
    alarm = 'raise SystemExit("tensorflow was imported")'
    (tmp_path / "tensorflow" / "__init__.py").write_text(alarm)
    config = everywhere.get(kind, settings(kind))
    script = f"""
from ml_collections import ConfigDict
from repvgg_jax.data.dataset import load
data = load(ConfigDict({config.to_dict()!r}))
print(len(data.train), data.train[0]["label"], data.evaluation_images(2).shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\d+ \d+ \(2, \d+, \d+, [13]\)\n", done.stdout)


class TestBadData:
    @pytest.fixture
    def folder(self, tmp_path):
        return write_tree(tmp_path / "d", FILES)

    @pytest.fixture
    def recorded(self, tmp_path):
        return write_records(tmp_path / "r", FILES)

    @pytest.mark.parametrize(
        ("source", "changes", "message"),
        [
            ("folders:/x", {}, r"unknown data set 'folders:/x'.*did you mean 'folder'.*tfds:NAME"),
            ("folder:", {}, r"unknown data set 'folder:'"),
            ("imagenet", {}, r"unknown data set 'imagenet'.*records:DIRECTORY"),
            (
                "folder:/nowhere",
                {"train_size": 8},
                r"/nowhere/train is no directory; .*CLASS/IMAGE",
            ),
            ("records:/nowhere", {"train_size": 8}, r"/nowhere holds no manifest.json: .*prepare"),
            ("tfds:nothing", {"train_size": 8}, r"tfds:nothing is not prepared in .*directory"),
            ("digits", {"num_classes": 9}, r"num_classes=9, but digits has 10 classes"),
            ("digits", {"workers": -1}, r"config.data.workers=-1 must be 0 or more"),
            ("digits", {"threads": 0}, r"config.data.threads=0 must be 1 or more"),
            ("digits", {"eval_crop": 1.5}, r"config.data.eval_crop=1.5 must be .* at most 1"),
            ("digits", {"crop_scale": (0.5, 1.5)}, r"crop_scale=\(0.5, 1.5\) .* at most 1"),
            ("digits", {"crop_ratio": (2.0, 0.5)}, r"crop_ratio=\(2.0, 0.5\) .*smaller first"),
        ],
    )
    def test_settings(self, source, changes, message):
        with pytest.raises(ValueError, match=message):
            load(settings(source, **changes))

    def test_encoded_images_need_a_size(self, folder):
        with pytest.raises(ValueError, match=r"config.data.train_size=0, .*many sizes.*=224"):
            load(settings(f"folder:{folder}"))

    def test_empty_classes(self, folder):
        (folder / "train" / "n00").mkdir()
        (folder / "val" / "n00").mkdir()
        (folder / "val" / "n00" / "notes.txt").touch()
        with pytest.raises(ValueError, match=r"d/train: no images \(.*jpg.*\) of class n00$"):
            load(settings(f"folder:{folder}", train_size=8))

    def test_different_classes(self, folder):
        (folder / "train" / "n03").rename(folder / "train" / "m03")
        with pytest.raises(ValueError, match=r"only in train: m03; only in val: n03"):
            load(settings(f"folder:{folder}", train_size=8))

    def test_missing_and_truncated_shards(self, recorded):
        shard = recorded / "train-00001-of-00002.array_record"
        shard.write_bytes(shard.read_bytes()[:-7])
        with pytest.raises(ValueError, match=r"1 of 4 shards of the wrong size: train-00001"):
            load(settings(f"records:{recorded}", train_size=8))
        shard.unlink()
        with pytest.raises(ValueError, match=r"1 of 4 shards missing: train-00001-of-00002"):
            load(settings(f"records:{recorded}", train_size=8))

    def test_an_unreadable_manifest(self, recorded):
        content = json.loads((recorded / "manifest.json").read_text())
        (recorded / "manifest.json").write_text(json.dumps(content | {"version": 7}))
        with pytest.raises(ValueError, match=r"manifest.json cannot be read: version 7, this is 1"):
            load(settings(f"records:{recorded}", train_size=8))

    def test_tfds(self, tmp_path):
        root = write_tfds(tmp_path / "t", FILES)
        config = settings("tfds:pictures", directory=str(root), train_size=8)
        config.eval_split = "test"
        with pytest.raises(
            ValueError, match=r"eval_split='test'.*no such split.*train, validation"
        ):
            load(config)
        config.eval_split = "validation"
        next(root.rglob("*validation*-of-*")).unlink()
        with pytest.raises(
            ValueError, match=r"1 of 1 shards of 'validation' missing: pictures-val"
        ):
            load(config)

    def test_tfds_with_a_damaged_record(self, tmp_path):
        root = write_tfds(tmp_path / "t", FILES)
        shard = next(root.rglob("*train*-of-*"))
        content = bytearray(shard.read_bytes())
        content[30_000] ^= 4  # one of the last of twelve records
        shard.write_bytes(content)
        config = settings("tfds:pictures", directory=str(root), train_size=8)
        place = r"record \d+ of pictures-train\.array_record-00000-of-00001 is damaged: Corrupted"
        found = set()
        for config.train_split in ("train", "train[25%:]"):
            source = load(config).train
            damaged = [i for i in range(len(source)) if not self.can_read(source, i, place)]
            found.add(damaged[0] - len(source))
            assert len(damaged) == 1
        assert len(found) == 1  # the same record of the file, whatever the split takes of it
        data = load(config)
        with pytest.raises(ValueError, match=rf"training image .*{place}.*config.data.max_bad=0"):
            take_training_images(data)
        config.max_bad = 1
        data = load(config)
        data.undecodable.say = (lines := []).append
        take_training_images(data)
        assert len(lines) == 1
        assert re.search(place, lines[0])

    def can_read(self, source, index, message):
        try:
            source[index]
        except OSError as error:
            named = re.match(message, str(error))
            assert named
            assert f"record {index + 12 - len(source)} of" in named[0]
            return False
        return True

    def test_a_damaged_first_record_is_one_of_those_that_may_be(self, tmp_path):
        root = write_tfds(tmp_path / "t", FILES)
        shard = next(root.rglob("*train*-of-*"))
        content = bytearray(shard.read_bytes())
        content[100] ^= 4
        shard.write_bytes(content)
        config = settings("tfds:pictures", directory=str(root), train_size=8, max_bad=1)
        data = load(config)
        data.undecodable.say = (lines := []).append
        take_training_images(data)
        assert "record 0 of pictures-train" in lines[0]

    @pytest.mark.parametrize("length", [0, 65536, -7])
    def test_tfds_with_a_shard_that_was_cut_short(self, tmp_path, length):
        root = write_tfds(tmp_path / "t", FILES)
        shard = next(root.rglob("*train*-of-*"))
        shard.write_bytes(shard.read_bytes()[:length])
        config = settings("tfds:pictures", directory=str(root), train_size=8)
        with pytest.raises(
            ValueError, match=r"1 of 1 shards of 'train' damaged or cut short: pictures-tr.* \(\w"
        ):
            load(config)

    def test_tfds_with_another_number_of_records_than_promised(self, tmp_path):
        root = write_tfds(tmp_path / "t", FILES)
        shard = next(root.rglob("*train*-of-*"))
        shard.write_bytes(next(root.rglob("*validation*-of-*")).read_bytes())
        config = settings("tfds:pictures", directory=str(root), train_size=8)
        with pytest.raises(ValueError, match=r"'train' damaged .*-00001 \(5 records of 12\); copy"):
            load(config)

    def test_tfds_without_random_access(self, tmp_path):
        root = write_tfds(tmp_path / "t", FILES)
        info = next(root.rglob("dataset_info.json"))
        info.write_text(info.read_text().replace("array_record", "tfrecord"))
        config = settings("tfds:pictures", directory=str(root), train_size=8)
        with pytest.raises(ValueError, match=r"stored as tfrecord, .*file_format='array_record'"):
            load(config)
