"""Preparing stores what it was given, also after it failed in between."""

import hashlib
import io
import json
import logging
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections import namedtuple

import numpy as np
import pytest
from PIL import Image

from repvgg_jax.data import records
from repvgg_jax.data.dataset import load
from repvgg_jax.data.decoding import Decoder, is_plain_jpeg
from repvgg_jax.data.prepare import inputs
from repvgg_jax.data.prepare import prepare as preparing
from repvgg_jax.data.prepare.shards import Encoding
from repvgg_jax.data.settings import DataSettings
from tests.helpers.in_process import InProcess
from tests.helpers.pictures import damaged, encoded, images, photo, pixels, write_tars, write_tree

FILES = images()
ROOT = pathlib.Path(__file__).resolve().parents[1]
CMYK, PNG = "train/n02/n02_001.JPEG", "train/n03/n03_002.JPEG"


@pytest.fixture
def messages(caplog):
    """Returns the messages since the last call."""
    caplog.set_level(logging.INFO, "repvgg_jax")

    def take():
        taken = "\n".join(record.getMessage() for record in caplog.records)
        caplog.clear()
        return taken

    return take


@pytest.fixture
def in_process(monkeypatch):
    """Work in this process; worker processes are tested with the command."""
    monkeypatch.setattr(preparing, "_pool", lambda processes: InProcess())


def prepare(source, output, **changes):
    config = preparing.Settings(**{"shard_images": 4} | changes)
    return preparing.prepare(inputs.find(source), output, config)


def stored(output, split="train"):
    data = load(DataSettings(source=f"records:{output}", train_size=8))
    source = data.train if split == "train" else data.evaluation
    return {
        (e := source[i])["name"]: (e["encoded"], data.classes[e["label"]])
        for i in range(len(source))
    }


def run(*arguments, through=()):
    """Runs the command, `through` another one that takes it as its last arguments."""
    command = [sys.executable, "-m", "repvgg_jax.data.prepare", *map(str, arguments)]
    done = subprocess.run([*through, *command], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.usefixtures("in_process")
class TestPreparing:
    @pytest.mark.parametrize("write", [write_tree, write_tars])
    def test_every_image_is_stored_with_its_class(self, tmp_path, write):
        manifest = prepare(write(tmp_path / "in", FILES), tmp_path / "out")
        found = stored(tmp_path / "out")
        assert set(found) == {name for name in FILES if name.startswith("train")}
        for name, (content, label) in found.items():
            assert label == name.split("/")[1]
            if name in (CMYK, PNG):
                assert is_plain_jpeg(content)
                assert np.abs(pixels(content).astype(int) - pixels(FILES[name])).mean() < 3
            else:
                assert content == FILES[name]
        assert manifest.details["changed_to_rgb_jpeg"] == [CMYK, PNG]
        validation = stored(tmp_path / "out", "val")
        assert sorted(validation.values()) == sorted(
            (content, name.split("/")[1])
            for name, content in FILES.items()
            if name.startswith("val")
        )
        assert [shard.images for shard in manifest.splits["train"]] == [4, 4, 4]
        preparing.verify(tmp_path / "out")

    def test_splits_of_other_names(self, tmp_path):
        """A second call with more of them keeps what is finished; none is lost in silence."""
        tree = write_tree(tmp_path / "in", {f.replace("val/", "dev/"): c for f, c in FILES.items()})
        shutil.copytree(tree / "dev", tree / "test")
        out = tmp_path / "out"
        found = inputs.find(tree, splits=["train", "dev"])
        manifest = preparing.prepare(found, out, preparing.Settings())
        assert "eval_split=dev" in preparing.training_command(manifest, out)
        with pytest.raises(ValueError, match=r"splits train, dev; .*=test,train,dev"):
            preparing.prepare(inputs.find(tree, splits=["test"]), out, preparing.Settings())
        times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.array_record")}
        found = inputs.find(tree, splits=["train", "dev", "test"])
        preparing.prepare(found, out, preparing.Settings())
        kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.array_record")}
        assert times.items() < kept.items()
        settings = DataSettings(source=f"records:{out}", train_size=8, eval_split="test")
        data = load(settings)
        assert len(data.evaluation) == sum(name.startswith("val") for name in FILES)
        with pytest.raises(ValueError, match=r"no split 'val', but train, dev, test"):
            load(DataSettings(source=f"records:{out}", train_size=8))
        for shard in out.glob("train*.array_record"):
            shard.unlink()
        alone = load(settings, training=False)
        assert len(alone.train) == len(alone.evaluation) == len(data.evaluation)
        with pytest.raises(ValueError, match="shards missing"):
            load(settings)

    def test_names_that_are_not_utf8(self, tmp_path):
        kind, name = os.fsdecode(b"caf\xe9"), os.fsdecode(b"1\xff.JPEG")
        files = {f"{split}/{kind}/{name}": FILES[PNG] for split in ("train", "val")}
        prepare(write_tree(tmp_path / "in", files), tmp_path / "out")
        assert stored(tmp_path / "out").keys() == {f"train/{kind}/{name}"}
        assert records.Manifest.read(tmp_path / "out").classes == (kind,)
        preparing.verify(tmp_path / "out")

    def test_pairs_whose_names_are_not_utf8(self):
        pair = {"encoded": b"i", "mask": b"m", "name": "i\udcff", "mask_name": "m\udce9"}
        assert records.unpack(records.pack_pair(**pair)) == pair

    def test_a_test_set_alone(self, tmp_path):
        tree = write_tree(tmp_path / "in", FILES)
        (tree / "val").rename(tree / "test")
        shutil.rmtree(tree / "train")
        found = inputs.find(tree, splits=["test"])
        manifest = preparing.prepare(found, tmp_path / "out", preparing.Settings())
        command = preparing.training_command(manifest, tmp_path / "out")
        assert "--eval_only" in command
        assert "eval_split=test" in command
        settings = DataSettings(
            source=f"records:{tmp_path / 'out'}", train_size=8, eval_split="test"
        )
        assert load(settings, training=False).classes == ("n01", "n02", "n03")
        with pytest.raises(ValueError, match="no split 'train', but test"):
            load(settings)

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("splits", [], "splits"),
            ("splits", {"train": {"file": "a"}}, "train"),
            ("splits", {"train": [{"file": 1, "images": 1, "bytes": 1, "sha256": ""}]}, "file=1"),
            ("splits", {"train": [{"file": "/a", "images": 1, "bytes": 1, "sha256": ""}]}, "outs"),
            ("classes", "abc", "classes"),
            ("classes", [1], "classes"),
            ("version", 9, "version 9"),
        ],
    )
    def test_a_damaged_manifest(self, tmp_path, key, value, message):
        content = {"version": 1, "classes": ["a"], "splits": {}, "details": {}} | {key: value}
        (tmp_path / records.MANIFEST).write_text(json.dumps(content))
        with pytest.raises(ValueError, match=rf"manifest\.json cannot be read: .*{message}"):
            records.Manifest.read(tmp_path)

    @pytest.mark.parametrize("splits", [[""], ["a/b"], [".."], ["test", "test"], []])
    def test_names_that_are_no_splits(self, tmp_path, splits):
        with pytest.raises(ValueError, match="--splits="):
            inputs.find(tmp_path, splits=splits)

    def test_smaller(self, tmp_path):
        encoding = Encoding(short_side=40, quality=90)
        prepare(write_tree(tmp_path / "in", FILES), tmp_path / "out", encoding=encoding)
        for name, (content, _) in stored(tmp_path / "out").items():
            height, width = pixels(FILES[name]).shape[:2]
            scale = 40 / min(height, width)
            expected = Image.fromarray(pixels(FILES[name])).resize(
                (round(width * scale), round(height * scale)), Image.Resampling.BILINEAR
            )
            expected = pixels(encoded(expected, quality=90))
            assert np.abs(pixels(content).astype(int) - expected).mean() < 0.5
            assert min(pixels(content).shape[:2]) == 40

    def test_raw_pixels_are_those_of_the_images(self, tmp_path, messages):
        """With the estimate of the room they take, and with damage found."""
        tree = write_tree(tmp_path / "in", FILES)
        small = Encoding(short_side=24, store="raw")
        prepare(tree, tmp_path / "out", encoding=small)
        for name, (content, _) in stored(tmp_path / "out").items():
            found = Decoder()(content)
            np.testing.assert_array_equal(found, Decoder()(small.apply(FILES[name])))
            np.testing.assert_array_equal(found, np.asarray(Image.open(io.BytesIO(content))))
            assert min(found.shape[:2]) <= 24
            assert found.shape[2] == 3
            with pytest.raises(ValueError, match="truncated"):
                Decoder()(content[:-1])
        preparing.verify(tmp_path / "out", processes=1)
        estimated = preparing.estimate_imagenet(Encoding(256, store="raw"), 2048)
        # 256x341 pixels of three bytes, and little else.
        assert 1 < estimated / (1_331_167 * 256 * 341 * 3) < 1.1

    def test_shards_from_before_there_was_raw_are_kept(self, tmp_path):
        tree = write_tree(tmp_path / "in", FILES)
        job = preparing._jobs(inputs.find(tree), "train", tmp_path, preparing.Settings())[0]
        names = [[item.name, item.label, item.size] for item in job.items]
        decoder = {"max_pixels": 178_956_970, "background": (255, 255, 255), "white": 0.0}
        before = {"short_side": 0, "quality": 95, "decoder": decoder}
        text = json.dumps([records.VERSION, before, names])
        assert job.fingerprint == hashlib.sha256(text.encode()).hexdigest()

    def test_images_never_grow(self, tmp_path):
        encoding = Encoding(short_side=400)
        prepare(write_tree(tmp_path / "in", FILES), tmp_path / "out", encoding=encoding)
        name = "train/n01/n01_000.JPEG"
        assert stored(tmp_path / "out")[name][0] == FILES[name]

    def test_finished_shards_are_kept_and_the_others_written(self, tmp_path, messages):
        source, output = write_tree(tmp_path / "in", FILES), tmp_path / "out"
        prepare(source, output)
        assert "train: 12 images of 3 classes" in messages()
        kept, lost, cut = sorted(output.glob("train*.array_record"))
        before = {path.name: path.read_bytes() for path in (kept, lost, cut)}
        stamp = kept.stat().st_mtime_ns
        lost.unlink()
        cut.write_bytes(cut.read_bytes()[:100])
        (output / ".train-00001-of-00003.0123abcd.array_record").write_bytes(b"half")
        prepare(source, output)
        assert "3 of 5 shards" in messages()
        assert kept.stat().st_mtime_ns == stamp
        assert set(stored(output)) == {n for n in FILES if n.startswith("train")}
        assert not list(output.glob(".*"))
        assert {path.name for path in output.glob("train*.array_record")} == set(before)

    def test_another_encoding_starts_again(self, tmp_path, messages):
        source, output = write_tree(tmp_path / "in", FILES), tmp_path / "out"
        prepare(source, output)
        messages()
        prepare(source, output, encoding=Encoding(short_side=30))
        assert "0 of 5 shards" in messages()
        assert {min(pixels(content).shape[:2]) for content, _ in stored(output).values()} == {30}

    def test_undecodable_images_stop_it_or_are_left_out_and_named(self, tmp_path, messages):
        bad = "train/n01/n01_006.JPEG"
        source = write_tree(tmp_path / "in", FILES | {bad: damaged(FILES[bad])})
        with pytest.raises(ValueError, match=f"1 image .*{bad}: .*--max_bad=1"):
            prepare(source, tmp_path / "out")
        assert not (tmp_path / "out" / "manifest.json").exists()
        manifest = prepare(source, tmp_path / "out", max_bad=1)
        assert bad not in stored(tmp_path / "out")
        assert len(stored(tmp_path / "out")) == 11
        assert manifest.details["bad"][0].startswith(bad)
        assert f"left out: {bad}" in messages()

    def test_a_disk_that_is_too_small(self, tmp_path, monkeypatch):
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 0, 10_000))
        with pytest.raises(ValueError, match=r"0\.01 MB free, about 0\.\d+ MB .*256"):
            prepare(write_tree(tmp_path / "in", FILES), tmp_path / "out")

    def test_the_estimate_is_what_it_takes(self, tmp_path, messages):
        source = write_tree(tmp_path / "in", FILES)
        for encoding in (Encoding(), Encoding(short_side=40, quality=90)):
            output = tmp_path / f"{encoding.short_side}"
            prepare(source, output, encoding=encoding)
            estimate = float(re.search(r"take about ([\d.]+) MB", messages())[1]) * 1e6
            taken = sum(path.stat().st_size for path in output.glob("*.array_record"))
            assert taken <= estimate < taken + 5 * preparing.SHARD_OVERHEAD

    def test_verifying_finds_a_flipped_bit(self, tmp_path):
        prepare(write_tree(tmp_path / "in", FILES), tmp_path / "out")
        shard = tmp_path / "out" / "train-00002-of-00003.array_record"
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 4
        shard.write_bytes(content)
        with pytest.raises(ValueError, match=r"1 of 5 shards .*train-00002.* checksum"):
            preparing.verify(tmp_path / "out")
        with pytest.raises(ValueError, match=r"damaged .*--verify="):
            stored(tmp_path / "out")


@pytest.mark.usefixtures("in_process")
class TestOtherData:
    """Files that are no images, and directories that hold something else."""

    def test_what_cannot_be_read_is_a_bad_image(self, tmp_path):
        source = write_tree(tmp_path / "in", FILES)
        place = source / "train" / "n02"
        os.mkfifo(place / "a_pipe.jpg")
        (place / "b_lost.png").symlink_to(tmp_path / "nothing")
        (place / "c_null.jpg").symlink_to("/dev/null")
        (place / "d_empty.jpg").touch()
        inner = place / "e_folder.jpg"
        inner.mkdir()
        (inner / "photo.jpg").write_bytes(FILES[PNG])
        with pytest.raises(ValueError, match=r"a_pipe\.jpg.*--max_bad="):
            prepare(source, tmp_path / "out", encoding=Encoding(short_side=30))
        manifest = prepare(source, tmp_path / "out", max_bad=4)
        bad = [line.partition(":")[0].rpartition("/")[2] for line in manifest.details["bad"]]
        assert bad == ["a_pipe.jpg", "b_lost.png", "c_null.jpg", "d_empty.jpg"]
        assert len(stored(tmp_path / "out")) == 13
        assert "train/n02/e_folder.jpg/photo.jpg" in stored(tmp_path / "out")

    @pytest.mark.parametrize("name", ["notes.txt", "train/n01/a.jpg", "train-1.array_record"])
    def test_an_output_with_other_files_is_left_alone(self, tmp_path, name):
        source, output = write_tree(tmp_path / "in", FILES), tmp_path / "out"
        write_tree(output, {name: b"precious"})
        with pytest.raises(ValueError, match=rf"--output=.*{name.partition('/')[0]}"):
            prepare(source, output)
        assert (output / name).read_bytes() == b"precious"
        assert len(list(output.iterdir())) == 1

    def test_another_data_set_is_not_replaced(self, tmp_path):
        output = tmp_path / "out"
        prepare(write_tree(tmp_path / "in", FILES), output)
        before = stored(output)
        renamed = {name.replace("n03", "n04"): content for name, content in FILES.items()}
        with pytest.raises(ValueError, match=r"another data set, of 3 classes .*n03.* 3 .*n04"):
            prepare(write_tree(tmp_path / "other", renamed), output)
        assert stored(output) == before
        with pytest.raises(ValueError, match="not a directory"):
            prepare(tmp_path / "in", output / records.MANIFEST)

    def test_shards_of_an_earlier_size_are_removed(self, tmp_path):
        source, output = write_tree(tmp_path / "in", FILES), tmp_path / "out"
        prepare(source, output)
        prepare(source, output, shard_images=12)
        left = sorted(path.name for path in output.glob("*.array_record"))
        assert left == [f"{split}-00000-of-00001.array_record" for split in ("train", "val")]
        assert len(stored(output)) == 12

    def test_classes_without_images_need_to_be_allowed(self, tmp_path):
        source = write_tree(tmp_path / "in", FILES)
        (source / "train" / "n00").mkdir()
        found = inputs.find(source, allow_empty=True)
        assert found.classes == ("n00", "n01", "n02", "n03")
        config = preparing.Settings(shard_images=4)
        assert preparing.prepare(found, tmp_path / "out", config).classes == found.classes
        with pytest.raises(ValueError, match=r"n00.*allow_empty"):
            inputs.find(source)

    def test_what_it_says_next_is_a_run(self, tmp_path):
        """With the recipe that it names, whatever the number of classes and images."""
        from configs import b1
        from repvgg_jax.train.experiment import Experiment

        output = tmp_path / "my out"
        manifest = prepare(write_tree(tmp_path / "in", FILES), output)
        words = shlex.split(preparing.training_command(manifest, output))
        assert words[:4] == ["python", "train.py", "--config", "configs/b1.py"]
        config = b1.get_config()
        for word in words[4:]:
            name, _, value = word.removeprefix("--config.").partition("=")
            with config.unlocked():
                config.update_from_flattened_dict({name: value if ":" in value else int(value)})
        run = Experiment.from_config(config)
        assert (run.steps_per_epoch, run.dataset.classes) == (1, manifest.classes)

    def test_deep_and_transparent_images_and_the_first_of_several(self, tmp_path, messages):
        ramp = np.linspace(0, 65535, 40 * 50).reshape(40, 50).astype(np.uint16)
        clear = photo(1, 40, 50).convert("RGBA")
        clear.putalpha(0)
        pages = [photo(number, 40, 50).quantize(9) for number in range(2)]
        special = {
            "train/n01/deep.png": encoded(Image.fromarray(ramp), "PNG"),
            "train/n02/clear.png": encoded(clear, "PNG"),
            "train/n03/pages.gif": encoded(pages[0], "GIF", save_all=True, append_images=pages[1:]),
        }
        source = write_tree(tmp_path / "in", FILES | special)
        encoding = Encoding(quality=100, decoder=Decoder(background=(0, 200, 0)))
        prepare(source, tmp_path / "out", encoding=encoding)
        assert re.search(r"1 file with several .*pages\.gif", messages())
        deep, clear, page = (pixels(stored(tmp_path / "out")[name][0]) for name in special)
        assert np.abs(deep.astype(int) - (ramp // 257)[..., None]).max() <= 2
        assert np.abs(clear.astype(int) - [0, 200, 0]).max() <= 2
        assert np.abs(page.astype(int) - np.asarray(pages[0].convert("RGB"))).mean() < 6


class TestInputs:
    def test_all_that_is_missing_is_named(self, tmp_path):
        with pytest.raises(ValueError, match=r"img_train.tar.*img_val.tar.*devkit_t12.*val_labels"):
            inputs.find(tmp_path)
        write_tars(tmp_path, FILES)
        (tmp_path / "ILSVRC2012_img_val.tar").unlink()
        with pytest.raises(ValueError, match=r"missing: ILSVRC2012_img_val\.tar \(6\.3 GB"):
            inputs.find(tmp_path)

    def test_no_directory(self, tmp_path):
        with pytest.raises(ValueError, match=r"--source=.*/none is not a directory"):
            inputs.find(tmp_path / "none")

    def test_a_tar_that_was_not_downloaded_whole(self, tmp_path):
        path = write_tars(tmp_path, FILES) / "ILSVRC2012_img_train.tar"
        path.write_bytes(path.read_bytes()[:30_000])
        with pytest.raises(ValueError, match=r"img_train\.tar .*not downloaded completely"):
            inputs.find(tmp_path)

    def test_labels_that_do_not_fit(self, tmp_path):
        labels = write_tars(tmp_path, FILES) / "val_labels.txt"
        labels.write_text("n01\nn02\n")
        with pytest.raises(ValueError, match=r"\b5 images.* 2 labels"):
            inputs.find(tmp_path)
        labels.write_text("n01 n02 n03 n01 n09")
        with pytest.raises(ValueError, match=r"img_train\.tar lacks: n09"):
            inputs.find(tmp_path)

    def test_labels_of_the_development_kit(self, tmp_path):
        from scipy.io import savemat

        write_tars(tmp_path, FILES)
        expected = inputs.find(tmp_path).splits["val"]
        (tmp_path / "val_labels.txt").unlink()
        synsets = np.zeros(3, [("ILSVRC2012_ID", "i4"), ("WNID", "O")])
        synsets["ILSVRC2012_ID"], synsets["WNID"] = [3, 1, 2], ["n01", "n02", "n03"]
        meta = io.BytesIO()
        savemat(meta, {"synsets": synsets})
        truth = "\n".join(str({0: 3, 1: 1, 2: 2}[i % 3]) for i in range(5)).encode()
        with tarfile.open(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
            for name, content in (
                ("meta.mat", meta.getvalue()),
                ("ILSVRC2012_validation_ground_truth.txt", truth),
            ):
                member = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/data/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        assert inputs.find(tmp_path).splits["val"] == expected

    def write_devkit(self, root, mode="w:gz", **files):
        """Files by name; None is a link to a file elsewhere."""
        write_tars(root, FILES)
        (root / "val_labels.txt").unlink()
        with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", mode) as tar:
            for name, content in files.items():
                member = tarfile.TarInfo(f"devkit/data/{name.replace('_mat', '.mat')}")
                member.size = len(content or b"")
                if content is None:
                    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(member, io.BytesIO(content or b""))
        return root / "ILSVRC2012_devkit_t12.tar.gz"

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({}, r"lacks meta\.mat and ILSVRC2012_val"),
            ({"meta_mat": None}, r"meta\.mat .*not a file"),
            ({"meta_mat": b"rubbish" * 99}, r"lacks ILSVRC2012_val"),
            (
                {"meta_mat": b"rubbish" * 99, "ILSVRC2012_validation_ground_truth.txt": b"1"},
                r"damaged.*val_labels",
            ),
        ],
    )
    @pytest.mark.parametrize("mode", ["w:gz", "w"])
    def test_other_development_kits(self, tmp_path, files, message, mode):
        self.write_devkit(tmp_path, mode, **files)
        with pytest.raises(ValueError, match=rf"devkit_t12\.tar\.gz.*{message}"):
            inputs.find(tmp_path)

    @pytest.mark.parametrize("cut", [0, 20, 200, -9])
    def test_a_development_kit_that_was_cut_short(self, tmp_path, cut):
        noise = np.random.default_rng(0).bytes(3000)
        path = self.write_devkit(tmp_path, meta_mat=noise)
        path.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(ValueError, match=r"devkit_t12.*(download it again)"):
            inputs.find(tmp_path)
        path.write_bytes(b"no archive")
        with pytest.raises(ValueError, match=r"devkit_t12.*not downloaded completely"):
            inputs.find(tmp_path)


@pytest.mark.system
class TestCommand:
    """`python -m repvgg_jax.data.prepare`, with workers of its own."""

    @pytest.mark.slow
    def test_prepares_and_verifies(self, tmp_path):
        source, output = write_tars(tmp_path / "in", FILES), tmp_path / "out"
        status, out, err = run(
            f"--source={source}", f"--output={output}", "--shard_images=5", "--processes=2"
        )
        assert (status, err) == (0, "")
        assert f"--config.data.source=records:{output}" in out
        manifest = json.loads((output / records.MANIFEST).read_text())
        assert manifest["classes"] == ["n01", "n02", "n03"]
        assert len(stored(output)) == 12
        status, _, err = run(f"--source={source}", f"--output={output}", "--background=1,red,3")
        assert (status, "background=('1', 'red', '3')" in err) == (1, True)
        status, out, err = run(f"--verify={output}", "--processes=1")
        assert (status, err) == (0, "")
        assert "every image can be decoded" in out

    @pytest.mark.usefixtures("in_process")
    def test_a_full_disk_is_one_line_and_a_second_call_continues(self, tmp_path):
        source, output = write_tars(tmp_path / "in", FILES), tmp_path / "out"
        # No file may grow beyond 64 KiB, as if the disk were full then.
        full = ("bash", "-c", 'ulimit -f 64; exec "$@"', "-")
        status, _, err = run(
            f"--source={source}", f"--output={output}", "--processes=1", through=full
        )
        assert status == 1
        assert re.match(r"error: .*/out/\w+-00000-of-00001\.array_record .*disk", err)
        assert err.count("\n") == 1
        assert list(output.iterdir()) == []
        prepare(source, output)
        assert len(stored(output)) == 12

    @pytest.mark.usefixtures("in_process")
    def test_a_worker_that_dies_is_one_line_and_a_second_call_continues(self, tmp_path, messages):
        source, output = write_tars(tmp_path / "in", FILES), tmp_path / "out"
        killer = """
import os, signal, sys
from repvgg_jax import cli
from repvgg_jax.data.prepare import __main__ as command
from repvgg_jax.data.prepare import shards

def die(path, digests, verify=shards._verify):
    if "train-00001" in path.name:
        os.kill(os.getpid(), signal.SIGKILL)
    verify(path, digests)

shards._verify = die  # in the workers, too: each runs this file
if __name__ == "__main__":
    cli.run(command.main)
"""
        (tmp_path / "killer.py").write_text(killer)
        arguments = [f"--source={source}", f"--output={output}", "--shard_images=6"]
        done = subprocess.run(
            [sys.executable, str(tmp_path / "killer.py"), *arguments, "--processes=1"],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 1
        assert re.fullmatch(r"error: .*worker process died.*--processes.*\n", done.stderr)
        left = {path.name for path in output.iterdir()}
        first = "train-00000-of-00002.array_record"
        assert left == {first, f"{first}.done.json"}
        prepare(source, output, shard_images=6)
        assert "1 of 3 shards" in messages()
        assert len(stored(output)) == 12

    def test_what_is_missing_and_the_space_it_needs_are_one_line(self, tmp_path):
        write_tars(tmp_path, FILES)
        (tmp_path / "ILSVRC2012_img_val.tar").unlink()
        status, _, err = run(
            f"--source={tmp_path}", f"--output={tmp_path}/a/b", "--short_side=256", "--quality=90"
        )
        assert status == 1
        assert err.count("\n") == 1
        message = (
            rf"error: .*img_val\.tar \(6\.3 GB.*--short_side=256.* ([\d.]+) GB,.* {tmp_path}/a/b\n"
        )
        assert 30 < float(re.fullmatch(message, err)[1]) < 60
        assert not (tmp_path / "a").exists()
        assert 144e9 < preparing.estimate_imagenet(Encoding(), 2048) < 160e9
