"""Every source: what it reads, that it can be pickled, and what it reports of bad data."""

import dataclasses
import itertools
import json
import logging
import os
import pathlib
import pickle
import re
import subprocess
import sys

import pytest

from repvgg_jax.data.batches import train_batches
from repvgg_jax.data.dataset import load
from repvgg_jax.data.settings import DataSettings
from tests.helpers.pictures import CLASSES, images, write_records, write_tree
from tests.helpers.sharding import OVER_BATCH

FILES = images()
ROOT = pathlib.Path(__file__).resolve().parents[1]


def settings(source, train_size=8, **changes):
    return DataSettings(source=source, train_size=train_size, **changes)


def write_tfds(root, files, file_format="array_record"):
    """What the preparation by TFDS leaves on disk."""
    from tests.helpers.pictures_tfds import Pictures

    Pictures(files=files, data_dir=str(root), file_format=file_format).download_and_prepare()
    return root


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory):
    """Settings for the same pictures in every kind of source."""
    root = tmp_path_factory.mktemp("data")
    write_tree(root / "folder", FILES)
    write_records(root / "records", FILES)
    write_tfds(root / "tfds", FILES)
    return {
        "folder": settings(f"folder:{root / 'folder'}", 32),
        "records": settings(f"records:{root / 'records'}", 32),
        "tfds": settings("tfds:pictures", 32, directory=str(root / "tfds")),
    }


def take_training_images(data):
    """Every training image once."""
    batches = train_batches(data, batch_size=8, seed=0, start_step=0, sharding=OVER_BATCH)
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


class TestFolders:
    """Which files of a tree are images."""

    def names(self, root):
        source = load(settings(f"folder:{root}")).train
        return [source[i]["name"].removeprefix("train/") for i in range(len(source))]

    def test_subfolders_and_endings_are_those_of_torchvision(self, tmp_path, caplog):
        content = next(iter(FILES.values()))
        names = [
            *("a/2.jpg", "a/10.JPG", "a/x/1.JfIf", "a/x/y/0.png", "a/X.TIFF", "a/b.jpg/c.pgm"),
            *("b/deep/er/1.Webp", "b/1.ppm", "b/z.jpeg"),
        ]
        ignored = ["a/notes.txt", "b/1.heic", "stray.jpg", "b/deep/list.csv"]
        hidden = [".DS_Store", "a/.1.jpg", "a/Thumbs.db", ".cache/x.jpg", "a/.tmp/1.jpg"]
        files = dict.fromkeys([*names, *ignored, *hidden], content)
        write_tree(tmp_path / "train", files)
        write_tree(tmp_path / "val", {"a/1.jpg": content, "b/1.jpg": content})
        caplog.set_level(logging.WARNING, "repvgg_jax")
        expected = []  # torchvision.datasets.folder.make_dataset
        for label in ("a", "b"):
            for directory, _, inner in sorted(os.walk(tmp_path / "train" / label)):
                below = pathlib.Path(directory).relative_to(tmp_path / "train")
                found = [f"{below}/{name}" for name in sorted(inner)]
                expected += [name for name in found if name in names]
        assert len(expected) == len(names)
        assert self.names(tmp_path) == expected
        (warning,) = (r.getMessage() for r in caplog.records if "ignored" in r.getMessage())
        assert "4 files ignored" in warning
        assert all(name in warning for name in ignored)
        caplog.clear()
        load(settings(f"folder:{tmp_path}", holdout=0.2))
        assert len([r for r in caplog.records if "ignored" in r.getMessage()]) == 1

    def test_links_are_followed_but_not_in_circles(self, tmp_path):
        write_tree(tmp_path, FILES)
        write_tree(tmp_path / "elsewhere", {"more/1.jpg": next(iter(FILES.values()))})
        (tmp_path / "train" / "n01" / "link").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere" / "more" / "back").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "train" / "n02" / "up").symlink_to("..")
        names = self.names(tmp_path)
        assert "n01/link/more/1.jpg" in names
        assert len([name for name in names if name.startswith("n01")]) == 5
        assert len(set(names)) == len(names) < 40

    def test_unreadable_files_are_bad_images(self, tmp_path):
        write_tree(tmp_path, FILES)
        os.mkfifo(tmp_path / "train" / "n01" / "0.jpg")
        with pytest.raises(ValueError, match=r"n01/0\.jpg .*pipe.*max_bad=0"):
            take_training_images(load(settings(f"folder:{tmp_path}")))


@pytest.mark.system
def test_tensorflow_and_pytorch_are_never_imported(everywhere, tmp_path):
    """Not even if they are installed: here as packages that fail when imported."""
    for name in ("tensorflow", "torch"):
        (tmp_path / name).mkdir()
        alarm = f'raise SystemExit("{name} was imported")'
        (tmp_path / name / "__init__.py").write_text(alarm)
    sources = [DataSettings(source="digits"), DataSettings(source="fake"), *everywhere.values()]
    script = f"""
import repvgg_jax.train.loop
from repvgg_jax.data.dataset import load
from repvgg_jax.data.settings import DataSettings
for plain in {[one.plain() for one in sources]!r}:
    data = load(DataSettings(**plain))
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
    assert re.fullmatch(r"(\d+ \d+ \(2, \d+, \d+, [13]\)\n){5}", done.stdout)


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
            ("folders:/x", {}, r"'folders:/x'.*did you mean 'folder'.*tfds:NAME"),
            ("folder:", {}, r"'folder:'"),
            ("imagenet", {}, r"'imagenet'.*records:DIRECTORY"),
            ("folder:/nowhere", {}, r"/nowhere/train .*CLASS/IMAGE"),
            ("records:/nowhere", {}, r"/nowhere .*manifest\.json.*prepare"),
            ("tfds:nothing", {}, r"tfds:nothing .*config\.data\.directory"),
            ("digits", {"num_classes": 9}, r"num_classes=9\b.* 10 classes"),
        ],
    )
    def test_settings(self, source, changes, message):
        with pytest.raises(ValueError, match=message):
            load(settings(source, **changes))

    def test_encoded_images_need_a_size(self, folder):
        with pytest.raises(ValueError, match=r"config\.data\.train_size=0\b.*224"):
            load(settings(f"folder:{folder}", 0))

    def test_empty_classes(self, folder):
        (folder / "train" / "n00").mkdir()
        (folder / "val" / "n00").mkdir()
        (folder / "val" / "n00" / "notes.txt").touch()
        with pytest.raises(ValueError, match=r"d/train: .*\.jpg.* n00; .*allow_empty"):
            load(settings(f"folder:{folder}"))

    def test_empty_classes_can_be_allowed(self, folder, caplog):
        (folder / "train" / "n00").mkdir()
        config = settings(f"folder:{folder}", allow_empty=True)
        caplog.set_level(logging.WARNING, "repvgg_jax")
        data = load(config)
        assert data.classes == ("n00", *CLASSES)
        assert {data.train[i]["label"] for i in range(12)} == {1, 2, 3}
        assert len(data.evaluation) == 5
        for split in ("train", "val"):
            assert re.search(rf"d/{split}: no images of 1 of 4 classes: n00", caplog.text)
        (folder / "val" / "n09").mkdir()
        with pytest.raises(ValueError, match=r"only in val: n09$"):
            load(config)
        for path in (folder / "val").rglob("*.*"):
            path.unlink()
        (folder / "val" / "n09").rmdir()
        with pytest.raises(ValueError, match=r"d/val: no images"):
            load(config)

    def test_different_classes(self, folder):
        (folder / "train" / "n03").rename(folder / "train" / "m03")
        with pytest.raises(ValueError, match=r"train: m03.*val: n03"):
            load(settings(f"folder:{folder}"))

    def test_missing_and_truncated_shards(self, recorded):
        shard = recorded / "train-00001-of-00002.array_record"
        shard.write_bytes(shard.read_bytes()[:-7])
        with pytest.raises(ValueError, match=r"1 of 4 .* size: train-00001"):
            load(settings(f"records:{recorded}"))
        shard.unlink()
        with pytest.raises(ValueError, match=r"1 of 4 .*missing: train-00001-of-00002"):
            load(settings(f"records:{recorded}"))

    def test_an_unreadable_manifest(self, recorded):
        content = json.loads((recorded / "manifest.json").read_text())
        (recorded / "manifest.json").write_text(json.dumps(content | {"version": 7}))
        with pytest.raises(ValueError, match=r"manifest\.json .*version 7\b.* 2\b"):
            load(settings(f"records:{recorded}"))

    @pytest.fixture
    def prepared(self, tmp_path):
        return write_tfds(tmp_path / "t", FILES)

    def test_tfds_splits(self, prepared):
        config = settings("tfds:pictures", directory=str(prepared))
        with pytest.raises(ValueError, match=r"eval_split='test'.*train, validation"):
            load(dataclasses.replace(config, eval_split="test"))
        next(prepared.rglob("*validation*-of-*")).unlink()
        with pytest.raises(ValueError, match=r"1 of 1 .*'validation' missing: pictures-val"):
            load(config)

    def test_tfds_with_a_damaged_record(self, prepared, caplog):
        flip_bit(next(prepared.rglob("*train*-of-*")), 30_000)  # in one of the last records
        config = settings("tfds:pictures", directory=str(prepared))
        where = r"record \d+ of pictures-train\.array_record-00000-of-00001 "
        found = set()
        for split in ("train", "train[25%:]"):
            source = load(dataclasses.replace(config, train_split=split)).train
            damaged = [i for i in range(len(source)) if not self.can_read(source, i, where)]
            found.add(damaged[0] - len(source))
            assert len(damaged) == 1
        assert len(found) == 1  # the same record of the file in both splits
        with pytest.raises(ValueError, match=rf"training image .*{where}.*max_bad=0"):
            take_training_images(load(config))
        caplog.set_level(logging.WARNING, "repvgg_jax")
        take_training_images(load(dataclasses.replace(config, max_bad=1)))
        assert len(re.findall(where, caplog.text)) == 1

    def can_read(self, source, index, message):
        try:
            source[index]
        except OSError as error:
            named = re.match(message, str(error))
            assert named
            assert f"record {index + 12 - len(source)} of" in named[0]
            return False
        return True

    def test_a_damaged_first_record_is_allowed_too(self, prepared, caplog):
        flip_bit(next(prepared.rglob("*train*-of-*")), 100)
        config = settings("tfds:pictures", directory=str(prepared), max_bad=1)
        caplog.set_level(logging.WARNING, "repvgg_jax")
        take_training_images(load(config))
        assert "record 0 of pictures-train" in caplog.text

    @pytest.mark.parametrize("length", [0, 65536, -7])
    def test_tfds_with_a_shard_that_was_cut_short(self, prepared, length):
        shard = next(prepared.rglob("*train*-of-*"))
        shard.write_bytes(shard.read_bytes()[:length])
        with pytest.raises(ValueError, match=r"1 of 1 .*'train' .*cut short: pictures-tr.*\(\w"):
            load(settings("tfds:pictures", directory=str(prepared)))

    def test_tfds_with_another_number_of_records_than_promised(self, prepared):
        shard = next(prepared.rglob("*train*-of-*"))
        shard.write_bytes(next(prepared.rglob("*validation*-of-*")).read_bytes())
        with pytest.raises(ValueError, match=r"'train' .*-00001 \(5 records of 12\)"):
            load(settings("tfds:pictures", directory=str(prepared)))

    def test_tfds_without_random_access(self, prepared):
        info = next(prepared.rglob("dataset_info.json"))
        info.write_text(info.read_text().replace("array_record", "tfrecord"))
        with pytest.raises(ValueError, match=r"tfrecord.*file_format='array_record'"):
            load(settings("tfds:pictures", directory=str(prepared)))


def flip_bit(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 4
    path.write_bytes(content)
