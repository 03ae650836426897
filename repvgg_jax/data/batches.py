"""Batches of global arrays, in an order that any number of processes agrees on."""

from collections.abc import Iterator, Mapping
from typing import Any

import grain
import jax
import numpy as np

from repvgg_jax.data.dataset import Source

Batch = Mapping[str, Any]


def train_batches(
    source: Source, *, batch_size: int, seed: int, start_step: int, sharding: jax.sharding.Sharding
) -> Iterator[Batch]:
    """Endless shuffled batches; the first is that of step `start_step`.

    Every epoch has its own permutation. Batch number k is the same images in the same order
    whatever the number of processes, and it is found at once, without reading those before.

    Args:
      source: the images.
      batch_size: images of all processes together; the number of processes divides it.
      seed: of the order.
      start_step: where to begin, the step of the state that was restored.
      sharding: of the batch axis over all devices.

    Yields:
      `{"image": uint8 (batch_size, height, width, channels), "label": int32 (batch_size,)}`.
    """
    stream = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    return _read(stream, batch_size, start_step, sharding)


def eval_batches(
    source: Source, *, batch_size: int, sharding: jax.sharding.Sharding
) -> Iterator[Batch]:
    """Every image once and in order; the last batch is filled up with blanks.

    Yields:
      As `train_batches`, and `"mask"` bool (batch_size,), False for blanks.
    """
    padded = _Padded(source, -(-len(source) // batch_size) * batch_size)
    return _read(grain.MapDataset.source(padded), batch_size, 0, sharding)


def _read(
    stream: grain.MapDataset, batch_size: int, start_step: int, sharding: jax.sharding.Sharding
) -> Iterator[Batch]:
    processes, process = jax.process_count(), jax.process_index()
    # Batch k of all is made of the pieces k*n … k*n + n-1; this process reads the one of them
    # that its devices hold.
    pieces = stream.batch(batch_size // processes)[process::processes][start_step:]
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=16)
    for local in pieces.to_iter_dataset(options):
        yield {
            name: jax.make_array_from_process_local_data(sharding, values)
            for name, values in local.items()
        }


class _Padded:
    """A source filled up with blank images to a given length, and a mask that tells them."""

    def __init__(self, source: Source, length: int):
        self._source = source
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        real = index < len(self._source)
        example = dict(self._source[index if real else 0])
        if not real:
            example["image"] = np.zeros_like(example["image"])
        return {**example, "mask": np.bool_(real)}
