"""Batches as global arrays, in an order that is the same for any number of processes.

Reading may take place in worker processes. A terminal sends Ctrl-C to all processes that it runs,
and a scheduler may send SIGTERM to all of a job's. The run stops between two steps and saves; a
worker that died of the same signal before would leave it without the images of its last steps. So
workers ignore these signals, and end with their parent.
"""

import contextlib
import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import resource_tracker
from typing import Any

import grain
import jax
import numpy as np
from absl import flags

from repvgg_jax.data.dataset import Dataset
from repvgg_jax.data.sampling import draws
from repvgg_jax.data.transforms import EvalTransform, TrainSizes, TrainTransform

Batch = Mapping[str, Any]

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def train_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    sharding: jax.sharding.Sharding,
    size_at: Callable[[int], tuple[int, int]] | None = None,
) -> Iterator[Batch]:
    """Endless shuffled batches; the first is that of step `start_step`.

    Every pass over the data has its own order (`repvgg_jax.data.sampling`). Batch number k is the
    same images in the same order, with the same pixels, for any number of processes, workers and
    threads, and it is found at once, without reading those before. The crop of an image is a
    function of (seed, image, times it was drawn before) and of the size alone.

    Args:
      dataset: its training images.
      batch_size: images of all processes together; a multiple of the number of processes.
      seed: of the order and the crops.
      start_step: of the first batch: the step of the restored state.
      sharding: of the batch axis over all devices.
      size_at: epoch, of `len(dataset.train) // batch_size` steps -> height and width of all its
        images, in pixels. Picklable. None gives those of `dataset.image_shape`.

    Yields:
      `{"image": uint8 (batch_size, height, width, channels), "label": int32 (batch_size,)}`;
      labels uint8 (batch_size, height, width) if the data set has masks.

    Raises:
      ValueError: more images cannot be decoded than are allowed; sizes without a crop.
    """
    if size_at is not None and dataset.train_crop is None:
        raise ValueError(
            f"a train size that changes needs config.data.train_size above 0 ({dataset.name})"
        )
    transform = TrainTransform(
        source=dataset.train,
        crop=dataset.train_crop,
        size_at=size_at or TrainSizes((), otherwise=dataset.image_shape[:2]),
        images_per_epoch=max(1, len(dataset.train) // batch_size) * batch_size,
        seed=seed,
        attempts=min(dataset.bad_images.allowed + 1, len(dataset.train)),
        masks=dataset.masks,
    )
    elements = draws(dataset, seed).map_with_index(transform)
    for batch, reports in _local_batches(dataset, elements, batch_size, start_step):
        dataset.bad_images.report(dataset.train, "training", reports)
        yield _global_batch(batch, sharding)


def eval_batches(
    dataset: Dataset, *, batch_size: int, sharding: jax.sharding.Sharding
) -> Iterator[Batch]:
    """Every validation image once and in order; the last batch is padded with blanks.

    Yields:
      As `train_batches`, and `"mask"` bool (batch_size,), False for blanks and for images that
      cannot be decoded.

    Raises:
      ValueError: more images cannot be decoded than are allowed.
    """
    transform = EvalTransform(
        dataset.evaluation, dataset.eval_crop, dataset.eval_shape, dataset.masks
    )
    padded = -(-len(dataset.evaluation) // batch_size) * batch_size
    elements = grain.MapDataset.range(padded).map(transform)
    for batch, reports in _local_batches(dataset, elements, batch_size, 0):
        dataset.bad_images.report(dataset.evaluation, "validation", reports)
        yield _global_batch(batch, sharding)


def _local_batches(
    dataset: Dataset, elements: grain.MapDataset, batch_size: int, start_step: int
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """This process's part of every batch, and what is to be reported of its images."""
    processes, process = jax.process_count(), jax.process_index()
    # Global batch k consists of the local ones k*n … k*n + n-1; this process reads that of its
    # own devices. Workers take whole local batches in turn.
    local = elements.batch(batch_size // processes)[process::processes][start_step:]
    threads = dataset.threads
    stream = local.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    )
    if dataset.workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads flags, which a library's caller lacks
        stream = stream.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=dataset.workers),
            worker_init_fn=_init_worker,
        )
    batches = iter(stream)
    try:
        if dataset.workers:
            with _stop_signals_blocked():
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


def _global_batch(local: Mapping[str, Any], sharding: jax.sharding.Sharding) -> Batch:
    return {
        name: jax.make_array_from_process_local_data(sharding, values)
        for name, values in local.items()
    }


@contextlib.contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Processes and threads that are started here never receive `_STOP_SIGNALS`.

    Blocked signals stay blocked in every descendant, from its first instruction on; `_init_worker`
    alone would come seconds later, after the worker's imports.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    # It would start with the first worker otherwise, and unblock the signals then.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _init_worker(index: int, count: int) -> None:
    """Runs first in every worker, number `index` of `count`."""
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, name="exit-with-parent", daemon=True).start()


def _exit_with_parent() -> None:
    # A worker asks its parent whether to stop; one that was killed never answers.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
