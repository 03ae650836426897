"""What is wrong with files of masks, as a run says it: one line, with the file and numbers."""

import logging

import numpy as np
import pytest
from PIL import Image

from repvgg_jax import Variant
from repvgg_jax.data.batches import eval_batches, train_batches
from repvgg_jax.data.dataset import load
from repvgg_jax.data.settings import DataSettings
from repvgg_jax.segmentation.labels import IGNORE
from repvgg_jax.train.config import default_config
from repvgg_jax.train.experiment import Experiment
from repvgg_jax.train.loop import train
from repvgg_jax.train.restore import starting_state
from tests.helpers.pictures import encoded
from tests.helpers.runs import rows
from tests.helpers.sharding import OVER_BATCH

SIZE = 20, 16
TINY = Variant("tiny-masks", (1, 1), (4, 8), 4, strides=(1, 2), stem_stride=2)


def png(array):
    return encoded(Image.fromarray(array), "PNG")


@pytest.fixture
def folder(tmp_path):
    """Eight pairs to train on and two to evaluate on, of three classes."""
    rng = np.random.default_rng(0)
    root = tmp_path / "data"
    for split, count in (("train", 8), ("val", 2)):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for i in range(count):
            image = rng.integers(0, 255, (*SIZE, 3)).astype(np.uint8)
            (root / split / "images" / f"{i}.png").write_bytes(png(image))
            label = rng.integers(0, 3, SIZE).astype(np.uint8)
            (root / split / "masks" / f"{i}.png").write_bytes(png(label))
    (root / "classes.txt").write_text("road\nsky\ncar\n")
    return root


def config_of(folder, **changes):
    config = default_config(TINY)
    config.task = "segmentation"
    config.segmentation.output_stride, config.segmentation.bins = 4, (1, 2)
    config.segmentation.width, config.segmentation.auxiliary_width = 8, 4
    config.data.source = f"masks:{folder}"
    config.data.train_size, config.data.eval_size = 17, SIZE
    config.train.batch_size, config.train.epochs, config.eval.batch_size = 8, 1, 8
    with config.unlocked():
        config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


def read_all(folder, **changes):
    """Reads what a run reads: a batch of crops, and all evaluation images."""
    settings = {"source": f"masks:{folder}", "train_size": 17, "eval_size": SIZE} | changes
    data = load(DataSettings(**settings))
    training = train_batches(data, batch_size=8, seed=0, start_step=0, sharding=OVER_BATCH)
    next(training)
    training.close()
    return list(eval_batches(data, batch_size=8, sharding=OVER_BATCH))


def palette(labels):
    image = Image.fromarray(labels)
    image.putpalette([value for index in range(256) for value in (index, 0, 255 - index)])
    return encoded(image, "PNG")


ZEROS = np.zeros(SIZE, np.uint8)
ONE_OFF = ZEROS.copy()
ONE_OFF[:3, 0] = 3


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (png(ONE_OFF), ("3 classes", "0 … 2", "3 (3 pixels)")),
        (png(np.full(SIZE, 700, np.uint16)), ("16-bit", "700", "320 pixels")),
        (png(np.zeros((*SIZE, 3), np.uint8)), ("RGB", "not colors")),
        (png(np.zeros((20, 15), np.uint8)), ("20x16", "20x15")),
        (encoded(Image.fromarray(ZEROS), "JPEG"), ("JPEG", "PNG")),
        (png(ZEROS)[:40], ()),
        (b"", ("empty",)),
    ],
    ids=["label", "16 bit", "RGB", "size", "JPEG", "cut", "empty"],
)
def test_a_mask_that_is_none_stops_a_run_in_one_line(folder, split, mask, words):
    (folder / split / "masks" / "1.png").write_bytes(mask)
    with pytest.raises(ValueError, match=f"{split}/masks/1\\.png") as caught:
        read_all(folder)
    what = "training" if split == "train" else "validation"
    for word in (f"{what} image", "config.data.max_bad=0", *words):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_masks_may_be_allowed(folder, caplog):
    caplog.set_level(logging.WARNING, "repvgg_jax")
    for split in ("train", "val"):
        (folder / split / "masks" / "1.png").write_bytes(png(ONE_OFF))
    (batch,) = read_all(folder, max_bad=2)
    assert np.asarray(batch["mask"]).sum() == 1
    named = [r.getMessage() for r in caplog.records if "cannot be decoded" in r.getMessage()]
    assert len(named) == 2
    assert all("masks/1.png" in line for line in named)


@pytest.mark.parametrize("kind", [palette, lambda labels: png(labels.astype(np.uint16))])
def test_palettes_and_16_bits_are_labels(folder, kind):
    expected = read_all(folder)
    for path in sorted(folder.glob("*/masks/*.png")):
        labels = np.asarray(Image.open(path))
        path.write_bytes(kind(labels))
    for found, right in zip(read_all(folder), expected, strict=True):
        np.testing.assert_array_equal(found["label"], right["label"])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("train/masks/1.png", r"1 of 8 images have no mask.*train/masks/1\.png"),
        ("val/images", "val/images"),
        ("val/masks", "val/masks"),
    ],
)
def test_what_is_missing_is_named(folder, path, message):
    (folder / path).rename(folder / "elsewhere")
    if path == "val/images":
        (folder / path).mkdir()
    with pytest.raises(ValueError, match=message) as caught:
        read_all(folder)
    assert "\n" not in str(caught.value)


def test_crops_larger_than_the_scaled_image_get_a_border(folder):
    data = load(DataSettings(source=f"masks:{folder}", train_size=50, eval_size=SIZE))
    image, label = data.train_crop(data.train[0], 50, np.random.default_rng(0))
    assert image.shape == (50, 50, 3)
    assert 0 < (label != IGNORE).sum() < 2500


def test_an_evaluation_image_that_does_not_fit(folder):
    with pytest.raises(ValueError, match=r"val/images/0\.png has 20x16 pixels.*eval_size"):
        read_all(folder, eval_size=16)


@pytest.mark.slow
def test_the_loop_says_the_same(folder, tmp_path):
    (folder / "train" / "masks" / "1.png").write_bytes(png(ONE_OFF))
    with pytest.raises(ValueError, match=r"train/masks/1\.png.* 3 \(3 pixels\)"):
        train(config_of(folder), tmp_path / "run")


@pytest.mark.slow
def test_without_any_label_the_loss_is_0(folder, tmp_path, caplog):
    """No NaN in the parameters, and no mIoU, which is no number then."""
    for path in folder.glob("*/masks/*.png"):
        path.write_bytes(png(np.full(SIZE, IGNORE, np.uint8)))
    train(config_of(folder, train__epochs=2), tmp_path / "run")
    losses = [row["train/loss"] for row in rows(tmp_path / "run") if "train/loss" in row]
    assert losses
    assert set(losses) == {0.0}
    last = rows(tmp_path / "run")[-1]
    assert last["final/loss"] == last["final/loss_fused"] == 0


@pytest.mark.slow
def test_weights_of_other_classes_keep_all_but_the_heads(folder, tmp_path, caplog):
    caplog.set_level(logging.INFO, "repvgg_jax")
    train(config_of(folder), tmp_path / "run")
    (folder / "classes.txt").write_text("road\nsky\ncar\ntree\n")
    config = config_of(folder, init_from=str(tmp_path / "run"))
    state = starting_state(Experiment.from_config(config))
    assert state.params["head"]["kernel"].shape[-1] == 4
    assert "3 classes -> 4" in caplog.text
    assert "new: tree" in caplog.text
