"""RepOptimizers by settings alone: a search for scales, then a run with them."""

import dataclasses
import logging
import shutil

import chex
import jax
import numpy as np
import optax
import pytest

import repvgg_jax as rv
from repvgg_jax import reparam
from repvgg_jax.train.checkpoint import Checkpoints
from repvgg_jax.train.experiment import Experiment
from repvgg_jax.train.loop import train
from repvgg_jax.train.settings import Settings
from tests.helpers.jit import quick_jit
from tests.helpers.runs import assert_same, final_state, numbers, small_config, stopped_at
from tests.helpers.trees import random_variables

SIZES = {"depths": (1, 1), "channels": (4, 8), "stem_channels": 4, "strides": (1, 2)}
SEARCH = rv.Variant("tiny-search", **SIZES, stem_stride=1, block="repopt_search")
TARGET = dataclasses.replace(SEARCH, name="tiny-target", block="repopt")
SPEC = reparam.repopt_search()


def write_scales(path):
    """Scales that a search might have found, in a file as the authors write them."""
    import torch

    found = random_variables(rv.create_model(SEARCH, num_classes=10), size=8, channels=1)
    scales = reparam.extract_scales(SPEC, found["params"])
    scales = jax.tree.map(np.abs, scales)
    names = {
        "scale_3x3": "scale_conv",
        "scale_1x1": "scale_1x1",
        "scale_identity": "scale_identity",
    }
    state = {}
    for block, own in scales.items():
        stage, _, index = block.partition("_block")
        key = "stage0" if block == "stem" else f"{stage}.{index}"
        for name, leaf in own.items():
            state[f"{key}.{names[name]}.weight"] = torch.from_numpy(leaf["scale"])
    torch.save(state, path)
    return scales


@pytest.fixture
def file(tmp_path):
    pytest.importorskip("torch")
    path = tmp_path / "scales.pth"
    return path, write_scales(path)


def experiment(path, **changes):
    config = small_config(TARGET, optimizer__scales=str(path), **changes)
    return Experiment.from_config(config)


@pytest.mark.slow
def test_a_run_starts_and_steps_as_the_branches_would(file):
    path, scales = file
    changes = {"optimizer__weight_decay": 1e-2, "optimizer__warmup_epochs": 0.0}
    own = experiment(path, **changes)
    plain = Experiment.from_config(small_config(TARGET, **changes))
    (params, began) = (e.initial_state().params for e in (own, plain))
    key = jax.random.fold_in(jax.random.key(0), 1)
    assert_same(params, reparam.rep_init(SPEC, scales, began, key), 1e-6)
    # One step: the plain network's gradients, multiplied.
    grads = jax.tree.map(np.ones_like, jax.device_get(began))
    (mine, _), (theirs, _) = (
        quick_jit(e.optimizer.update)(grads, e.optimizer.init(began), began) for e in (own, plain)
    )
    expected, _ = reparam.rep_optimizer(SPEC, scales).update(grads, optax.EmptyState())
    rate = own.learning_rate(1)
    assert rate > 0
    for block in ("stem", "stage1_block0", "stage2_block0"):
        change = np.asarray(mine[block]["conv"]["kernel"] - theirs[block]["conv"]["kernel"])
        wanted = -rate * (np.asarray(expected[block]["conv"]["kernel"]) - 1)
        np.testing.assert_allclose(change, wanted, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_equal(mine["head"], theirs["head"])


def test_adamw_multiplies_directions(file):
    path, scales = file
    own, plain = (
        Experiment.from_config(
            small_config(
                TARGET,
                optimizer__name="adamw",
                optimizer__epsilon=1e-30,
                optimizer__warmup_epochs=0.0,
                optimizer__scales=source,
            )
        )
        for source in (str(path), "")
    )
    params = jax.device_get(plain.initial_state().params)
    grads = jax.tree.map(np.ones_like, params)
    (mine, _), (theirs, _) = (
        quick_jit(e.optimizer.update)(grads, e.optimizer.init(params), params) for e in (own, plain)
    )
    power, _ = reparam.rep_optimizer(SPEC, scales, optax.identity(), rule="adamw").update(
        grads, (optax.EmptyState(),) * 3
    )
    rate = own.learning_rate(1)
    assert rate > 0
    change = mine["stem"]["conv"]["kernel"] - theirs["stem"]["conv"]["kernel"]
    # `power` has the multiplier twice.
    wanted = -rate * (np.sqrt(np.asarray(power["stem"]["conv"]["kernel"])) - 1)
    np.testing.assert_allclose(np.asarray(change), wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer__clip_norm": 5.0}, ("clip_norm=5.0", "leave it at 0")),
        ({"model__variant": "A0"}, ("repopt_b1", "A0")),
        ({"task": "segmentation"}, ("config.optimizer.scales", "classifiers")),
    ],
)
def test_what_a_rep_optimizer_is_not_for(changes, words):
    with pytest.raises(ValueError, match=r".") as caught:
        Settings.from_config(small_config(TARGET, optimizer__scales="x.pth", **changes))
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_scales_of_another_network_and_none(file, tmp_path, caplog):
    path, _ = file
    deeper = dataclasses.replace(TARGET, depths=(2, 1))
    with pytest.raises(ValueError, match="scales of another network: 3 blocks"):
        Experiment.from_config(small_config(deeper, optimizer__scales=str(path))).initial_state()
    with pytest.raises(ValueError, match="nowhere"):
        experiment(tmp_path / "nowhere.pth")
    caplog.set_level(logging.WARNING, "repvgg_jax")
    Experiment.from_config(small_config(TARGET))
    assert "tiny-target trains as a plain network" in caplog.text


@pytest.mark.slow
def test_search_then_train_then_resume(tmp_path, monkeypatch):
    """Two runs by settings alone. The second goes on bitwise, also without the first."""
    found = tmp_path / "search"
    train(small_config(SEARCH, optimizer__clip_norm=5.0, train__epochs=1), found)
    config = small_config(TARGET, optimizer__scales=str(found))
    train(config, tmp_path / "whole")
    with Checkpoints(found / "checkpoints") as checkpoints:
        _, variables = checkpoints.restore_variables()
    scales = reparam.extract_scales(SPEC, variables["params"])
    used = Experiment.from_config(config).scales
    chex.assert_trees_all_equal(used, jax.tree.map(np.asarray, scales))

    with stopped_at(monkeypatch, 9):
        assert train(config, tmp_path / "parts").step < 22
    whole = final_state(tmp_path / "whole", config)
    shutil.rmtree(found)
    assert train(config, tmp_path / "parts").step == 22
    assert numbers(tmp_path / "parts")[-1] == numbers(tmp_path / "whole")[-1]
    with Checkpoints(tmp_path / "parts" / "checkpoints") as checkpoints:
        _, variables = checkpoints.restore_variables()
    chex.assert_trees_all_equal(variables, dict(whole.variables))

    with pytest.raises(ValueError, match=r"no RepOpt search block.*repopt_b1_search"):
        experiment(tmp_path / "whole")
