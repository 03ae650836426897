"""Preparing stores what it was given, also after it failed in between."""

import io
import json
import logging
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections import namedtuple

import numpy as np
import pytest
from PIL import Image

from repvgg_jax.data import records
from repvgg_jax.data.dataset import load
from repvgg_jax.data.images import is_plain_jpeg
from repvgg_jax.data.prepare import inputs
from repvgg_jax.data.prepare import prepare as preparing
from repvgg_jax.data.prepare.shards import Encoding
from repvgg_jax.data.settings import DataSettings
from tests.helpers.pictures import damaged, encoded, images, pixels, write_tars, write_tree

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

    class Pool:
        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *_: None  # noqa: E731
        shutdown = lambda self, **_: None  # noqa: E731

        def submit(self, work, *arguments):
            import concurrent.futures

            future = concurrent.futures.Future()
            try:
                future.set_result(work(*arguments))
            except Exception as error:
                future.set_exception(error)
            return future

    monkeypatch.setattr(preparing, "_pool", lambda processes: Pool())


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
        import tarfile

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


@pytest.mark.system
class TestCommand:
    """`python -m repvgg_jax.data.prepare`, with workers of its own."""

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
