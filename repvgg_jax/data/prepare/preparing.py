"""Plans the shards, says what it will take, has them written, and closes with the manifest."""

import concurrent.futures
import dataclasses
import multiprocessing
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from repvgg_jax.data import records
from repvgg_jax.data.prepare import room, shards
from repvgg_jax.data.prepare.inputs import Inputs
from repvgg_jax.data.prepare.shards import UNFINISHED, Done, Form, Job


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
      OSError: something cannot be read or written, or a process died. Finished shards stay, what
        is half-written does not, and there is no manifest.
    """
    plan = {split: _jobs(inputs, split, output, settings) for split in inputs.splits}
    jobs = [job for split in plan.values() for job in split]
    found = {job.path: shards.finished(job) for job in jobs}
    todo = [job for job in jobs if found[job.path] is None]
    for split, items in inputs.splits.items():
        say(f"{split}: {len(items):,} images of {len(inputs.classes):,} classes")
    if (
        len(inputs.classes) == 1000
        and {k: len(v) for k, v in inputs.splits.items()} != room.IMAGENET
    ):
        train, val = room.IMAGENET.values()
        say(f"note: all of ImageNet is {train:,} and {val:,} images")
    output.mkdir(parents=True, exist_ok=True)
    _remove_unfinished(output)
    _check_room(todo, len(jobs), output, say)

    if todo:  # an older manifest would promise what is about to change
        (output / records.MANIFEST).unlink(missing_ok=True)
    done = {path: result for path, result in found.items() if result is not None}
    try:
        for job, result in _work(todo, settings):
            done[job.path] = result
            _check_bad(done.values(), settings.max_bad)
        _check_bad(done.values(), settings.max_bad)
        manifest = _manifest(inputs, plan, done, settings.form)
        manifest.write(output)
    finally:
        _remove_unfinished(output)

    changed, bad = manifest.details["changed_to_rgb_jpeg"], manifest.details["bad"]
    if changed:
        say(f"{len(changed)} images were no RGB or grey JPEG and now are: {_some(changed)}")
    if bad:
        say(f"{len(bad)} images cannot be decoded and were left out: {_some(bad)}")
    return manifest


def _manifest(
    inputs: Inputs,
    plan: Mapping[str, Sequence[Job]],
    done: Mapping[pathlib.Path, Done],
    form: Form,
) -> records.Manifest:
    changed = sorted(name for result in done.values() for name in result.changed)
    bad = sorted(line for result in done.values() for line in result.bad)
    return records.Manifest(
        classes=inputs.classes,
        splits={
            split: tuple(done[job.path].shard for job in jobs if done[job.path].shard.images)
            for split, jobs in plan.items()
        },
        details={**dataclasses.asdict(form), "changed_to_rgb_jpeg": changed, "bad": bad},
    )


def _remove_unfinished(output: pathlib.Path) -> None:
    for stray in output.glob(f"*{UNFINISHED}"):
        stray.unlink()


def verify(output: pathlib.Path, *, processes: int = 1) -> None:
    """Reads a prepared directory whole: checksums, counts, labels, every image.

    Raises:
      ValueError: what is wrong, first shards first.
      OSError: a process died.
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
        for _, what in _results(futures, "verifying", [shard.images for shard in todo]):
            wrong += [what] if what else []
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


def _check_room(
    todo: Sequence[Job], total: int, output: pathlib.Path, say: Callable[[str], None]
) -> None:
    needed, free = room.of_jobs(todo), room.free(output)
    say(
        f"{total - len(todo)} of {total} shards are finished; the others take about "
        f"{room.text(needed)}, {room.text(free)} are free in {output}"
    )
    if needed > free:
        raise ValueError(
            f"{output} has {room.text(free)} free, about {room.text(needed)} are needed; make "
            f"room, give another --output, or store smaller images, --short_side=256"
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
    columns = (BarColumn(), MofNCompleteColumn(), "images", TimeRemainingColumn())
    with Progress(f"{title:>9}", *columns) as progress:
        bar = progress.add_task(title, total=sum(images))
        for future in concurrent.futures.as_completed(futures):
            try:
                yield future, future.result()
            except BrokenProcessPool as error:
                raise OSError(
                    "one of the processes that work died, perhaps for lack of memory; the same "
                    "command continues, with fewer of them if you say --processes"
                ) from error
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
