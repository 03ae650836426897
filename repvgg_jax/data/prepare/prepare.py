"""Plans the shards, checks the disk space, has workers write them, and writes the manifest last."""

import concurrent.futures
import contextlib
import dataclasses
import io
import logging
import multiprocessing
import pathlib
import random
import re
import shlex
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from PIL import Image

from repvgg_jax import files, text
from repvgg_jax.data import records
from repvgg_jax.data.decoding import UndecodableError
from repvgg_jax.data.prepare import shards
from repvgg_jax.data.prepare.inputs import Inputs, Item
from repvgg_jax.data.prepare.shards import Done, Encoding, Job
from repvgg_jax.data.sources import photo_crops
from repvgg_jax.progress import progress
from repvgg_jax.segmentation.labels import CITYSCAPES

logger = logging.getLogger(__name__)

IMAGENET = {"train": 1_281_167, "val": 50_000}
"""Number of images by split."""
_IMAGENET_BYTES = 144e9  # of all its files
_IMAGENET_SHAPE, _IMAGENET_QUALITY = (500, 375), 95  # usual ones, width first
_RECIPE_BATCH, _RECIPE_GROUP = 256, 32  # of configs/b1.py
_SAMPLE = 64  # images that are encoded for the estimate
_MARGIN = 1.05  # of the estimate over the sample's mean
_RECORD_OVERHEAD = 256  # bytes of a record's name, label and index
SHARD_OVERHEAD = 1 << 17  # bytes of a shard's index, and of the padding of its last block


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to prepare.

    Attributes:
      encoding: how images are stored.
      shard_images: images per shard.
      processes: number of workers.
      max_bad: undecodable images that are left out; one more is an error.
    """

    encoding: Encoding = dataclasses.field(default_factory=Encoding)
    shard_images: int = 2048
    processes: int = 1
    max_bad: int = 0


def prepare(inputs: Inputs, output: pathlib.Path, settings: Settings) -> records.Manifest:
    """Writes all shards that are not finished yet, then the manifest.

    Raises:
      ValueError: images cannot be decoded, the disk is too small, or the directory holds something
        else.
      OSError: something cannot be read or written, or a process died. Finished shards stay, what
        is half-written does not, and there is no manifest.
    """
    _check_output(inputs, output)
    plan = {split: _jobs(inputs, split, output, settings) for split in inputs.splits}
    jobs = [job for split in plan.values() for job in split]
    found = {job.path: shards.finished(job) for job in jobs}
    todo = [job for job in jobs if found[job.path] is None]
    counts = {split: len(items) for split, items in inputs.splits.items()}
    for split, count in counts.items():
        logger.info("%s: %s of %s", split, text.plural(count, "image"), _classes(inputs))
    if len(inputs.classes) == 1000 and counts != IMAGENET:
        logger.info("note: all of ImageNet is {train:,} and {val:,} images".format(**IMAGENET))
    output.mkdir(parents=True, exist_ok=True)
    files.remove_leftovers(output)
    _check_space(todo, len(jobs), output)

    if todo:  # the shards of an older manifest are about to change
        (output / records.MANIFEST).unlink(missing_ok=True)
    done = {path: result for path, result in found.items() if result is not None}
    try:
        for job, result in _work(todo, settings):
            done[job.path] = result
            _check_bad(done.values(), settings.max_bad)
        _check_bad(done.values(), settings.max_bad)
        manifest = _manifest(inputs, plan, done, settings.encoding)
        manifest.write(output)
    finally:
        files.remove_leftovers(output)

    changed, bad = manifest.details["changed_to_rgb_jpeg"], manifest.details["bad"]
    if changed:
        logger.info(
            "%s converted to RGB: %s",
            text.plural(len(changed), "image"),
            text.first_few(changed),
        )
    if bad:
        logger.info(
            "%s cannot be decoded and left out: %s",
            text.plural(len(bad), "image"),
            text.first_few(bad),
        )
    if animated := sorted(name for result in done.values() for name in result.animated):
        logger.info(
            "%s with several pages or frames, of which the first is stored: %s",
            text.plural(len(animated), "file"),
            text.first_few(animated),
        )
    _remove_older_shards({path.name for path in found}, inputs.splits, output)
    return manifest


_OURS = re.compile(r"(?P<split>.+)-\d{5,}-of-\d{5,}\.array_record(\.done\.json)?")


def _check_output(inputs: Inputs, output: pathlib.Path) -> None:
    """Refuses a directory with anything but an earlier preparation of the same classes."""
    if not output.exists():
        return
    if not output.is_dir():
        raise ValueError(f"--output={output} is not a directory")
    others = sorted(
        entry.name
        for entry in output.iterdir()
        if entry.name != records.MANIFEST
        and not entry.name.startswith(".")
        and not _OURS.fullmatch(entry.name)
    )
    if others:
        raise ValueError(
            f"--output={output} holds {text.first_few(others)}, which this command did not write; "
            f"choose another directory"
        )
    try:
        earlier = records.Manifest.read(output)
    except ValueError:  # there is none, or it is of another version
        return
    if lost := [split for split in earlier.splits if split not in inputs.splits]:
        raise ValueError(
            f"--output={output} holds the splits {', '.join(earlier.splits)}; name them all, "
            f"--splits={','.join([*inputs.splits, *lost])}, which keeps what is finished, or "
            f"choose another directory"
        )
    classes = earlier.classes
    if classes != inputs.classes:
        raise ValueError(
            f"--output={output} holds another data set, of {len(classes)} classes "
            f"({text.first_few(classes, 3)}), this one has {len(inputs.classes)} "
            f"({text.first_few(inputs.classes, 3)}); choose another directory, or remove that one"
        )


def _remove_older_shards(
    current: Collection[str], splits: Collection[str], output: pathlib.Path
) -> None:
    """Removes shards of an earlier preparation of these splits with other numbers of images."""
    for note in output.glob(f"*{shards.DONE}"):
        name = note.name.removesuffix(shards.DONE)
        ours = _OURS.fullmatch(name)
        if ours and ours["split"] in splits and name not in current:
            (output / name).unlink(missing_ok=True)
            note.unlink()


def training_command(manifest: records.Manifest, output: pathlib.Path) -> str:
    """The command that trains RepVGG-B1 on prepared images, or a PSPNet if they have masks.

    Of one split alone, and that not `train`, it is the command that evaluates a run on it.
    """
    arguments = [f"--config.data.source=records:{output.resolve()}"]
    train, *others = sorted(manifest.splits, key=lambda name: name != "train")
    if not others and train != "train":
        arguments += [f"--config.data.eval_split={train}"]
        return shlex.join(["python", "train.py", "--workdir", "RUN", "--eval_only", *arguments])
    if train != "train":
        arguments += [f"--config.data.train_split={train}"]
    if not others:
        arguments += ["--config.data.holdout=0.1"]
    elif not {"val", "validation"} & {*others}:
        arguments += [f"--config.data.eval_split={others[0]}"]
    images = sum(shard.images for shard in manifest.splits[train])
    if manifest.masks:
        if len(manifest.classes) != len(CITYSCAPES):
            arguments += [f"--config.data.num_classes={len(manifest.classes)}"]
        recipe = "configs/cityscapes_b1g2_fast.py"
        return shlex.join(["python", "train.py", "--config", recipe, *arguments])
    if len(manifest.classes) != 1000:
        arguments += [f"--config.data.num_classes={len(manifest.classes)}"]
    if images < _RECIPE_BATCH:
        batch_size = 1 << max(images.bit_length() - 1, 0)
        arguments += [
            f"--config.train.batch_size={batch_size}",
            f"--config.bn.group_size={min(batch_size, _RECIPE_GROUP)}",
        ]
    return shlex.join(["python", "train.py", "--config", "configs/b1.py", *arguments])


def verify(output: pathlib.Path, *, processes: int = 1) -> None:
    """Reads a prepared directory completely: checksums, counts, labels, every image.

    Raises:
      ValueError: what is wrong, first shards first.
      OSError: a process died.
    """
    manifest = records.Manifest.read(output)
    records.check_files(output, manifest.splits)
    todo = [shard for split in manifest.splits.values() for shard in split]
    wrong = []
    with _pool(processes) as pool:
        futures = [
            pool.submit(
                shards.check, output / shard.file, shard, len(manifest.classes), manifest.masks
            )
            for shard in todo
        ]
        for _, what in _results(futures, "verifying", [shard.images for shard in todo]):
            wrong += [what] if what else []
    if wrong:
        raise ValueError(
            f"{output}: {len(wrong)} of {len(todo)} shards are bad: {text.first_few(wrong)}"
        )


def _classes(inputs: Inputs) -> str:
    count = len(inputs.classes)
    return f"{count:,} class{'' if count == 1 else 'es'}"


def _jobs(inputs: Inputs, split: str, output: pathlib.Path, settings: Settings) -> list[Job]:
    items, size = inputs.splits[split], settings.shard_images
    count = -(-len(items) // size)
    return [
        Job(
            output / f"{split}-{number:05}-of-{count:05}.array_record",
            tuple(items[number * size : (number + 1) * size]),
            settings.encoding,
            inputs.pairs,
        )
        for number in range(count)
    ]


def _check_space(todo: Sequence[Job], total: int, output: pathlib.Path) -> None:
    needed, free = estimate_bytes(todo), free_bytes(output)
    logger.info(
        "%d of %d shards are finished; the others take about %s, %s are free in %s",
        total - len(todo),
        total,
        format_bytes(needed),
        format_bytes(free),
        output,
    )
    if needed > free:
        raise ValueError(
            f"{output} has {format_bytes(free)} free, about {format_bytes(needed)} are "
            f"needed; free disk space, choose another --output, or store smaller images with "
            f"--short_side=256"
        )


def _work(todo: Sequence[Job], settings: Settings) -> Iterator[tuple[Job, Done]]:
    with _pool(settings.processes) as pool:
        futures = [pool.submit(shards.write, job) for job in todo]
        jobs = dict(zip(futures, todo, strict=True))
        try:
            for future, done in _results(futures, "preparing", [len(job.items) for job in todo]):
                yield jobs[future], done
        finally:
            pool.shutdown(cancel_futures=True)


def _results(
    futures: Sequence[concurrent.futures.Future], title: str, images: Sequence[int]
) -> Iterator[tuple[concurrent.futures.Future, Any]]:
    sizes = dict(zip(futures, images, strict=True))
    with progress(title, sum(images)) as advance:
        for future in concurrent.futures.as_completed(futures):
            try:
                yield future, future.result()
            except BrokenProcessPool as error:
                raise OSError(
                    "a worker process died, perhaps for lack of memory; the same command "
                    "continues; --processes sets the number of workers"
                ) from error
            advance(sizes[future])


def _pool(processes: int) -> concurrent.futures.ProcessPoolExecutor:
    # Spawned processes: forking a process in which jax has threads can hang.
    return concurrent.futures.ProcessPoolExecutor(
        processes, mp_context=multiprocessing.get_context("spawn")
    )


def _check_bad(results: Iterable[Done], allowed: int) -> None:
    bad = [line for result in results for line in result.bad]
    if len(bad) > allowed:
        raise ValueError(
            f"{text.plural(len(bad), 'image')} cannot be decoded: {text.first_few(sorted(bad))}; "
            f"repair or remove them, or leave them out with --max_bad={len(bad)} or more"
        )


def _manifest(
    inputs: Inputs,
    plan: Mapping[str, Sequence[Job]],
    done: Mapping[pathlib.Path, Done],
    encoding: Encoding,
) -> records.Manifest:
    changed = sorted(name for result in done.values() for name in result.changed)
    bad = sorted(line for result in done.values() for line in result.bad)
    return records.Manifest(
        classes=inputs.classes,
        splits={
            split: tuple(done[job.path].shard for job in jobs if done[job.path].shard.images)
            for split, jobs in plan.items()
        },
        details={**dataclasses.asdict(encoding), "changed_to_rgb_jpeg": changed, "bad": bad},
        masks=inputs.pairs is not None,
    )


def estimate_bytes(jobs: Sequence[Job]) -> float:
    """Bytes that these shards will take, estimated from a sample of their images."""
    items = [item for job in jobs for item in job.items]
    if not items:
        return 0.0
    sample = random.Random(0).sample(items, min(_SAMPLE, len(items)))
    encoding = jobs[0].encoding
    content = float(sum(item.size for item in items))
    if encoding.changes_size:
        content = _stored_bytes(encoding, _readable(sample), content, len(items))
    content += sum(item.mask_size for item in items)
    return _total(content, len(items), len(jobs))


def _readable(items: Iterable[Item]) -> Iterator[bytes]:
    for item in items:
        with contextlib.suppress(OSError):
            yield item.read()


def estimate_imagenet(encoding: Encoding, shard_images: int) -> float:
    """Bytes that all of ImageNet will take, estimated without it from two photographs."""
    shards = sum(-(-images // shard_images) for images in IMAGENET.values())
    content, images = _IMAGENET_BYTES, sum(IMAGENET.values())
    if encoding.changes_size:
        content = _stored_bytes(encoding, _photographs(), content, images)
    return _total(content, images, shards)


def free_bytes(directory: pathlib.Path) -> int:
    """Free bytes on the disk of a directory, which need not exist yet."""
    directory = directory.absolute()
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    return shutil.disk_usage(existing).free


def format_bytes(count: float) -> str:
    """E.g. `1.5 GB` or `0.25 MB`."""
    return f"{count / 1e9:,.1f} GB" if count > 1e8 else f"{count / 1e6:,.2f} MB"


def _total(content: float, images: int, shards: int) -> float:
    return content * _MARGIN + _RECORD_OVERHEAD * images + SHARD_OVERHEAD * shards


def _stored_bytes(
    encoding: Encoding, sample: Iterable[bytes], content: float, images: int
) -> float:
    """Bytes of all images as they are stored, judged by a sample.

    JPEGs shrink in proportion to the files; pixels take the same room whatever the file took.
    """
    before = after = count = 1
    for file in sample:
        try:
            stored = encoding.apply(file)
        except UndecodableError:
            continue
        before, after, count = before + len(file), after + len(stored), count + 1
    if encoding.store == "raw":
        return images * after / max(count - 1, 1)
    return content * after / before


def _photographs() -> list[bytes]:
    encoded = []
    for crop in photo_crops(_IMAGENET_SHAPE[1], 2):
        file = io.BytesIO()
        photograph = Image.fromarray(crop).resize(_IMAGENET_SHAPE, Image.Resampling.BICUBIC)
        photograph.save(file, "JPEG", quality=_IMAGENET_QUALITY)
        encoded.append(file.getvalue())
    return encoded
