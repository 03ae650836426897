import hashlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax.data.arrays import ArraySource
from repvgg_jax.data.batches import eval_batches, train_batches
from repvgg_jax.data.dataset import load
from repvgg_jax.train.config import default_config
from tests.pictures import in_memory

MESH = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
SHARDING = jax.sharding.NamedSharding(MESH, jax.sharding.PartitionSpec("data"))


def numbered(count: int) -> ArraySource:
    """Images that tell which they are."""
    return ArraySource(np.zeros((count, 2, 2, 1), np.uint8), np.arange(count))


def labels(source, steps, *, seed=0, start=0, batch_size=8):
    batches = train_batches(
        in_memory(source), batch_size=batch_size, seed=seed, start_step=start, sharding=SHARDING
    )
    return [np.asarray(batch["label"]).tolist() for batch in itertools.islice(batches, steps)]


def test_every_epoch_is_another_permutation_of_all_images():
    first, second = np.array(labels(numbered(40), 10)).reshape(2, 40)
    assert sorted(first) == sorted(second) == list(range(40))
    assert (first != second).any()
    assert (first != np.arange(40)).any()


def test_order_is_a_function_of_the_seed():
    assert labels(numbered(40), 5) == labels(numbered(40), 5)
    assert labels(numbered(40), 5) != labels(numbered(40), 5, seed=1)


@pytest.mark.parametrize("start", [1, 4, 7, 13])
def test_starting_later_gives_the_same_batches(start):
    assert labels(numbered(40), 3, start=start) == labels(numbered(40), start + 3)[start:]


def test_batches_are_sharded_over_all_devices():
    data = in_memory(numbered(40))
    batch = next(train_batches(data, batch_size=16, seed=0, start_step=0, sharding=SHARDING))
    assert {shard.data.shape for shard in batch["image"].addressable_shards} == {(2, 2, 2, 1)}
    assert batch["image"].dtype == jnp.uint8
    assert batch["label"].dtype == jnp.int32


@pytest.mark.parametrize(("processes", "batch_size"), [(2, 8), (4, 8)])
def test_processes_read_their_pieces_of_the_same_batches(monkeypatch, processes, batch_size):
    whole = labels(numbered(40), 6, batch_size=batch_size)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(jax, "make_array_from_process_local_data", lambda _, values: values)
    pieces = []
    for process in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda p=process: p)
        pieces.append(labels(numbered(40), 6, batch_size=batch_size))
    assert [list(itertools.chain(*parts)) for parts in zip(*pieces, strict=True)] == whole


@pytest.mark.parametrize("count", [16, 17, 23, 3])
def test_evaluation_sees_every_image_once(count):
    batches = list(eval_batches(in_memory(numbered(count)), batch_size=8, sharding=SHARDING))
    assert all(batch["label"].shape == (8,) for batch in batches)
    mask = np.concatenate([batch["mask"] for batch in batches])
    seen = np.concatenate([batch["label"] for batch in batches])[mask]
    assert seen.tolist() == list(range(count))


def test_digits_are_real_and_split_with_every_digit_in_proportion():
    data = load(default_config().data)
    assert (len(data.train), len(data.evaluation)) == (1437, 360)
    assert data.image_shape == (8, 8, 1)
    assert data.classes == tuple("0123456789")
    assert data.train.images.dtype == np.uint8
    assert (data.train.images.min(), data.train.images.max()) == (0, 255)
    share = np.bincount(data.evaluation.labels) / 360
    np.testing.assert_allclose(share, np.bincount(data.train.labels) / 1437, atol=0.003)
    rows = {image.tobytes() for image in data.train.images}
    leaked = sum(image.tobytes() in rows for image in data.evaluation.images)
    assert leaked == 0


def test_the_recipes_mean_and_deviation_are_those_of_the_training_pixels():
    from configs import digits

    pixels = load(default_config().data).train.images / 255
    config = digits.get_config()
    assert config.data.mean == pytest.approx([pixels.mean()], abs=1e-3)
    assert config.data.std == pytest.approx([pixels.std()], abs=1e-3)


def test_digits_are_read_as_they_always_were():
    """The digest of what the results in docs/results.md were trained on."""
    batches = train_batches(
        load(default_config().data), batch_size=64, seed=3, start_step=5, sharding=SHARDING
    )
    digest = hashlib.sha256()
    for batch in itertools.islice(batches, 30):
        digest.update(np.asarray(batch["image"]).tobytes())
        digest.update(np.asarray(batch["label"]).tobytes())
    assert digest.hexdigest()[:16] == "0a2b42efa81efac5"
