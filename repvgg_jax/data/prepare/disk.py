"""Disk space: an estimate of what shards will take, and what is free."""

import io
import pathlib
import random
import shutil
from collections.abc import Iterable, Sequence

from PIL import Image

from repvgg_jax.data import photos
from repvgg_jax.data.decode import UndecodableError
from repvgg_jax.data.prepare.shards import Encoding, Job

IMAGENET = {"train": 1_281_167, "val": 50_000}
"""Number of images by split."""
IMAGENET_BYTES = 144e9  # of all its files
IMAGENET_SHAPE, IMAGENET_QUALITY = (500, 375), 95  # usual ones, width first
SAMPLE = 64  # images that are encoded for the estimate
MARGIN = 1.05  # of the estimate over the sample's mean
RECORD = 256  # bytes of a record's name, label and index
SHARD = 1 << 17  # bytes of a shard's index, and of the padding of its last block


def estimate(jobs: Sequence[Job]) -> float:
    """Bytes that these shards will take, estimated from a sample of their images.

    Raises:
      OSError: an image cannot be read.
    """
    items = [item for job in jobs for item in job.items]
    if not items:
        return 0.0
    sample = random.Random(0).sample(items, min(SAMPLE, len(items)))
    encoding = jobs[0].encoding
    ratio = _ratio(encoding, (item.read() for item in sample)) if encoding.short_side else 1.0
    return _total(sum(item.size for item in items) * ratio, len(items), len(jobs))


def estimate_imagenet(encoding: Encoding, shard_images: int) -> float:
    """Bytes that all of ImageNet will take, estimated without it from two photographs."""
    ratio = _ratio(encoding, _photographs()) if encoding.short_side else 1.0
    shards = sum(-(-images // shard_images) for images in IMAGENET.values())
    return _total(IMAGENET_BYTES * ratio, sum(IMAGENET.values()), shards)


def free(directory: pathlib.Path) -> int:
    """Free bytes on the disk of a directory, which need not exist yet."""
    directory = directory.absolute()
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    return shutil.disk_usage(existing).free


def format_bytes(count: float) -> str:
    """E.g. `1.5 GB` or `0.25 MB`."""
    return f"{count / 1e9:,.1f} GB" if count > 1e8 else f"{count / 1e6:,.2f} MB"


def _total(content: float, images: int, shards: int) -> float:
    return content * MARGIN + RECORD * images + SHARD * shards


def _ratio(encoding: Encoding, contents: Iterable[bytes]) -> float:
    before = after = 1
    for content in contents:
        try:
            stored = encoding.apply(content)
        except UndecodableError:
            continue
        before, after = before + len(content), after + len(stored)
    return after / before


def _photographs() -> list[bytes]:
    encoded = []
    for crop in photos.crops(IMAGENET_SHAPE[1], 2):
        file = io.BytesIO()
        photograph = Image.fromarray(crop).resize(IMAGENET_SHAPE, Image.Resampling.BICUBIC)
        photograph.save(file, "JPEG", quality=IMAGENET_QUALITY)
        encoded.append(file.getvalue())
    return encoded
