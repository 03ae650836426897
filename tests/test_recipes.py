"""The official models' recipes say what the paper says."""

import importlib
import pathlib

import jax
import pytest

from repvgg_jax import VARIANTS
from repvgg_jax.train import config as configs
from repvgg_jax.train.optimizer import schedule
from repvgg_jax.train.recipes import paper_120

FOLDER = pathlib.Path(configs.__file__).parents[2] / "configs"
FILES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("digits", "__init__"))


def recipe(name: str):
    return importlib.import_module(f"configs.{name}").get_config()


def test_every_official_model_has_one():
    named = {name.lower().replace("-", "_") for name in VARIANTS}
    assert set(FILES) == named | {"b2g4_200"}


@pytest.mark.parametrize("name", FILES)
def test_a_recipe(name):
    config = recipe(name)
    text = (FOLDER / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 40
    assert "not measured here" in text or "none was measured here" in text
    assert f"python train.py --config configs/{name}.py" in text
    variant = configs.variant_of(config)
    assert variant.name.lower().replace("-", "_") == name.removesuffix("_200")
    for devices in (1, 4, 8):
        configs.check(config, devices=devices)
    assert (config.train.batch_size, config.bn.group_size) == (256, 32)
    assert config.optimizer.learning_rate == 0.1
    model = configs.model_of(config, num_classes=1000)
    size = config.data.train_size
    logits = jax.eval_shape(
        model.init_with_output,
        jax.random.key(0),
        jax.ShapeDtypeStruct((2, size, size, 3), "float32"),
    )[0]
    assert logits.shape == (2, 1000)


def test_lengths():
    epochs = {name: recipe(name).train.epochs for name in FILES}
    assert {n for n, e in epochs.items() if e == 200} == {"b2g4_200", "b3", "b3g2", "b3g4", "d2se"}
    assert {n for n, e in epochs.items() if e == 300} == {"plus_l2pse"}
    assert set(epochs.values()) == {120, 200, 300}


def test_table_4():
    config = paper_120("B1")
    rate = schedule(config.optimizer, batch_size=256, steps_per_epoch=5004, total_steps=120 * 5004)
    assert float(rate(0)) == pytest.approx(0.1)
    assert float(rate(60 * 5004)) == pytest.approx(0.05)
    assert float(rate(120 * 5004)) == pytest.approx(0, abs=1e-7)
    assert config.optimizer.weight_decay == 1e-4
    assert (config.train.label_smoothing, config.augment.mixup) == (0, 0)
    assert (config.augment.policy, config.augment.flip) == ("none", 0.5)


TABLE_5 = ["b2g4_200", "b3", "b3g2", "b3g4", "d2se"]


def rates(config, *epochs: int) -> list[float]:
    """Learning rates at the beginning of epochs, for ImageNet's 5004 batches of 256."""
    steps = 1_281_167 // config.train.batch_size
    rate = schedule(
        config.optimizer,
        batch_size=config.train.batch_size,
        steps_per_epoch=steps,
        total_steps=config.train.epochs * steps,
    )
    return [float(rate(epoch * steps)) for epoch in epochs]


@pytest.mark.parametrize("name", TABLE_5)
def test_table_5(name):
    """200 epochs, 5 of warm-up, cosine, label smoothing, mixup and AutoAugment."""
    config = recipe(name)
    assert config.train.epochs == 200
    assert config.optimizer.warmup_epochs == 5
    # From 0 to 0.1 in 5 epochs; in the middle of the other 195 half of it; then 0.
    assert rates(config, 0, 1, 5, 200) == pytest.approx([0, 0.02, 0.1, 0], abs=1e-8)
    assert sum(rates(config, 102, 103)) / 2 == pytest.approx(0.05, rel=1e-4)
    assert (config.optimizer.name, config.optimizer.momentum) == ("sgd", 0.9)
    assert (config.optimizer.weight_decay, config.optimizer.nesterov) == (1e-4, False)
    assert config.train.label_smoothing == 0.1
    assert (config.augment.mixup, config.augment.cutmix, config.augment.mix_group) == (0.2, 0, 32)
    assert (config.augment.policy, config.augment.flip) == ("autoaugment", 0.5)
    assert config.data.train_size == 224


@pytest.mark.parametrize("name", ["b2g4_200", "b3", "b3g2", "b3g4"])
def test_table_5_is_tested_at_224(name):
    config = recipe(name)
    assert (config.data.eval_size or config.data.train_size, config.data.eval_crop) == (224, 0.875)


def test_d2se_is_tested_at_320():
    config = recipe("d2se")
    assert (config.data.train_size, config.data.eval_size, config.data.eval_crop) == (224, 320, 1)


def test_plus():
    config = recipe("plus_l2pse")
    assert config.train.epochs == 300
    assert (config.data.train_size, config.data.eval_size, config.data.eval_crop) == (256, 320, 1)
    assert (config.augment.policy, config.augment.mixup) == ("raug15", 0.2)
    assert (config.optimizer.weight_decay, config.train.auxiliary_weight) == (4e-5, 0.1)
    assert (config.optimizer.nesterov, config.optimizer.momentum) == (True, 0.9)
    assert (config.train.label_smoothing, config.optimizer.warmup_epochs) == (0.1, 5)
    assert rates(config, 0, 5, 300) == pytest.approx([0, 0.1, 0], abs=1e-8)
