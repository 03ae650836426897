"""Batches of global arrays, in an order that any number of processes agrees on."""

import gc
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grain
import jax
from absl import flags

from repvgg_jax.data import workers
from repvgg_jax.data.dataset import Dataset
from repvgg_jax.data.reading import EvalReader, TrainReader

Batch = Mapping[str, Any]


def train_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    sharding: jax.sharding.Sharding,
    size_at: Callable[[int], int] | None = None,
) -> Iterator[Batch]:
    """Endless shuffled batches; the first is that of step `start_step`.

    Every epoch has its own permutation. Batch number k is the same images in the same order,
    with the same pixels, whatever the number of processes, workers and threads, and it is found
    at once, without reading those before. Which part of an image is shown is a function of
    (seed, epoch, image) and of the size alone.

    Args:
      dataset: its training images.
      batch_size: images of all processes together; the number of processes divides it.
      seed: of the order and the crops.
      start_step: where to begin, the step of the state that was restored.
      sharding: of the batch axis over all devices.
      size_at: epoch, of `len(dataset.train) // batch_size` steps -> height and width of all its
        images, in pixels; None gives those of `dataset.image_shape`.

    Yields:
      `{"image": uint8 (batch_size, height, width, channels), "label": int32 (batch_size,)}`.

    Raises:
      ValueError: more images cannot be decoded than may be; sizes without a crop.
    """
    if size_at is not None and dataset.train_crop is None:
        raise ValueError(
            f"a train size that changes needs config.data.train_size above 0 ({dataset.name})"
        )
    steps_per_epoch, size = len(dataset.train) // batch_size, dataset.image_shape[0]
    reader = TrainReader(
        source=dataset.train,
        crop=dataset.train_crop,
        size_at=lambda step: size if size_at is None else size_at(step // steps_per_epoch),
        batch_size=batch_size,
        seed=seed,
        attempts=min(dataset.max_bad + 1, len(dataset.train)),
    )
    numbers = grain.MapDataset.range(len(dataset.train)).seed(seed).shuffle().repeat()
    for local in _read(dataset, numbers.map_with_index(reader), batch_size, start_step):
        dataset.undecodable.take(dataset.train, "training", local.pop("bad"))
        yield _globally(local, sharding)


def eval_batches(
    dataset: Dataset, *, batch_size: int, sharding: jax.sharding.Sharding
) -> Iterator[Batch]:
    """Every held-out image once and in order; the last batch is filled up with blanks.

    Yields:
      As `train_batches`, and `"mask"` bool (batch_size,), False for blanks and for images that
      cannot be decoded.

    Raises:
      ValueError: more images cannot be decoded than may be.
    """
    reader = EvalReader(dataset.evaluation, dataset.eval_crop, dataset.eval_shape)
    padded = -(-len(dataset.evaluation) // batch_size) * batch_size
    for local in _read(dataset, grain.MapDataset.range(padded).map(reader), batch_size, 0):
        dataset.undecodable.take(dataset.evaluation, "held-out", local.pop("bad"))
        yield _globally(local, sharding)


def _read(
    dataset: Dataset, examples: grain.MapDataset, batch_size: int, start_step: int
) -> Iterator[dict[str, Any]]:
    processes, process = jax.process_count(), jax.process_index()
    # Batch k of all is made of the pieces k*n … k*n + n-1; this process reads the one of them
    # that its devices hold. Workers take whole pieces in turn.
    pieces = examples.batch(batch_size // processes)[process::processes][start_step:]
    threads = dataset.threads
    stream = pieces.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    )
    if dataset.workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # a library's caller has no flags, and Grain reads its own
        stream = stream.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=dataset.workers),
            worker_init_fn=workers.begin,
        )
    batches = iter(stream)
    try:
        if dataset.workers:
            with workers.shielded():
                batches.get_state()  # makes the workers' iterators, which can be started then
                batches.start_prefetch()
        yield from batches
    finally:
        batches.close()
        if dataset.workers:
            # What they read ahead lies in shared memory, and is held by iterators that refer to
            # each other.
            del batches
            gc.collect()


def _globally(local: Mapping[str, Any], sharding: jax.sharding.Sharding) -> Batch:
    return {
        name: jax.make_array_from_process_local_data(sharding, values)
        for name, values in local.items()
    }
