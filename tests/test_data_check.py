"""What `python -m repvgg_jax.data.check` says of a data set."""

import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from repvgg_jax.data.dataset import decoder_of, load
from repvgg_jax.data.settings import DataSettings
from repvgg_jax.data.survey import problem_lines, survey
from tests.helpers.pictures import damaged, encoded, images, photo, write_records, write_tree

FILES = images()


def report(root, **changes):
    settings = DataSettings(source=f"folder:{root}", train_size=8, allow_empty=True, **changes)
    return survey(load(settings), decoder=decoder_of(settings), threads=2)


def text(found):
    return "\n".join(found.lines)


def test_sound_data(tmp_path):
    found = report(write_tree(tmp_path, FILES))
    assert found.problems == ()
    assert "train: 12 images, 0 unreadable" in text(found)
    assert "smallest 50x90, median " in text(found)
    assert "JPEG RGB: 9" in text(found)
    assert all(f"{kind}: 1" in text(found) for kind in ("JPEG CMYK", "PNG RGB", "JPEG L"))
    rows = [line.split() for line in found.lines if line.startswith("n0")]
    assert rows == [["n01", "4", "2"], ["n02", "4", "2"], ["n03", "4", "1"]]


def test_everything_that_would_stop_a_run_is_named(tmp_path):
    bad = {
        "train/n02/broken.jpg": damaged(FILES["train/n02/n02_007.JPEG"]),
        "val/n01/empty.png": b"",
        "val/n03/postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0",
        "train/n01/large.png": encoded(photo(0, 99, 99), "PNG"),
    }
    root = write_tree(tmp_path, FILES | bad)
    (root / "train" / "n00").mkdir()
    (root / "train" / "n01" / "lost.gif").symlink_to("nothing")
    found = report(root, max_pixels=9800)
    for name in (*bad, "train/n01/lost.gif"):
        (line,) = (line for line in found.problems if name.rpartition("/")[2] in line)
        assert line.startswith(f"{name.partition('/')[0]} image ")
        assert len(line.partition(": ")[2]) > 3
    assert "train: no images of class n00" in found.problems
    assert len(found.problems) == 7  # two of n00
    assert problem_lines(found.problems) == list(found.problems)
    assert problem_lines(["x"] * 500)[-1] == "and 480 more"


def test_what_is_unusual_is_counted(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    clear = photo(1).convert("RGBA")
    clear.putalpha(9)
    frames = [photo(number).quantize(8) for number in range(2)]
    dark = np.full((9, 9), 4000, np.uint16)
    unusual = {
        "train/n01/turned.jpg": encoded(photo(0), exif=exif),
        "train/n01/clear.png": encoded(clear, "PNG"),
        "train/n01/moving.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "train/n01/dark.png": encoded(Image.fromarray(dark), "PNG"),
        "val/n01/leak.jpg": FILES["train/n01/n01_006.JPEG"],
    }
    found = report(write_tree(tmp_path, FILES | unusual))
    assert found.problems == ()
    for name, words in (
        ("turned", "1 turned .*EXIF"),
        ("clear", "1 with transparency"),
        ("moving", "1 of several"),
        ("dark", "1 of more than 8 bits"),
        ("leak", "1 image of val .*train"),
    ):
        (line,) = (line for line in found.lines if name in line)
        assert re.search(words, line)


def test_other_sources():
    settings = DataSettings(source="digits")
    found = survey(load(settings), decoder=decoder_of(settings), threads=1)
    assert found.problems == ()
    assert "train: 1,437 images" in text(found)
    assert "array: 1,437" in text(found)


@pytest.mark.system
def test_the_command(tmp_path):
    bad = "train/n02/n02_004.JPEG"
    root = write_records(tmp_path / "r", FILES | {bad: damaged(FILES[bad])})
    command = [sys.executable, "-m", "repvgg_jax.data.check"]
    done = subprocess.run(
        [*command, f"--source=records:{root}"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert f"would stop a run (1):\n  train image {bad}: " in done.stdout
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: give --source")
