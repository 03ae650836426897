"""Data sets for tests: photographs as JPEG files, unusual and damaged files among them."""

import functools
import io
import pathlib
import tarfile

import numpy as np
from PIL import Image

from repvgg_jax.data import records
from repvgg_jax.data.dataset import Dataset
from repvgg_jax.data.sources import Source, photo_crops

CLASSES = ("n01", "n02", "n03")

_crops = functools.cache(photo_crops)


def in_memory(source: Source, **changes) -> Dataset:
    """A data set whose training and validation images are the same, without crops."""
    shape = source[0]["image"].shape
    return Dataset("test", source, source, shape, shape, ("a", "b"), **changes)


def write_records(root: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    """The same files in two shards per split, as `prepare` leaves them."""
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


def photo(number: int, height: int = 60, width: int = 80) -> Image.Image:
    """A crop of a photograph, another one for every number."""
    crop = _crops(120 + 10 * (number % 9), 16)[number % 16]
    return Image.fromarray(crop).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, file_format: str = "JPEG", **options) -> bytes:
    """An image as a file's bytes."""
    file = io.BytesIO()
    options = {"quality": 92} | options if file_format == "JPEG" else options
    image.save(file, file_format, **options)
    return file.getvalue()


def images(train: int = 12, val: int = 5) -> dict[str, bytes]:
    """Files of a class-per-folder tree by path, all of class n01, n02, n03 in turn.

    The second of `train` is a CMYK JPEG and the third a PNG that is called JPEG, as in
    ImageNet; the fourth is gray.
    """
    files = {}
    for split, count in (("train", train), ("val", val)):
        for i in range(count):
            picture = photo(i + 100 * (split == "val"), 50 + 3 * i, 90 - 2 * i)
            file_format = "JPEG"
            if split == "train" and i < 4:
                picture = picture.convert(("RGB", "CMYK", "RGB", "L")[i])
                file_format = "PNG" if i == 2 else "JPEG"
            name = f"{split}/{CLASSES[i % 3]}/{CLASSES[i % 3]}_{i:03}.JPEG"
            files[name] = encoded(picture, file_format)
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
    """The same files as ImageNet's downloads: a tar of tars, a flat tar, a list of labels."""
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
    """The pixels of a file by Pillow: uint8 RGB."""
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
