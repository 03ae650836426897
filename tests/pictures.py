"""Data sets for tests: real photographs as JPEG files, and awkward files among them."""

import io
import pathlib
import tarfile

import numpy as np
from PIL import Image

from repvgg_jax.data import photos
from repvgg_jax.data.dataset import Dataset
from repvgg_jax.data.source import Source
from repvgg_jax.train.config import default_config

CLASSES = ("n01", "n02", "n03")


def in_memory(source: Source, **changes) -> Dataset:
    """A data set whose training and held-out images are the same, shown as they are."""
    shape = source[0]["image"].shape
    return Dataset("test", source, source, shape, shape, ("a", "b"), **changes)


def settings(source: str, **changes):
    """`config.data` of a source."""
    config = default_config().data
    config.source = source
    config.update(changes)
    return config


def photo(number: int, height: int = 60, width: int = 80) -> Image.Image:
    """A piece of a photograph, another one for every number."""
    crop = photos.crops(120 + 10 * (number % 9), 16)[number % 16]
    return Image.fromarray(crop).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    """An image as a file's bytes."""
    file = io.BytesIO()
    image.save(file, form, **({"quality": 92} | options if form == "JPEG" else options))
    return file.getvalue()


def images(train: int = 12, val: int = 5) -> dict[str, bytes]:
    """Files of a class-per-folder tree by path, all of class n01, n02, n03 in turn.

    The second of `train` is a CMYK JPEG and the third a PNG that is called JPEG, as ImageNet
    has them; the fourth is grey.
    """
    files = {}
    for split, count in (("train", train), ("val", val)):
        for i in range(count):
            picture = photo(i + 100 * (split == "val"), 50 + 3 * i, 90 - 2 * i)
            form = "JPEG"
            if split == "train" and i < 4:
                picture = picture.convert(("RGB", "CMYK", "RGB", "L")[i])
                form = "PNG" if i == 2 else "JPEG"
            name = f"{split}/{CLASSES[i % 3]}/{CLASSES[i % 3]}_{i:03}.JPEG"
            files[name] = encoded(picture, form)
    return files


def write_tree(root: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    """Writes files by path below `root`."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def damaged(content: bytes) -> bytes:
    """A JPEG whose second half is lost."""
    return content[: len(content) // 2]


def write_tars(root: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    """The same files as ImageNet is handed out: a tar of tars, a flat tar, a list of labels."""
    root.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for label in CLASSES:
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for name, content in files.items():
                    if name.startswith(f"train/{label}/"):
                        _add(tar, name.rpartition("/")[2], content)
            _add(outer, f"{label}.tar", inner.getvalue())
    val = [(name, content) for name, content in files.items() if name.startswith("val/")]
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as tar:
        for i, (_, content) in enumerate(val):
            _add(tar, f"ILSVRC2012_val_{i + 1:08}.JPEG", content)
    labels = [name.split("/")[1] for name, _ in val]
    (root / "val_labels.txt").write_text("\n".join(labels) + "\n")
    return root


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def pixels(content: bytes) -> np.ndarray:
    """What Pillow makes of a file: uint8 RGB."""
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
