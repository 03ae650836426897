"""The same images with masks from every source: folders, Cityscapes, records and TFDS."""

import itertools
import pickle

import numpy as np
import pytest
from PIL import Image

from repvgg_jax.data.batches import eval_batches, train_batches
from repvgg_jax.data.dataset import load
from repvgg_jax.data.identity import DataIdentity
from repvgg_jax.data.masks import cityscapes_train_ids
from repvgg_jax.data.prepare import inputs
from repvgg_jax.data.prepare import prepare as preparing
from repvgg_jax.data.prepare.shards import Encoding
from repvgg_jax.data.records import Manifest
from repvgg_jax.data.settings import DataSettings
from repvgg_jax.segmentation.labels import CITYSCAPES, IGNORE
from repvgg_jax.train.proof_images import data_images
from tests.helpers.in_process import InProcess
from tests.helpers.pictures import encoded, photo
from tests.helpers.scenes_tfds import CLASSES, Cityscapes, Named, Unnamed
from tests.helpers.sharding import OVER_BATCH


@pytest.fixture(autouse=True)
def _in_process(monkeypatch):
    monkeypatch.setattr(preparing, "_pool", lambda processes: InProcess())


def png(array):
    return encoded(Image.fromarray(array), "PNG")


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_pairs(root, rng):
    """Nine pairs to train on and three to evaluate on, PNGs of two sizes."""
    for split, count in (("train", 9), ("val", 3)):
        for i in range(count):
            size = (30 + i, 40)
            image = np.asarray(photo(i + 20 * (split == "val"), *size))
            label = rng.integers(0, 3, size).astype(np.uint8)
            label[0, 0] = IGNORE
            write(root / split / "images" / f"{i}.png", png(image))
            write(root / split / "masks" / f"{i}.png", png(label))
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return root


def write_cityscapes(root, rng):
    """Two pairs to train on and one to evaluate on, with ids of all classes."""
    for split, cities in (("train", ("aachen", "bochum")), ("val", ("ulm",))):
        for city in cities:
            stem = f"{city}_000000_000019"
            ids = rng.integers(0, 34, (16, 32)).astype(np.uint8)
            image = rng.integers(0, 255, (16, 32, 3)).astype(np.uint8)
            write(root / f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png", png(image))
            write(root / f"gtFine/{split}/{city}/{stem}_gtFine_labelIds.png", png(ids))
    return root


def prepare(source, output, **changes):
    return preparing.prepare(inputs.find(source), output, preparing.Settings(**changes))


def write_tfds(builder, folder, root):
    source = load(settings(folder))
    builder(
        sources=(source.train, source.evaluation), data_dir=str(root), file_format="array_record"
    ).download_and_prepare()
    return root


def settings(source, **changes):
    return DataSettings(source=source, **{"train_size": 24, "eval_size": (48, 48)} | changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("pairs")


@pytest.fixture(scope="module")
def everywhere(root):
    """Settings for the same pairs in every kind of source."""
    folder = write_pairs(root / "folder", np.random.default_rng(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "_pool", lambda processes: InProcess())
        prepare(folder, root / "records", shard_images=4)
    for builder in (Named, Unnamed):
        write_tfds(builder, f"masks:{folder}", root / "tfds")
    directory = str(root / "tfds")
    return {
        "folder": settings(f"masks:{folder}"),
        "records": settings(f"records:{root / 'records'}"),
        "named": settings("tfds:named", directory=directory, mask="segmentation"),
        "unnamed": settings(
            "tfds:unnamed", directory=directory, mask="segmentation_mask", num_classes=3
        ),
    }


def batches_of(data):
    """Two batches of crops, and all evaluation images."""
    training = train_batches(data, batch_size=8, seed=0, start_step=0, sharding=OVER_BATCH)
    found = list(itertools.islice(training, 2))
    training.close()
    return found + list(eval_batches(data, batch_size=8, sharding=OVER_BATCH))


@pytest.mark.parametrize("kind", ["records", "named", "unnamed"])
def test_every_source_trains_on_the_same_pixels_and_labels(everywhere, kind):
    expected, data = load(everywhere["folder"]), load(everywhere[kind])
    assert data.masks
    assert data.classes == (CLASSES if kind != "unnamed" else ("class 0", "class 1", "class 2"))
    for found, right in zip(batches_of(data), batches_of(expected), strict=True):
        for name in ("image", "label"):
            np.testing.assert_array_equal(found[name], right[name])
    assert DataIdentity.of(data).as_json() == DataIdentity.of(expected).as_json()
    assert data.train[0]["name"].startswith("train/images/")
    again = pickle.loads(pickle.dumps(data.train))
    np.testing.assert_array_equal(again[3]["label"], expected.train[3]["label"])


def test_prepared_cityscapes_holds_train_ids(tmp_path, rng):
    folder = write_cityscapes(tmp_path / "in", rng)
    manifest = prepare(folder, tmp_path / "out")
    assert manifest.masks
    assert Manifest.read(tmp_path / "out").masks
    preparing.verify(tmp_path / "out")
    expected = load(settings(f"cityscapes:{folder}"))
    data = load(settings(f"records:{tmp_path / 'out'}", num_classes=19))
    assert data.classes == expected.classes == tuple(entry.name for entry in CITYSCAPES)
    for index in range(2):
        for name in ("image", "label", "name"):
            np.testing.assert_array_equal(data.train[index][name], expected.train[index][name])
    assert "cityscapes" in preparing.training_command(manifest, tmp_path / "out")
    # TFDS keeps ids of all classes, which become train ids here as well.
    write_tfds(Cityscapes, f"cityscapes:{folder}", tmp_path / "tfds")
    data = load(
        settings("tfds:cityscapes", directory=str(tmp_path / "tfds"), mask="segmentation_label")
    )
    assert data.classes == expected.classes
    np.testing.assert_array_equal(data.train[1]["label"], expected.train[1]["label"])
    assert cityscapes_train_ids()[7] == 0


def test_a_split_without_pairs_is_no_data(tmp_path, rng):
    folder = write_pairs(tmp_path / "in", rng)
    for path in (folder / "val/masks").iterdir():
        path.write_bytes(png(np.full((3, 3), 9, np.uint8)))
    prepare(folder, tmp_path / "out", max_bad=3)
    with pytest.raises(ValueError, match="no validation images"):
        load(settings(f"records:{tmp_path / 'out'}"))


@pytest.mark.parametrize("kind", ["folder", "records", "cityscapes"])
def test_a_directory_of_pairs_is_data_for_proofs(everywhere, kind, tmp_path, rng):
    known = everywhere["named"]
    if kind == "cityscapes":
        path = write_cityscapes(tmp_path, rng)
    else:
        path = everywhere[kind].source.partition(":")[2]
    images, what = data_images(str(path), known, (48, 48, 3), 2)
    assert images.shape == ((1 if kind == "cityscapes" else 2), 48, 48, 3)
    assert str(path) in what


def test_prepared_smaller(tmp_path, rng):
    folder = write_pairs(tmp_path / "in", rng)
    prepare(folder, tmp_path / "out", encoding=Encoding(short_side=10))
    data, full = (
        load(settings(f"{kind}:{tmp_path / name}"))
        for kind, name in (("records", "out"), ("masks", "in"))
    )
    for index in range(3):
        small, whole = data.train[index], full.train[index]
        height, width = whole["label"].shape
        assert min(small["label"].shape) == 10
        assert small["image"].shape[:2] == small["label"].shape
        # Nearest labels: each is that of the pixel around its center.
        rows, columns = (
            (np.arange(n) + 0.5) * length / n
            for n, length in zip(small["label"].shape, (height, width), strict=True)
        )
        nearest = whole["label"][np.ix_(rows.astype(int), columns.astype(int))]
        assert (nearest == small["label"]).mean() > 0.9


def test_a_wrong_mask_stops_preparing_and_is_named(tmp_path, rng):
    folder = write_pairs(tmp_path / "in", rng)
    write(folder / "train/masks/4.png", png(np.full((34, 40), 77, np.uint8)))
    with pytest.raises(ValueError, match=r"train/masks/4\.png.* 77 \(1,360 pixels\)") as caught:
        prepare(folder, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "manifest.json").exists()
    manifest = prepare(folder, tmp_path / "out", max_bad=1)
    assert [shard.images for shard in manifest.splits["train"]] == [8]
    # A repaired mask is read again: its shard was of other files.
    write(folder / "train/masks/4.png", png(np.zeros((34, 40), np.uint8)))
    manifest = prepare(folder, tmp_path / "out")
    assert [shard.images for shard in manifest.splits["train"]] == [9]


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("named", {}, ("2 features of type image", "config.data.mask")),
        ("named", {"mask": "labels"}, ("'labels'", "segmentation", "one channel")),
        ("named", {"mask": "image"}, ("'image'", "one channel")),
        ("unnamed", {"mask": "segmentation_mask"}, ("config.data.num_classes",)),
        ("named", {"mask": "segmentation", "num_classes": 4}, ("num_classes=4", "3 classes")),
    ],
)
def test_what_tfds_has_not(everywhere, name, changes, words):
    directory = everywhere["named"].directory
    with pytest.raises(ValueError, match=r".") as caught:
        load(settings(f"tfds:{name}", directory=directory, **changes))
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_masks_are_features_of_tfds_alone(everywhere):
    with pytest.raises(ValueError, match=r"config\.data\.mask='x'"):
        load(settings(everywhere["folder"].source, mask="x"))
