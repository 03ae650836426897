"""Where arrays lie changes what a device holds, and nothing else."""

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from repvgg_jax import Variant
from repvgg_jax.train.checkpoint import Checkpoints
from repvgg_jax.train.state import TrainState, data_mesh, split_largest, state_sharding
from tests.helpers.runs import assert_same, in_float64, small_experiment

# Large enough for kernels that are worth splitting over eight devices.
WIDE = Variant("wide", (1, 1), (32, 64), 32, strides=(1, 2), stem_stride=1)


@pytest.fixture(scope="module")
def runs():
    """The same run with a copy of the optimizer's state and averages on each device, or a share.

    Two steps of the first, then a third of each from where they led, in float64.
    """
    both = (
        small_experiment(WIDE, train__shard_optimizer=shard, ema__decay=0.9)
        for shard in (False, True)
    )
    with in_float64(*both) as (whole, shared):
        runs = {False: whole, True: shared}
        steps = {shard: run.lower_step().compile() for shard, run in runs.items()}
        state = whole.initial_state()
        for i in range(2):
            state, _ = steps[False](state, jax.device_put(_batch(i), whole.over_batch))
        start = jax.device_get(state)
        found = {}
        for shard, run in runs.items():
            batch = jax.device_put(_batch(2), run.over_batch)
            state, metrics = steps[shard](jax.device_put(start, run.state_sharding()), batch)
            found[shard] = run, steps[shard], state, jax.device_get(metrics)
    return found


def _batch(seed):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (128, 8, 8, 1), np.uint8),
        "label": rng.integers(0, 10, 128, np.int32),
    }


@pytest.mark.slow
def test_the_arithmetic_is_the_same(runs):
    (*_, whole, metrics), (*_, shared, other) = runs[False], runs[True]
    assert_same(whole, shared)
    assert_same(metrics, other)


@pytest.mark.slow
def test_so_are_the_averages_of_parameters_and_statistics(runs):
    (*_, whole, _), (*_, shared, _) = runs[False], runs[True]
    for tree in ("params", "batch_stats"):
        averages, others, now = (
            jax.tree.leaves(jax.device_get(held))
            for held in (whole.ema[tree], shared.ema[tree], whole.variables[tree])
        )
        assert len(averages) == len(others) == len(now) > 0
        for average, other, value in zip(averages, others, now, strict=True):
            assert_same(average, other)
            # They are no copy: three steps of averaging lie between.
            assert not np.array_equal(average, value)
    kernels = [leaf for leaf in jax.tree.leaves(shared.ema) if leaf.size >= 1024]
    assert len(kernels) == 4
    assert all(leaf.addressable_shards[0].data.size == leaf.size // 8 for leaf in kernels)


@pytest.mark.slow
def test_every_device_holds_its_share_of_the_optimizer_and_all_of_the_rest(runs):
    *_, state, _ = runs[True]
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(state.variables))
    kernels = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.size >= 1024]
    assert len(kernels) == 4
    for leaf in kernels:
        assert leaf.addressable_shards[0].data.size == leaf.size // 8


@pytest.mark.slow
def test_memory_shrinks_by_the_shares_of_seven_devices(runs):
    """As the compiler counts it: bytes of a step's arguments on one device."""
    bytes_of = {
        shard: step.memory_analysis().argument_size_in_bytes
        for shard, (_, step, *_) in runs.items()
    }
    state = runs[False][2]
    leaves = jax.tree.leaves((state.opt_state, state.ema))
    split = sum(leaf.nbytes for leaf in leaves if leaf.size >= 1024)
    assert bytes_of[False] - bytes_of[True] == split - split // 8


@pytest.mark.slow
@pytest.mark.parametrize("saved", [False, True])
def test_checkpoints_do_not_know_where_arrays_lay(runs, tmp_path, saved):
    *_, state, _ = runs[saved]
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(state)
    with jax.enable_x64(True), Checkpoints(tmp_path / "checkpoints") as checkpoints:
        like = runs[not saved][0].abstract_state()
        restored = checkpoints.restore(like)
    for path, leaf in jax.tree.leaves_with_path(restored):
        want = dict(jax.tree.leaves_with_path(like))[path]
        assert leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((3, 3, 64, 128), (None, None, None, "data")),
        ((3, 3, 128, 64), (None, None, "data")),
        ((4096, 12), ("data",)),
        ((3, 3, 63, 65), ()),  # no axis that eight devices divide
        ((512,), ()),  # too small to be worth it
        ((), ()),
    ],
)
def test_the_largest_axis_that_can_be_is_split(shape, spec):
    found = split_largest(shape, data_mesh(jax.devices()))
    assert tuple(found)[: len(spec)] == spec
    assert set(tuple(found)[len(spec) :]) <= {None}


def test_any_optimizer_is_split():
    """Moments of AdamW are, its count is not."""
    params = nn.Dense(64).init(jax.random.key(0), np.zeros((1, 64)))
    state = TrainState(0, params, {}, optax.adamw(1e-3).init(params), {"params": params})
    shapes = jax.eval_shape(lambda: state)
    specs = state_sharding(shapes, data_mesh(jax.devices()), shard_optimizer=True)
    kernels = [
        s.spec
        for path, s in jax.tree.leaves_with_path(specs.opt_state)
        if jax.tree_util.keystr(path).endswith("['kernel']")
    ]
    assert [tuple(spec) for spec in kernels] == [("data", None)] * 2
    averaged = jax.tree.leaves(specs.ema["params"]["params"]["kernel"])
    assert [tuple(s.spec) for s in averaged] == [("data", None)]
    assert all(s.spec == PartitionSpec() for s in jax.tree.leaves(specs.params))
