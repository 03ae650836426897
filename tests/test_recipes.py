"""The official models' recipes say what the paper says."""

import importlib
import pathlib

import jax
import pytest

from repvgg_jax import FAMILY as NETWORKS
from repvgg_jax import VARIANTS
from repvgg_jax.train.config import paper_120
from repvgg_jax.train.experiment import build_model
from repvgg_jax.train.optimizer import schedule
from repvgg_jax.train.settings import Settings
from repvgg_jax.train.validate import check_batches

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "configs"
ALL = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
FAMILY = {
    "mobileone": [f"s{size}" for size in range(5)],
    "qarepvgg": [n.removeprefix("qarepvgg_") for n in NETWORKS if n.startswith("qarepvgg_")],
    "repopt": [n.removeprefix("repopt_") for n in NETWORKS if n.startswith("repopt_")],
}
FILES = [n for n in ALL if not n.startswith(("digits", "cityscapes_")) and n not in FAMILY]
CITYSCAPES = [n for n in ALL if n.startswith("cityscapes_")]


def recipe(name: str) -> Settings:
    return Settings.from_config(importlib.import_module(f"configs.{name}").get_config())


def test_every_official_model_has_one():
    named = {name.lower().replace("-", "_") for name in VARIANTS}
    assert set(FILES) == named | {"b2g4_200"}


@pytest.mark.parametrize("name", FILES)
def test_a_recipe(name):
    settings = recipe(name)
    text = (FOLDER / f"{name}.py").read_text()
    assert f"python train.py --config configs/{name}.py" in text
    variant = settings.model.variant
    assert variant.name.lower().replace("-", "_") == name.removesuffix("_200")
    for devices in (1, 4, 8):
        check_batches(settings, devices=devices)
    assert (settings.train.batch_size, settings.bn.group_size) == (256, 32)
    assert settings.optimizer.learning_rate == 0.1
    size = settings.data.train_size
    logits = jax.eval_shape(
        build_model(settings, num_classes=1000).init_with_output,
        jax.random.key(0),
        jax.ShapeDtypeStruct((2, size, size, 3), "float32"),
    )[0]
    assert logits.shape == (2, 1000)


@pytest.mark.parametrize(
    ("family", "size"), [(family, size) for family, sizes in FAMILY.items() for size in sizes]
)
def test_networks_of_the_family(family, size):
    """The argument of a recipe is the size of its network; every network has one."""
    module = importlib.import_module(f"configs.{family}")
    settings = Settings.from_config(module.get_config(size))
    assert settings.model.variant.name == f"{family}_{size}"
    assert f"configs/{family}.py:" in (FOLDER / f"{family}.py").read_text()
    for devices in (1, 4, 8):
        check_batches(settings, devices=devices)
    optimizer, train = settings.optimizer, settings.train
    search = size.endswith("_search")
    epochs = {"mobileone": 300, "qarepvgg": 120, "repopt": 240 if search else 120}[family]
    decay = {"mobileone": 1e-4, "qarepvgg": 4e-5, "repopt": 4e-5}[family]
    assert (train.epochs, optimizer.weight_decay, optimizer.learning_rate) == (epochs, decay, 0.1)
    assert train.batch_size == (1024 if family == "qarepvgg" else 256)
    assert train.label_smoothing == (0.0 if family == "qarepvgg" else 0.1)
    assert optimizer.clip_norm == (5.0 if search else 0.0)
    assert optimizer.warmup_epochs == (0 if family != "repopt" else 10 if search else 5)
    assert optimizer.nesterov == (family == "repopt")
    assert settings.ema.decay == (0.9995 if family == "mobileone" else 0.0)


@pytest.mark.parametrize("name", CITYSCAPES)
def test_table_8(name):
    settings = recipe(name)
    text = (FOLDER / f"{name}.py").read_text()
    assert f"python train.py --config configs/{name}.py" in text
    assert (settings.task, settings.protocol) == ("segmentation", "semseg")
    assert settings.segmentation.fast == name.endswith("_fast")
    short = settings.model.variant.name.lower().replace("esnet-", "")
    assert short == name.removeprefix("cityscapes_").removesuffix("_fast")
    optimizer, data = settings.optimizer, settings.data
    rate = schedule(optimizer, batch_size=16, steps_per_epoch=185, total_steps=40 * 185)
    assert [float(rate(step)) for step in (0, 3700, 7400)] == pytest.approx(
        [0.01, 0.01 * 0.5**0.9, 0], abs=1e-7
    )
    assert (optimizer.name, optimizer.momentum, optimizer.weight_decay) == ("sgd", 0.9, 1e-4)
    assert (settings.train.batch_size, settings.train.epochs) == (16, 40)
    assert (settings.train.auxiliary_weight, settings.bn.group_size) == (0.4, None)
    assert (data.train_size, data.eval_size, data.num_classes) == (713, (1024, 2048), 19)
    logits = jax.eval_shape(
        build_model(settings, num_classes=19).init_with_output,
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, 65, 65, 3), "float32"),
    )[0]
    assert logits.shape == (1, 65, 65, 19)


def test_table_8_has_six_rows():
    rows = ("b1g2", "b1g2_fast", "b2", "b2_fast", "r101", "r50")
    assert [f"cityscapes_{row}" for row in rows] == CITYSCAPES


def test_lengths():
    epochs = {name: recipe(name).train.epochs for name in FILES}
    assert {n for n, e in epochs.items() if e == 200} == {"b2g4_200", "b3", "b3g2", "b3g4", "d2se"}
    assert {n for n, e in epochs.items() if e == 300} == {"plus_l2pse"}
    assert set(epochs.values()) == {120, 200, 300}


def rates(settings: Settings, *epochs: int) -> list[float]:
    """Learning rates at the beginning of epochs, for ImageNet's 5004 batches of 256."""
    steps = 1_281_167 // settings.train.batch_size
    rate = schedule(
        settings.optimizer,
        batch_size=settings.train.batch_size,
        steps_per_epoch=steps,
        total_steps=settings.train.epochs * steps,
    )
    return [float(rate(epoch * steps)) for epoch in epochs]


def test_table_4():
    settings = Settings.from_config(paper_120("B1"))
    assert rates(settings, 0, 60, 120) == pytest.approx([0.1, 0.05, 0], abs=1e-7)
    assert settings.optimizer.weight_decay == 1e-4
    assert (settings.train.label_smoothing, settings.augment.mixup) == (0, 0)
    assert (settings.augment.policy, settings.augment.flip) == ("none", 0.5)


@pytest.mark.parametrize("name", ["b2g4_200", "b3", "b3g2", "b3g4", "d2se"])
def test_table_5(name):
    """200 epochs, 5 of warm-up, cosine, label smoothing, mixup and AutoAugment."""
    settings = recipe(name)
    augment, optimizer = settings.augment, settings.optimizer
    assert settings.train.epochs == 200
    assert optimizer.warmup_epochs == 5
    # From 0 to 0.1 in 5 epochs; in the middle of the other 195 half of it; then 0.
    assert rates(settings, 0, 1, 5, 200) == pytest.approx([0, 0.02, 0.1, 0], abs=1e-8)
    assert sum(rates(settings, 102, 103)) / 2 == pytest.approx(0.05, rel=1e-4)
    assert (optimizer.name, optimizer.momentum) == ("sgd", 0.9)
    assert (optimizer.weight_decay, optimizer.nesterov) == (1e-4, False)
    assert settings.train.label_smoothing == 0.1
    assert (augment.mixup, augment.cutmix, augment.mix_group) == (0.2, 0, 32)
    assert (augment.policy, augment.flip) == ("autoaugment", 0.5)
    assert settings.data.train_size == 224


@pytest.mark.parametrize("name", ["b2g4_200", "b3", "b3g2", "b3g4"])
def test_table_5_is_tested_at_224(name):
    data = recipe(name).data
    assert (data.eval_size or data.train_size, data.eval_crop) == (224, 0.875)


def test_d2se_is_tested_at_320():
    data = recipe("d2se").data
    assert (data.train_size, data.eval_size, data.eval_crop) == (224, 320, 1)


def test_plus():
    settings = recipe("plus_l2pse")
    data, optimizer = settings.data, settings.optimizer
    assert settings.train.epochs == 300
    assert (data.train_size, data.eval_size, data.eval_crop) == (256, 320, 1)
    assert (settings.augment.policy, settings.augment.mixup) == ("raug15", 0.2)
    assert (optimizer.weight_decay, settings.train.auxiliary_weight) == (4e-5, 0.1)
    assert (optimizer.nesterov, optimizer.momentum) == (True, 0.9)
    assert (settings.train.label_smoothing, optimizer.warmup_epochs) == (0.1, 5)
    assert rates(settings, 0, 5, 300) == pytest.approx([0, 0.1, 0], abs=1e-8)
