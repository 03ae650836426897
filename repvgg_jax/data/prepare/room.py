"""How much room shards take on a disk, foretold before they are written, and how much there is."""

import io
import pathlib
import random
import shutil
from collections.abc import Iterable, Sequence

from PIL import Image

from repvgg_jax.data import photos
from repvgg_jax.data.decoding import UndecodableError
from repvgg_jax.data.prepare.shards import Form, Job

IMAGENET = {"train": 1_281_167, "val": 50_000}
IMAGENET_BYTES = 144e9  # of all its files
IMAGENET_SHAPE, IMAGENET_QUALITY = (500, 375), 95  # usual ones, width first
SAMPLE = 64  # images whose size after encoding anew foretells the others'
SPARE = 1.05  # of the room foretold, to be sure
RECORD = 256  # bytes of a record's name, label and index
SHARD = 1 << 17  # bytes of a shard's own: an index, and what fills up its last block


def of_jobs(jobs: Sequence[Job]) -> float:
    """Bytes that these shards will take, foretold from some of their images.

    Raises:
      OSError: an image cannot be read.
    """
    items = [item for job in jobs for item in job.items]
    if not items:
        return 0.0
    sample = random.Random(0).sample(items, min(SAMPLE, len(items)))
    form = jobs[0].form
    share = _share(form, (item.read() for item in sample)) if form.short_side else 1.0
    return _total(sum(item.size for item in items) * share, len(items), len(jobs))


def of_imagenet(form: Form, shard_images: int) -> float:
    """Bytes that all of ImageNet will take in a form, foretold without it from two photographs."""
    share = _share(form, _photographs()) if form.short_side else 1.0
    shards = sum(-(-images // shard_images) for images in IMAGENET.values())
    return _total(IMAGENET_BYTES * share, sum(IMAGENET.values()), shards)


def free(place: pathlib.Path) -> int:
    """Bytes that are free where a directory is, or would be."""
    place = place.absolute()
    return shutil.disk_usage(next(p for p in (place, *place.parents) if p.exists())).free


def text(count: float) -> str:
    """A number of bytes, for a person."""
    return f"{count / 1e9:,.1f} GB" if count > 1e8 else f"{count / 1e6:,.2f} MB"


def _total(content: float, images: int, shards: int) -> float:
    return content * SPARE + RECORD * images + SHARD * shards


def _share(form: Form, contents: Iterable[bytes]) -> float:
    before = after = 1
    for content in contents:
        try:
            stored = form.apply(content)
        except UndecodableError:
            continue
        before, after = before + len(content), after + len(stored)
    return after / before


def _photographs() -> list[bytes]:
    files = []
    for crop in photos.crops(IMAGENET_SHAPE[1], 2):
        file = io.BytesIO()
        photograph = Image.fromarray(crop).resize(IMAGENET_SHAPE, Image.Resampling.BICUBIC)
        photograph.save(file, "JPEG", quality=IMAGENET_QUALITY)
        files.append(file.getvalue())
    return files
