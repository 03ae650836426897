"""One shard: images in, a finished and verified ArrayRecord file out; runs in the workers."""

import dataclasses
import hashlib
import io
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from repvgg_jax import files
from repvgg_jax.data import records
from repvgg_jax.data.decoding import (
    MAX_BYTES,
    Decoder,
    UndecodableError,
    decode,
    is_plain_jpeg,
    is_raw,
    raw,
)
from repvgg_jax.data.images import resize
from repvgg_jax.data.masks import PairDecoder
from repvgg_jax.data.prepare.inputs import Item
from repvgg_jax.typed import typed

DONE = ".done.json"
JPEG_QUALITY = 95  # of images that are encoded again, by default


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How images are stored.

    Attributes:
      short_side: larger images are shrunk to it, in pixels; 0 keeps their size.
      quality: of JPEGs that are encoded again.
      decoder: of the files.
      store: "jpeg", or "raw" for pixels, which take several times the room and no time to decode.
    """

    short_side: int = 0
    quality: int = JPEG_QUALITY
    decoder: Decoder = decode
    store: str = "jpeg"

    @property
    def changes_size(self) -> bool:
        """Whether usual images are stored in other sizes than they have, in pixels or in bytes."""
        return self.short_side > 0 or self.store == "raw"

    def apply(self, content: bytes) -> bytes:
        """The bytes to store: `content` itself if it is a JPEG that needs no shrinking, or pixels.

        CMYK JPEGs, PNGs and others become RGB JPEGs. EXIF, which may turn an image, stays in JPEGs
        that are kept, and is applied in others.

        Raises:
          UndecodableError: the image is damaged.
        """
        pixels = self.decoder(content)
        smaller = self._smaller(pixels)
        if self.store == "jpeg" and smaller is None and is_plain_jpeg(content):
            return content
        return self._file(pixels if smaller is None else resize(pixels, *smaller))

    def apply_pair(self, pair: Mapping[str, Any], decoder: PairDecoder) -> tuple[bytes, bytes]:
        """The bytes to store of an image and of its mask, a PNG of labels.

        The image's are its file, whatever the format, unless it is shrunk or stored as pixels.
        Labels of a shrunk image are those of the nearest pixels.

        Args:
          pair: the two files, as `PairDecoder` takes them.
          decoder: of pairs.

        Raises:
          UndecodableError: one of them is damaged, or they do not fit.
        """
        decoded = decoder(pair)
        content, label = pair["encoded"], decoded["label"]
        smaller = self._smaller(label)
        if smaller is None and self.store == "raw":
            content = raw(decoded["image"])
        elif smaller is not None:
            content = self._file(resize(decoded["image"], *smaller))
            label = cv2.resize(label, smaller[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
        return content, _encoded(label, "PNG")

    def _smaller(self, pixels: np.ndarray) -> tuple[int, int] | None:
        """Height and width if an image is to be shrunk."""
        short = min(pixels.shape[:2])
        if not 0 < self.short_side < short:
            return None
        height, width = (round(length * self.short_side / short) for length in pixels.shape[:2])
        return height, width

    def _file(self, pixels: np.ndarray) -> bytes:
        if self.store == "raw":
            return raw(pixels)
        return _encoded(pixels, "JPEG", quality=self.quality)


def _encoded(pixels: np.ndarray, file_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, file_format, **options)
    return file.getvalue()


@dataclasses.dataclass(frozen=True)
class Job:
    """A shard to write.

    Attributes:
      path: of the finished file.
      items: its images.
      encoding: how they are stored.
      pairs: decoder of images with masks; None if images have one class each.
    """

    path: pathlib.Path
    items: tuple[Item, ...]
    encoding: Encoding
    pairs: PairDecoder | None = None

    @property
    def fingerprint(self) -> str:
        """Digest of the inputs: a finished shard of other inputs is written again."""
        content: list[Any] = [[item.name, item.label, item.size] for item in self.items]
        if self.pairs is not None:
            masks = [[item.mask_name, item.mask_size] for item in self.items]
            content += [masks, dataclasses.asdict(self.pairs)]
        encoding = dataclasses.asdict(self.encoding)
        if encoding["store"] == "jpeg":  # as before there was a choice
            del encoding["store"]
        text = json.dumps([records.VERSION, encoding, content])
        return hashlib.sha256(text.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Done:
    """The result of a job.

    Attributes:
      shard: the file.
      changed: names of images that were not RGB or gray JPEGs and now are.
      bad: names of images that cannot be read or decoded, with the reason; they are not in the
        file.
      animated: names of files of several pages or frames, of which the first is stored.
    """

    shard: records.Shard
    changed: tuple[str, ...]
    bad: tuple[str, ...]
    animated: tuple[str, ...] = ()


def finished(job: Job) -> Done | None:
    """The result of the same job in an earlier call, if its file is still complete."""
    note = job.path.with_name(job.path.name + DONE)
    try:
        content = files.read_json(note)
        shard = typed(records.Shard, content["shard"], "shard")
        whole = job.path.stat().st_size == shard.bytes
        same = content["fingerprint"] == job.fingerprint
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not whole or not same:
        return None
    names = (tuple(content.get(key, ())) for key in ("changed", "bad", "animated"))
    return Done(shard, *names)


def write(job: Job) -> Done:
    """Writes a shard atomically, and verifies it before it takes its name.

    Raises:
      OSError: the shard cannot be written, e.g. on a full disk.
      ValueError: the file does not hold what was written.
    """
    with files.replacing(job.path) as temporary:
        digests, changed, bad, animated = _write_records(job, temporary)
        _verify(temporary, digests)
        shard = records.Shard(
            job.path.name, len(digests), temporary.stat().st_size, files.sha256(temporary)
        )
    done = Done(shard, tuple(changed), tuple(bad), tuple(animated))
    files.write_text(
        job.path.with_name(job.path.name + DONE),
        json.dumps({"fingerprint": job.fingerprint, **dataclasses.asdict(done)}),
    )
    return done


def _write_records(
    job: Job, path: pathlib.Path
) -> tuple[list[bytes], list[str], list[str], list[str]]:
    """Digests of the records, and the fields of `Done` from `changed` on."""
    from array_record.python.array_record_module import ArrayRecordWriter

    digests, changed, bad, animated = [], [], [], []
    try:
        writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        for item in job.items:
            try:
                content = item.read()
                stored, record = _record(job, item, content)
            except (UndecodableError, OSError) as error:
                bad.append(f"{item.name}: {error}")
                continue
            if not is_plain_jpeg(content):
                if stored != content:
                    changed.append(item.name)
                if job.encoding.decoder.is_animated(content):
                    animated.append(item.name)
            digests.append(hashlib.sha256(record).digest())
            writer.write(record)
        writer.close()
    except RuntimeError as error:  # any answer of the system, in particular a full disk
        raise OSError(
            f"{job.path} cannot be written, free disk space and the same command continues: {error}"
        ) from error
    return digests, changed, bad, animated


def _record(job: Job, item: Item, content: bytes) -> tuple[bytes, bytes]:
    """The bytes to store of an image, and the record with them."""
    if job.pairs is None:
        stored = job.encoding.apply(content)
        return stored, records.pack(encoded=stored, label=item.label, name=item.name)
    names = {"name": item.name, "mask_name": item.mask_name}
    pair = {"encoded": content, "mask": item.read_mask(), **names}
    stored, mask = job.encoding.apply_pair(pair, job.pairs)
    return stored, records.pack_pair(encoded=stored, mask=mask, **names)


def check(
    path: pathlib.Path, shard: records.Shard, classes: int, masks: bool = False
) -> str | None:
    """What is wrong with a shard: its checksum, its count, a label, an image; None if nothing."""
    if not path.is_file():
        return f"{path.name} is missing"
    if files.sha256(path) != shard.sha256:
        return f"{path.name} is not what was written: its checksum differs"
    stored = records.open_shards(path.parent, [shard])
    if len(stored) != shard.images:
        return f"{path.name} holds {len(stored)} images of {shard.images}"
    for index in range(len(stored)):
        record = records.unpack(stored[index])
        if masks:
            try:
                PairDecoder(classes, decoder=Decoder(max_pixels=MAX_BYTES))(record)
            except ValueError as error:
                return f"{path.name}: {error}"
            continue
        if not 0 <= record["label"] < classes:
            return f"{path.name}: {record['name']} has label {record['label']} of {classes}"
        try:
            if not is_raw(record["encoded"]):
                simplejpeg.decode_jpeg_header(record["encoded"])
            Decoder(max_pixels=MAX_BYTES)(record["encoded"])
        except ValueError as error:
            return f"{path.name}: {record['name']} cannot be decoded: {error}"
    return None


def _verify(path: pathlib.Path, digests: list[bytes]) -> None:
    if not digests:
        return
    shard = records.Shard(path.name, len(digests), 0, "")
    try:
        stored = records.open_shards(path.parent, [shard])
        found = [hashlib.sha256(stored[index]).digest() for index in range(len(stored))]
    except RuntimeError:
        found = []  # it cannot even be read
    if found != digests:
        raise ValueError(f"{path} does not hold what was written to it; look for a failing disk")
