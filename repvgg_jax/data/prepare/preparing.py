"""Plans the shards, says what it will take, has them written, and closes with the manifest."""

import concurrent.futures
import dataclasses
import multiprocessing
import pathlib
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from repvgg_jax.data import records
from repvgg_jax.data.decoding import UndecodableError
from repvgg_jax.data.prepare import shards
from repvgg_jax.data.prepare.inputs import Inputs
from repvgg_jax.data.prepare.shards import UNFINISHED, Done, Form, Job

IMAGENET = {"train": 1_281_167, "val": 50_000}
SAMPLE = 64  # images whose size after encoding anew foretells the others'
SPARE = 1.05  # of the disk space foretold, to be sure


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to prepare.

    Attributes:
      form: how images are stored.
      shard_images: images in a shard.
      processes: that work.
      max_bad: images that may be undecodable; they are left out.
    """

    form: Form = dataclasses.field(default_factory=Form)
    shard_images: int = 2048
    processes: int = 1
    max_bad: int = 0


def prepare(
    inputs: Inputs, output: pathlib.Path, settings: Settings, *, say: Callable[[str], None] = print
) -> records.Manifest:
    """Writes all shards that are not there yet, and the manifest when all are.

    Raises:
      ValueError: images cannot be decoded, or the disk is too small.
      OSError: something cannot be read or written.
    """
    plan = {split: _jobs(inputs, split, output, settings) for split in inputs.splits}
    jobs = [job for split in plan.values() for job in split]
    found = {job.path: shards.finished(job) for job in jobs}
    todo = [job for job in jobs if found[job.path] is None]
    for split, items in inputs.splits.items():
        say(f"{split}: {len(items):,} images of {len(inputs.classes):,} classes")
    if len(inputs.classes) == 1000 and {k: len(v) for k, v in inputs.splits.items()} != IMAGENET:
        say(f"note: all of ImageNet is {IMAGENET['train']:,} and {IMAGENET['val']:,} images")
    output.mkdir(parents=True, exist_ok=True)
    for stray in output.glob(f"*{UNFINISHED}"):
        stray.unlink()
    _check_disk(todo, len(jobs), output, settings, say)

    if todo:  # an older manifest would promise what is about to change
        (output / records.MANIFEST).unlink(missing_ok=True)
    done = {path: result for path, result in found.items() if result is not None}
    for job, result in _work(todo, settings):
        done[job.path] = result
        _check_bad(done.values(), settings.max_bad)
    _check_bad(done.values(), settings.max_bad)

    results = list(done.values())
    changed = sorted(name for result in results for name in result.changed)
    bad = sorted(line for result in results for line in result.bad)
    manifest = records.Manifest(
        classes=inputs.classes,
        splits={
            split: tuple(done[job.path].shard for job in jobs if done[job.path].shard.images)
            for split, jobs in plan.items()
        },
        details={**dataclasses.asdict(settings.form), "changed_to_rgb_jpeg": changed, "bad": bad},
    )
    manifest.write(output)
    if changed:
        say(f"{len(changed)} images were no RGB or grey JPEG and now are: {_some(changed)}")
    if bad:
        say(f"{len(bad)} images cannot be decoded and were left out: {_some(bad)}")
    return manifest


def verify(output: pathlib.Path, *, processes: int = 1) -> None:
    """Reads a prepared directory whole: checksums, counts, labels, every image.

    Raises:
      ValueError: what is wrong, first shards first.
    """
    manifest = records.Manifest.read(output)
    records.check_files(output, manifest)
    todo = [shard for split in manifest.splits.values() for shard in split]
    wrong = []
    with _pool(processes) as pool:
        futures = [
            pool.submit(shards.check, output / shard.file, shard, len(manifest.classes))
            for shard in todo
        ]
        for future in _watched(futures, "verifying", [shard.images for shard in todo]):
            wrong += [future.result()] if future.result() else []
    if wrong:
        raise ValueError(f"{output}: {len(wrong)} of {len(todo)} shards are bad: {_some(wrong)}")


def _jobs(inputs: Inputs, split: str, output: pathlib.Path, settings: Settings) -> list[Job]:
    items, size = inputs.splits[split], settings.shard_images
    count = -(-len(items) // size)
    return [
        Job(
            output / f"{split}-{number:05}-of-{count:05}.array_record",
            tuple(items[number * size : (number + 1) * size]),
            settings.form,
        )
        for number in range(count)
    ]


def _check_disk(
    todo: Sequence[Job],
    total: int,
    output: pathlib.Path,
    settings: Settings,
    say: Callable[[str], None],
) -> None:
    items = [item for job in todo for item in job.items]
    needed = float(sum(item.size for item in items))
    if settings.form.short_side and items:
        before = after = 1
        for item in random.Random(0).sample(items, min(SAMPLE, len(items))):
            try:
                stored = settings.form.apply(content := item.read())
            except UndecodableError:
                continue
            before, after = before + len(content), after + len(stored)
        needed *= after / before
    needed = needed * SPARE + 256 * len(items)  # a record's name, label and index
    free = shutil.disk_usage(output).free
    say(
        f"{total - len(todo)} of {total} shards are finished; the others take about "
        f"{_size(needed)}, {_size(free)} are free in {output}"
    )
    if needed > free:
        raise ValueError(
            f"{output} has {_size(free)} free, about {_size(needed)} are needed; make room, give "
            f"another --output, or store smaller images, --short_side=256"
        )


def _work(todo: Sequence[Job], settings: Settings) -> Iterator[tuple[Job, Done]]:
    with _pool(settings.processes) as pool:
        futures = [pool.submit(shards.write, job) for job in todo]
        jobs = dict(zip(futures, todo, strict=True))
        try:
            for future in _watched(futures, "preparing", [len(job.items) for job in todo]):
                yield jobs[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _watched(
    futures: Sequence[concurrent.futures.Future], title: str, images: Sequence[int]
) -> Iterator[concurrent.futures.Future]:
    sizes = dict(zip(futures, images, strict=True))
    columns = (BarColumn(), MofNCompleteColumn(), "images", TimeRemainingColumn())
    with Progress(f"{title:>9}", *columns) as progress:
        bar = progress.add_task(title, total=sum(images))
        for future in concurrent.futures.as_completed(futures):
            yield future
            progress.advance(bar, sizes[future])


def _pool(processes: int) -> concurrent.futures.ProcessPoolExecutor:
    # Fresh processes: forking one in which jax has threads can hang.
    return concurrent.futures.ProcessPoolExecutor(
        processes, mp_context=multiprocessing.get_context("spawn")
    )


def _check_bad(results: Iterable[Done], allowed: int) -> None:
    bad = [line for result in results for line in result.bad]
    if len(bad) > allowed:
        raise ValueError(
            f"{len(bad)} images cannot be decoded: {_some(sorted(bad))}; mend or remove them, or "
            f"leave them out with --max_bad={len(bad)} or more"
        )


def _some(lines: Sequence[str], most: int = 5) -> str:
    rest = f" and {len(lines) - most} more" if len(lines) > most else ""
    return "; ".join(lines[:most]) + rest


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count > 1e8 else f"{count / 1e6:,.2f} MB"
