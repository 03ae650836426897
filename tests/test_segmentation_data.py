"""Scenes of digits, pairs of images and masks, Cityscapes' folders, and joint crops."""

import io

import numpy as np
import pytest
from PIL import Image

from repvgg_jax.data.decoding import UndecodableError
from repvgg_jax.data.joint_crop import JointCrop, WholeImage
from repvgg_jax.data.masks import (
    cityscapes_train_ids,
    load_cityscapes,
    load_pairs,
    read_mask,
)
from repvgg_jax.data.scenes import SCENE_CLASSES, load_digits_scenes
from repvgg_jax.data.sources import load_digits
from repvgg_jax.segmentation.labels import CITYSCAPES, IGNORE


def encoded(array, format="PNG", mode=None):
    buffer = io.BytesIO()
    image = Image.fromarray(array)
    if mode == "P":
        image.putpalette([value for index in range(256) for value in (index, 0, 255 - index)])
    image.save(buffer, format)
    return buffer.getvalue()


# Scenes.


def test_scenes_are_functions_of_seed_and_number():
    train, evaluation, classes = load_digits_scenes()
    again, _, _ = load_digits_scenes()
    other, _, _ = load_digits_scenes(seed=7)
    for key in ("image", "label"):
        np.testing.assert_array_equal(train[5][key], again[5][key])
        assert (train[5][key] != other[5][key]).any()
        assert (train[5][key] != train[6][key]).any()
    assert classes == SCENE_CLASSES
    scene = evaluation[0]
    assert scene["image"].shape == (64, 64, 3)
    assert scene["label"].shape == (64, 64)
    assert scene["image"].dtype == scene["label"].dtype == np.uint8
    with pytest.raises(IndexError):
        evaluation[len(evaluation)]


def test_scenes_show_every_class_and_several_digits():
    train, _, _ = load_digits_scenes()
    labels = [train[index]["label"] for index in range(60)]
    counts = np.bincount(np.ravel(labels), minlength=11)
    assert (counts > 500).all()
    assert 0.5 < counts[0] / counts.sum() < 0.9
    assert np.mean([len(np.unique(label)) > 2 for label in labels]) > 0.7


def test_labels_are_where_the_digits_are():
    """Pixels of a digit have its color, away from its edges."""
    train, _, _ = load_digits_scenes()
    for index in range(5):
        scene = train[index]
        label = scene["label"]
        inner = uniform(label, reach=1) & (label > 0)
        for digit in np.unique(label[inner]):
            colors = scene["image"][inner & (label == digit)].astype(float)
            if len(colors) > 20 and (label == digit).sum() < 400:
                assert np.median(np.abs(colors - np.median(colors, axis=0)), axis=0).max() < 12


def test_no_validation_digit_is_seen_in_training():
    train, evaluation, _ = load_digits_scenes()
    splits = load_digits()
    for source, split in ((train, splits[0]), (evaluation, splits[1])):
        np.testing.assert_array_equal(source.digits.images, split.images)
    seen = {image.tobytes() for image in train.digits.images}
    assert not any(image.tobytes() in seen for image in evaluation.digits.images)


# Masks.


def test_masks_are_gray_or_palettes(rng):
    labels = rng.integers(0, 5, (6, 7)).astype(np.uint8)
    labels[0, 0] = IGNORE
    for mode in (None, "P"):
        mask = read_mask(encoded(labels, mode=mode), 5, name="a.png")
        np.testing.assert_array_equal(mask, labels)
        assert mask.dtype == np.uint8
    sixteen = read_mask(encoded(labels.astype(np.uint16)), 5, name="a.png")
    np.testing.assert_array_equal(sixteen, labels)


@pytest.mark.parametrize(
    ("data", "keywords"),
    [
        (encoded(np.array([[0, 7], [7, 1]], np.uint8)), ("7 (2 pixels)", "0 … 4")),
        (encoded(np.array([[0, 300]], np.uint16)), ("300", "16-bit")),
        (encoded(np.array([[0, -256]], np.int32), "TIFF"), ("-256", "32-bit")),
        (encoded(np.zeros((2, 2, 3), np.uint8)), ("RGB", "colors")),
        (encoded(np.zeros((8, 8), np.uint8), "JPEG"), ("JPEG", "PNG")),
        (b"nonsense", ("format",)),
        (encoded(np.zeros((64, 64), np.uint8))[:50], ()),
    ],
    ids=["label", "16 bit", "negative", "RGB", "JPEG", "nonsense", "cut"],
)
def test_masks_that_are_none(data, keywords):
    with pytest.raises(UndecodableError) as caught:
        read_mask(data, 5, name="street/a.png")
    for keyword in ("street/a.png", *keywords):
        assert keyword in str(caught.value)


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


@pytest.fixture
def pairs(tmp_path, rng):
    """Two training pairs and one for validation."""
    for split, names in (("train", ("b", "a")), ("val", ("c",))):
        for name in names:
            image = rng.integers(0, 255, (5, 6, 3)).astype(np.uint8)
            label = rng.integers(0, 3, (5, 6)).astype(np.uint8)
            write(tmp_path / split / "images" / f"{name}.jpg", encoded(image, "JPEG"))
            write(tmp_path / split / "masks" / f"{name}.png", encoded(label))
    (tmp_path / "classes.txt").write_text("road\nsky\n\ncar\n")
    return tmp_path


def test_folders_of_pairs(pairs):
    train, evaluation, classes = load_pairs(pairs)
    assert classes == ("road", "sky", "car")
    assert (len(train), len(evaluation)) == (2, 1)
    first = train[0]
    assert first["name"] == "train/images/a.jpg"
    assert first["image"].shape == (5, 6, 3)
    stored = np.asarray(Image.open(pairs / "train/masks/a.png"))
    np.testing.assert_array_equal(first["label"], stored)


def test_what_is_wrong_with_a_pair_is_named(pairs):
    train, _, _ = load_pairs(pairs)
    write(pairs / "train/masks/a.png", encoded(np.zeros((5, 7), np.uint8)))
    with pytest.raises(UndecodableError, match=r"a\.jpg has 5x6 pixels, but .*a\.png has 5x7"):
        train[0]
    write(pairs / "train/images/a.jpg", b"")
    with pytest.raises(UndecodableError, match=r"a\.jpg"):
        train[0]


def test_what_a_folder_lacks_is_named(pairs):
    (pairs / "train/masks/a.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 images have no mask.*masks/a\.png"):
        load_pairs(pairs)
    (pairs / "classes.txt").unlink()
    with pytest.raises(ValueError, match=r"classes\.txt"):
        load_pairs(pairs)
    (pairs / "val/images/c.jpg").unlink()
    (pairs / "classes.txt").write_text("road\nsky\ncar\n")
    (pairs / "train/images/a.jpg").unlink()
    with pytest.raises(ValueError, match="val/images has no"):
        load_pairs(pairs)
    with pytest.raises(ValueError, match="train/images"):
        load_pairs(pairs / "nowhere")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("straße\nsky\n".encode("latin-1"), r"classes\.txt is not UTF-8"),
        (b"road\nsky\nroad\n", "repeats road"),
    ],
)
def test_class_names_that_are_none(pairs, names, message):
    (pairs / "classes.txt").write_bytes(names)
    with pytest.raises(ValueError, match=message):
        load_pairs(pairs)


def test_a_mark_of_the_byte_order_is_no_part_of_a_name(pairs):
    (pairs / "classes.txt").write_text("road\nsky\n", "utf-8-sig")
    assert load_pairs(pairs)[2] == ("road", "sky")


def test_an_image_has_one_mask(pairs):
    write(pairs / "train/masks/a.bmp", encoded(np.zeros((5, 6), np.uint8), "BMP"))
    with pytest.raises(ValueError, match=r"a\.bmp and .*a\.png are two masks"):
        load_pairs(pairs)


def test_a_folder_without_images_is_named(pairs):
    (pairs / "val/images/c.jpg").rename(pairs / "val/images/c.txt")
    with pytest.raises(ValueError, match="val/images holds no images"):
        load_pairs(pairs)


def test_cityscapes_as_it_is_unpacked(tmp_path, rng):
    ids = rng.integers(0, 34, (4, 8)).astype(np.uint8)
    for split, city in (("train", "aachen"), ("val", "ulm")):
        stem = f"{city}_000000_000019"
        image = rng.integers(0, 255, (4, 8, 3)).astype(np.uint8)
        write(tmp_path / f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png", encoded(image))
        write(tmp_path / f"gtFine/{split}/{city}/{stem}_gtFine_labelIds.png", encoded(ids))
    train, evaluation, classes = load_cityscapes(tmp_path)
    assert classes[0] == "road"
    assert len(classes) == 19
    assert len(train) == len(evaluation) == 1
    np.testing.assert_array_equal(train[0]["label"], cityscapes_train_ids()[ids])
    assert evaluation[0]["name"].endswith("ulm_000000_000019_leftImg8bit.png")
    write(
        tmp_path / "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png",
        encoded(np.full((4, 8), 99, np.uint8)),
    )
    with pytest.raises(UndecodableError, match=r"99 \(32 pixels\)"):
        train[0]


def test_train_ids_are_those_of_the_cityscapes_package():
    labels = pytest.importorskip("cityscapesscripts.helpers.labels").labels
    table = cityscapes_train_ids()
    for label in labels:
        assert table[label.id % 256] == (label.trainId if 0 <= label.trainId < 255 else IGNORE)
        if 0 <= label.trainId < 255:
            entry = CITYSCAPES[label.trainId]
            assert (entry.name, entry.color) == (label.name, label.color)


# Crops.


def example(rng, height=40, width=60):
    """The label is a function of the color, so that one can be checked against the other."""
    label = np.zeros((height, width), np.uint8)
    label[:, width // 2 :] = 1
    label[height // 2 :, : width // 3] = 2
    return {"image": np.stack([100 * label] * 3, axis=-1), "label": label}


def uniform(label, reach):
    """Whether all pixels of a square around a pixel have its label."""
    padded = np.pad(label, reach, constant_values=254)  # what is beyond the crop is unknown
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * reach + 1,) * 2)
    return (windows == label[..., None, None]).all(axis=(2, 3))


@pytest.mark.parametrize("size", [24, 90])
def test_image_and_label_move_together(rng, size):
    crop = JointCrop(blur=0.0, fill=(251.0,) * 3)
    for number in range(30):
        image, label = crop(example(rng), size, np.random.default_rng(number))
        assert image.shape == (size, size, 3)
        assert label.shape == (size, size)
        inside = label != IGNORE
        wrong = np.abs(image[..., 0].astype(int) - np.where(inside, 100 * label.astype(int), 251))
        # Bilinear and nearest differ at edges alone.
        away = uniform(label, reach=4)
        assert wrong[away].max(initial=0) <= 2
        assert away.any()
        assert set(np.unique(label)) <= {0, 1, 2, IGNORE}


def test_crops_are_functions_of_the_random_numbers(rng):
    crop, scene = JointCrop(), example(rng)
    first, again = (crop(scene, 24, np.random.default_rng(3)) for _ in range(2))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    other = crop(scene, 24, np.random.default_rng(4))
    assert (first[0] != other[0]).any()


def test_every_crop_is_equally_likely(rng):
    """Without the other operations: all places, and each about as often."""
    crop = JointCrop(scale=(1.0, 1.0), rotate=0.0, blur=0.0, flip=0.0)
    label = np.arange(30, dtype=np.uint8).reshape(5, 6)
    scene = {"image": np.stack([label] * 3, axis=-1), "label": label}
    places = np.zeros(30, int)
    for number in range(600):
        image, part = crop(scene, 4, np.random.default_rng(number))
        np.testing.assert_array_equal(image[..., 0], part)
        places[part[0, 0]] += 1
    assert (places > 0).sum() == 2 * 3
    assert places[places > 0].min() > 60


def test_flips_mirror_both(rng):
    crop = JointCrop(scale=(1.0, 1.0), rotate=0.0, blur=0.0, flip=1.0)
    scene = example(rng, 24, 24)
    image, label = crop(scene, 24, np.random.default_rng(0))
    np.testing.assert_array_equal(image, scene["image"][:, ::-1])
    np.testing.assert_array_equal(label, scene["label"][:, ::-1])


def test_what_is_outside_is_ignored():
    """Half of the border on each side, of the mean color."""
    crop = JointCrop(scale=(1.0, 1.0), rotate=0.0, blur=0.0, flip=0.0, fill=(1.0, 2.0, 3.0))
    scene = {"image": np.full((4, 6, 3), 9, np.uint8), "label": np.zeros((4, 6), np.uint8)}
    image, label = crop(scene, 9, np.random.default_rng(0))
    assert (label == 0).sum() == 24
    assert (label[2:6, 1:7] == 0).all()
    assert (image[label == IGNORE] == (1, 2, 3)).all()


def test_scales_cover_the_range(rng):
    """Rows of known width come back between half and twice as wide."""
    crop = JointCrop(rotate=0.0, blur=0.0, flip=0.0)
    label = np.zeros((40, 40), np.uint8)
    label[10:30] = 1
    scene = {"image": np.stack([label] * 3, axis=-1), "label": label}
    heights = [
        (crop(scene, 80, np.random.default_rng(n))[1] == 1).any(axis=1).sum() for n in range(40)
    ]
    assert min(heights) >= 10
    assert max(heights) <= 40
    assert min(heights) < 14
    assert max(heights) > 34


def test_crops_may_be_rectangular(rng):
    image, label = JointCrop()(example(rng), (20, 33), rng)
    assert image.shape == (20, 33, 3)
    assert label.shape == (20, 33)


def test_evaluation_images_have_one_size(rng):
    """The image is in the corner, as it is; the border is ignored."""
    scene = example(rng, 10, 12)
    whole = WholeImage((12, 16), fill=(5.0, 6.0, 7.0))
    image, label = whole(scene)
    assert image.shape == (12, 16, 3)
    np.testing.assert_array_equal(image[:10, :12], scene["image"])
    np.testing.assert_array_equal(label[:10, :12], scene["label"])
    assert (label == IGNORE).sum() == 12 * 16 - 10 * 12
    assert (image[label == IGNORE] == (5, 6, 7)).all()
    with pytest.raises(UndecodableError, match=r"b\.png has 13x12 pixels, more than 12x16"):
        whole({**example(rng, 13, 12), "name": "b.png"})
