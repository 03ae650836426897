"""Reads every image of a data set once: what there is, and what would stop a run."""

import collections
import concurrent.futures
import dataclasses
import hashlib
import itertools
from collections.abc import Sequence

import numpy as np
from PIL import ExifTags

from repvgg_jax.data.dataset import Dataset
from repvgg_jax.data.decoding import Decoder, open_image
from repvgg_jax.data.sources import Source
from repvgg_jax.data.transforms import FAILURES
from repvgg_jax.progress import progress
from repvgg_jax.segmentation.labels import IGNORE
from repvgg_jax.text import first_few, one_line, plural

_BLOCK = 256  # images that are handed to the threads at a time
_LISTED_CLASSES, _EXTREME_CLASSES = 50, 5
_LISTED_BAD = 20


@dataclasses.dataclass(frozen=True, slots=True)  # there may be millions
class Seen:
    """One image.

    Attributes:
      name: as in messages.
      label: number of its class; -1 if it cannot be read, or has a class per pixel.
      bad: why it cannot be read or decoded; empty if it can.
      kind: format and mode of the file, e.g. `JPEG RGB`.
      size: height and width in pixels.
      digest: of the file.
      notes: e.g. `turned by EXIF`.
      shown: numbers of the classes that its pixels have, if they have any.
    """

    name: str
    label: int
    bad: str = ""
    kind: str = ""
    size: tuple[int, int] = (0, 0)
    digest: bytes = b""
    notes: tuple[str, ...] = ()
    shown: tuple[int, ...] = ()


def look(source: Source, number: int, decoder: Decoder) -> Seen:
    """Reads and decodes an image."""
    name, label = f"number {number}", -1
    try:
        example = source[number]
        name, labels = example.get("name", name), np.asarray(example["label"])
        if "image" in example:
            pixels = np.asarray(example["image"])
            size, digest = pixels.shape[:2], _digest(pixels.tobytes())
            if labels.ndim:
                shown = tuple(np.unique(labels[labels != IGNORE]).tolist())
                return Seen(name, label, kind="pair", size=size, digest=digest, shown=shown)
            label = int(labels)
            return Seen(name, label, kind="array", size=size, digest=digest)
        label, encoded = int(labels), example["encoded"]
        pixels = decoder(encoded)
        with open_image(encoded, max_pixels=decoder.max_pixels) as image:
            kind = f"{image.format} {image.mode}"
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) not in (0, 1)
            clear = image.has_transparency_data
            dark = image.mode[0] in "IF" and pixels.max() < 32
        notes = {
            "turned upright by EXIF": turned,
            "with transparency, shown on config.data.background": clear,
            "of several pages or frames, of which the first is used": decoder.is_animated(encoded),
            "of more than 8 bits and nearly black, see config.data.white": dark,
        }
        found = tuple(note for note, holds in notes.items() if holds)
        return Seen(name, label, "", kind, pixels.shape[:2], _digest(encoded), found)
    except FAILURES as error:
        return Seen(name, label, bad=f"{name}: {one_line(error, 300)}")


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=8).digest()


@dataclasses.dataclass(frozen=True)
class Report:
    """What a survey found.

    Attributes:
      lines: to print.
      problems: what would stop a run, one line each; empty if nothing would.
    """

    lines: tuple[str, ...]
    problems: tuple[str, ...]


def survey(
    dataset: Dataset, *, decoder: Decoder, threads: int, allow_empty: bool = False
) -> Report:
    """Reads all images of a data set, and says what they are.

    Args:
      dataset: its images.
      decoder: as the run's.
      threads: that decode.
      allow_empty: whether classes without images are allowed.
    """
    splits = {
        "train": _read("train", dataset.train, decoder, threads),
        "val": _read("val", dataset.evaluation, decoder, threads),
    }
    lines: list[str] = []
    problems: list[str] = []
    for split, images in splits.items():
        lines += _describe(split, images)
        problems += [f"{split} image {seen.bad}" for seen in images if seen.bad]
    counts = {
        split: np.bincount(
            [label for seen in images for label in (seen.shown or (seen.label,)) if label >= 0],
            minlength=len(dataset.classes),
        )
        for split, images in splits.items()
    }
    lines += _class_table(dataset.classes, counts)
    for split, found in counts.items():
        empty = [dataset.classes[i] for i in np.flatnonzero(found == 0)]
        if empty and not allow_empty:
            problems.append(f"{split}: no images of class {first_few(empty)}")
    both = {seen.digest for seen in splits["train"] if not seen.bad} & {
        seen.digest for seen in splits["val"] if not seen.bad
    }
    if both:
        names = [seen.name for seen in splits["val"] if seen.digest in both and not seen.bad]
        lines.append(f"{plural(len(names), 'image')} of val also in train: {first_few(names)}")
    return Report(tuple(lines), tuple(problems))


def _read(split: str, source: Source, decoder: Decoder, threads: int) -> list[Seen]:
    found: list[Seen] = []
    with (
        progress(f"reading {split}", len(source)) as advance,
        concurrent.futures.ThreadPoolExecutor(threads) as pool,
    ):
        for first in range(0, len(source), _BLOCK):
            block = range(first, min(first + _BLOCK, len(source)))
            found += pool.map(look, itertools.repeat(source), block, itertools.repeat(decoder))
            advance(len(block))
    return found


def _describe(split: str, images: Sequence[Seen]) -> list[str]:
    good = [seen for seen in images if not seen.bad]
    lines = [f"{split}: {plural(len(images), 'image')}, {len(images) - len(good):,} unreadable"]
    if not good:
        return lines
    sizes = sorted((seen.size for seen in good), key=lambda size: size[0] * size[1])
    small, median, large = (
        "{}x{}".format(*sizes[index]) for index in (0, len(sizes) // 2, len(sizes) - 1)
    )
    lines.append(f"  height x width: smallest {small}, median {median}, largest {large}")
    kinds = collections.Counter(seen.kind for seen in good).most_common()
    lines.append("  " + ", ".join(f"{kind}: {count:,}" for kind, count in kinds))
    notes = collections.Counter(note for seen in good for note in seen.notes)
    for note, count in notes.items():
        names = [seen.name for seen in good if note in seen.notes]
        lines.append(f"  {count:,} {note}: {first_few(names, 3)}")
    return lines


def _class_table(classes: Sequence[str], counts: dict[str, np.ndarray]) -> list[str]:
    order = list(range(len(classes)))
    if len(order) > _LISTED_CLASSES:
        order = sorted(order, key=lambda label: int(counts["train"][label]))
        order = order[:_EXTREME_CLASSES] + order[-_EXTREME_CLASSES:]
    width = max(len(classes[label]) for label in order)
    lines = [f"{'class':<{width}} {'train':>9} {'val':>9}"]
    for position, label in enumerate(order):
        if len(classes) > _LISTED_CLASSES and position == _EXTREME_CLASSES:
            lines.append(f"… {len(classes) - len(order):,} classes between")
        train, val = (int(counts[split][label]) for split in ("train", "val"))
        lines.append(f"{classes[label]:<{width}} {train:>9,} {val:>9,}")
    return lines


def problem_lines(problems: Sequence[str]) -> list[str]:
    """The problems as lines to print, not too many."""
    more = len(problems) - _LISTED_BAD
    return [*problems[:_LISTED_BAD], *([f"and {more:,} more"] if more > 0 else [])]
