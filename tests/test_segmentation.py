"""What segmenters minimize and report, and how whole images are evaluated."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax.segmentation.inference import MMSEG, PROTOCOLS, SEMSEG, Protocol, predict, scores
from repvgg_jax.segmentation.labels import CITYSCAPES, IGNORE, class_colors, distinct_colors
from repvgg_jax.segmentation.loss import pixel_cross_entropy, segmentation_loss
from repvgg_jax.segmentation.metrics import Scores, confusion
from repvgg_jax.segmentation.pictures import colorize, grid, overlay
from repvgg_jax.segmentation.task import Segmentation
from tests.helpers.jit import quick_jit

CLASSES = 4


# The loss.


def test_ignored_pixels_do_not_count(rng):
    """The loss and its gradient are those of the labeled pixels alone."""
    logits = rng.normal(size=(2, 5, 7, CLASSES)).astype(np.float32)
    labels = rng.integers(0, CLASSES, (2, 5, 7)).astype(np.uint8)
    labels[0, :3] = IGNORE
    value, gradient = quick_jit(jax.value_and_grad(pixel_cross_entropy))(logits, labels)
    kept = np.asarray(logits)[labels != IGNORE].astype(np.float64)
    of_label = kept[np.arange(len(kept)), labels[labels != IGNORE]]
    expected = np.mean(np.log(np.exp(kept).sum(-1)) - of_label)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert not np.asarray(gradient)[0, :3].any()
    assert np.abs(np.asarray(gradient)[1]).min() > 0


def test_a_batch_without_labels_has_loss_zero():
    labels = np.full((1, 3, 3), IGNORE, np.uint8)
    logits = np.full((1, 3, 3, CLASSES), 30.0, np.float32)
    loss = jax.value_and_grad(lambda x: segmentation_loss(x, {"aux": x}, labels))
    value, gradient = quick_jit(loss)(logits)
    assert value == 0
    assert not np.asarray(gradient).any()


def test_the_auxiliary_head_has_its_weight(rng):
    main, head = rng.normal(size=(2, 1, 3, 3, CLASSES)).astype(np.float32)
    labels = rng.integers(0, CLASSES, (1, 3, 3))
    labels[0, 0, 0] = 9
    alone = quick_jit(lambda x: pixel_cross_entropy(x, labels, ignore=9))
    parts = [alone(x) for x in (main, head)]
    both = quick_jit(
        lambda x, y: segmentation_loss(x, {"head": y}, labels, auxiliary_weight=0.25, ignore=9)
    )(main, head)
    np.testing.assert_allclose(both, parts[0] + 0.25 * parts[1], rtol=1e-6)


# Metrics.


def counted(predictions, labels):
    """The matrix, pixel by pixel."""
    matrix = np.zeros((CLASSES, CLASSES), np.int64)
    for label, prediction in zip(labels.ravel(), predictions.ravel(), strict=True):
        if label != IGNORE:
            matrix[label, prediction] += 1
    return matrix


def test_confusion_counts_pixels(rng):
    labels = rng.choice([0, 1, 2, IGNORE], (2, 9, 11)).astype(np.uint8)
    predictions = rng.integers(0, CLASSES, labels.shape)
    matrix = quick_jit(confusion, static_argnums=2)(predictions, labels, CLASSES)
    np.testing.assert_array_equal(matrix, counted(predictions, labels))


def test_any_split_into_batches_gives_the_same_matrix(rng):
    """Integers add up exactly, and beyond what float32 can count."""
    labels = rng.integers(0, CLASSES, (6, 8, 8))
    predictions = rng.integers(0, CLASSES, labels.shape)
    whole = np.asarray(confusion(predictions, labels, CLASSES), np.int64)
    parts = [confusion(predictions[i : i + 2], labels[i : i + 2], CLASSES) for i in (0, 2, 4)]
    np.testing.assert_array_equal(np.sum(parts, axis=0, dtype=np.int64), whole)
    many = Scores(whole + 2**40 * np.eye(CLASSES, dtype=np.int64))
    assert many.matrix[0, 0] == whole[0, 0] + 2**40


def test_scores_by_hand():
    """Class 0 is half found, class 1 is found and also claims the rest, class 2 occurs nowhere."""
    scores = Scores(np.array([[4, 4, 0], [0, 2, 0], [0, 0, 0]]))
    np.testing.assert_allclose(scores.iou, [4 / 8, 2 / 6, np.nan])
    np.testing.assert_allclose(scores.class_accuracy, [0.5, 1.0, np.nan])
    assert scores.pixel_accuracy == 0.6
    assert scores.miou() == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert scores.miou(absent=0.0) == pytest.approx((1 / 2 + 1 / 3) / 3)


def test_without_any_label_scores_are_nan():
    scores = Scores(np.zeros((3, 3)))
    assert np.isnan(scores.pixel_accuracy)
    assert np.isnan(scores.miou())
    assert np.isnan(scores.miou(absent=0.0))
    with pytest.raises(ValueError, match="square"):
        Scores(np.zeros((3, 2)))


def test_scores_are_those_of_the_cityscapes_evaluator(rng, monkeypatch):
    """On the same predictions, by class and on average, with ignored pixels and absent classes."""
    monkeypatch.setenv("CITYSCAPES_DATASET", "/nonexistent")
    evaluator = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    labels_of = importlib.import_module("cityscapesscripts.helpers.labels")
    by_train_id = {label.trainId: label for label in labels_of.labels if 0 <= label.trainId < 19}
    truth = rng.choice([*range(17), IGNORE], (40, 50))
    predictions = rng.integers(0, 18, truth.shape)
    predictions = np.where(rng.uniform(size=truth.shape) < 0.6, np.minimum(truth, 18), predictions)
    ids = [label.id for label in labels_of.labels if label.id >= 0]
    monkeypatch.setattr(evaluator.args, "evalLabels", ids)
    size = max(ids) + 1
    matrix = np.zeros((size, size), np.ulonglong)
    for label, prediction in zip(truth.ravel(), predictions.ravel(), strict=True):
        # Ignored pixels have any id that is not evaluated, here the ego vehicle.
        row = 1 if label == IGNORE else by_train_id[label].id
        matrix[row, by_train_id[prediction].id] += 1
    theirs = {
        by_train_id[k].name: evaluator.getIouScoreForLabel(
            by_train_id[k].id, matrix, evaluator.args
        )
        for k in range(19)
    }
    ours = Scores(confusion(jnp.asarray(predictions), jnp.asarray(truth), 19))
    np.testing.assert_allclose(ours.iou, list(theirs.values()), rtol=1e-12)
    average = evaluator.getScoreAverage(theirs, evaluator.args)
    assert ours.miou() == pytest.approx(average, rel=1e-12)
    assert np.isnan(ours.iou).sum() == 1  # class 18 occurs nowhere, and 17 is only predicted


# Whole images.


def network(images):
    """Logits that depend on every pixel's neighborhood, and on left and right."""
    return by_hand(images, jnp)


def by_hand(images, np=np):
    shifted = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    right = shifted[:, 1:-1, 2:]
    below = shifted[:, 2:, 1:-1]
    return np.concatenate([images.sum(-1, keepdims=True), right - below], axis=-1)


@pytest.fixture
def images(rng):
    return rng.normal(size=(2, 20, 31, 3)).astype(np.float32)


def softmax(x):
    power = np.exp(x - x.max(-1, keepdims=True))
    return power / power.sum(-1, keepdims=True)


@pytest.mark.parametrize("window", [8, 20, 25, 40])
def test_windows_are_averaged_where_they_overlap(images, window):
    """Also of images smaller than a window along one axis or both."""
    protocol = Protocol(window=window, average="logits")
    ours = quick_jit(lambda x: scores(network, x, CLASSES, protocol))(images)
    missing = [max(0, window - side) for side in (20, 31)]
    border = [(n // 2, n - n // 2) for n in missing]
    padded = np.pad(images, ((0, 0), *border, (0, 0)))
    total = np.zeros((*padded.shape[:3], CLASSES))
    times = np.zeros(padded.shape[1:3])
    step = -(-2 * window // 3)
    rows, columns = (
        sorted({min(start, side - window) for start in range(0, side, step)})
        for side in padded.shape[1:3]
    )
    for row in rows:
        for column in columns:
            part = np.s_[row : row + window, column : column + window]
            total[:, part[0], part[1]] += by_hand(padded[:, part[0], part[1]])
            times[part] += 1
    expected = (total / times[..., None])[
        :, border[0][0] : border[0][0] + 20, border[1][0] : border[1][0] + 31
    ]
    assert times.min() == 1
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_mirror_images_are_averaged_as_probabilities(images):
    protocol = Protocol(flip=True)
    ours = np.asarray(quick_jit(lambda x: scores(network, x, CLASSES, protocol))(images))
    mirrored = softmax(by_hand(images[:, :, ::-1]))[:, :, ::-1]
    expected = (softmax(by_hand(images)) + mirrored) / 2
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    np.testing.assert_allclose(ours.sum(-1), 1, atol=1e-5)


def test_scales_are_averaged_at_the_size_of_the_image():
    """A constant image has the same scores at every scale."""
    flat = np.full((1, 12, 18, 3), 0.7, np.float32)

    def everywhere(images):
        return images.mean(-1, keepdims=True) * jnp.arange(CLASSES).reshape(1, 1, 1, -1)

    protocol = Protocol(scales=(0.5, 1.0, 1.75), window=9)
    ours = quick_jit(lambda x: scores(everywhere, x, CLASSES, protocol))(flat)
    expected = softmax(0.7 * np.arange(CLASSES))
    assert ours.shape == (1, 12, 18, CLASSES)
    np.testing.assert_allclose(ours, np.broadcast_to(expected, ours.shape), atol=1e-6)


def test_windows_are_a_loop_of_the_program(images):
    """Its size does not grow with their number: the network is in it once."""

    def convolutions(protocol):
        kernel = jnp.ones((3, 3, 3, CLASSES))

        def convolve(x):
            dimensions = ("NHWC", "HWIO", "NHWC")
            return jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=dimensions
            )

        traced = jax.jit(lambda x: predict(convolve, x, CLASSES, protocol)).lower(images)
        return traced.as_text().count("stablehlo.convolution")

    assert convolutions(Protocol(window=6)) == convolutions(Protocol(window=16, flip=True)) == 1


def test_protocols_of_cityscapes():
    """2x4 windows of semseg, 2x4 of mmsegmentation, over 1024x2048 pixels."""
    assert SEMSEG.step == 476
    assert SEMSEG.starts(1024) == (0, 311)
    assert SEMSEG.starts(2048) == (0, 476, 952, 1335)
    assert MMSEG.starts(1024) == (0, 255)
    assert MMSEG.starts(2048) == (0, 513, 1026, 1279)
    assert SEMSEG.flip
    assert not MMSEG.flip
    assert PROTOCOLS["whole"].window is None
    assert Protocol(window=7).starts(7) == (0,)


@pytest.mark.parametrize(
    "options", [{"window": 0}, {"window": 8, "stride": 9}, {"scales": ()}, {"average": "votes"}]
)
def test_protocols_that_cannot_be(options):
    with pytest.raises(ValueError, match="must be"):
        Protocol(**options)


def test_a_network_of_other_classes_than_asked_for():
    images = np.zeros((1, 6, 9, 3), np.float32)
    with pytest.raises(ValueError, match="num_classes=7, but the network gives 3"):
        predict(lambda x: x, images, 7, Protocol(window=4))


# The task.


def test_metrics_do_not_depend_on_the_batches(rng):
    """Blanks that fill the last batch count nowhere; unlabeled images only as images."""
    task = Segmentation(num_classes=CLASSES)
    logits = rng.normal(size=(4, 6, 7, CLASSES)).astype(np.float32)
    labels = rng.choice([0, 1, 2, IGNORE], (4, 6, 7)).astype(np.uint8)
    labels[2] = IGNORE
    outputs = np.asarray(quick_jit(lambda x: task.outputs(lambda images: images, x))(logits))
    evaluate = quick_jit(task.evaluate)

    def counts(*images, mask):
        batch = {"label": labels[list(images)], "mask": np.array(mask)}
        return jax.device_get(evaluate(outputs[list(images)], batch))

    whole = task.means([counts(0, 1, 2, mask=[True] * 3)])
    split = task.means([counts(0, 1, mask=[True, True]), counts(2, 3, mask=[True, False])])
    expected = Scores(counted(logits[:2].argmax(-1), labels[:2]))
    for means in (whole, split):
        assert means["miou"] == expected.miou()
        assert means["accuracy"] == expected.pixel_accuracy
        np.testing.assert_array_equal(means["class_iou"], expected.iou)
        assert means["images"] == 3
        loss = quick_jit(pixel_cross_entropy)(logits[:3], labels[:3])
        assert means["loss"] == pytest.approx(float(loss), rel=1e-5)


def test_training_metrics_are_of_labeled_pixels(rng):
    task = Segmentation(num_classes=CLASSES, auxiliary_weight=0.5)
    labels = rng.choice([0, 1, IGNORE], (1, 4, 4)).astype(np.uint8)
    targets = np.asarray(task.targets(labels))
    right = 10 * (targets[..., None] == np.arange(CLASSES)).astype(np.float32)
    loss, metrics = quick_jit(task.loss)(right, {"aux": np.zeros_like(right)}, targets)
    assert metrics["accuracy"] == 1
    assert metrics["loss"] == loss
    assert float(loss) == pytest.approx(0.5 * np.log(CLASSES), abs=1e-3)


# Pictures.


def test_every_class_has_a_color_of_its_own():
    colors = distinct_colors(200)
    assert len({tuple(color) for color in colors}) == 200
    np.testing.assert_array_equal(colors[:4], [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]])
    np.testing.assert_array_equal(class_colors(["Background", "a", "b"]), colors[:3])
    # A first class that is not the background is seen, too.
    np.testing.assert_array_equal(class_colors(["a", "b", "c"]), colors[1:4])


def test_cityscapes_has_its_own_colors():
    names = [entry.name for entry in CITYSCAPES]
    np.testing.assert_array_equal(class_colors(names)[[0, 10]], [[128, 64, 128], [70, 130, 180]])
    assert len({tuple(color) for color in class_colors(names)}) == 19
    assert class_colors(names[:18])[0].tolist() != [128, 64, 128]


def test_overlays_keep_ignored_pixels_and_the_background():
    image = np.full((2, 2, 1), 100, np.uint8)
    mask = np.array([[0, 1], [IGNORE, 1]], np.uint8)
    shown = overlay(image, mask, np.array([[0, 0, 0], [200, 0, 0]], np.uint8))
    np.testing.assert_array_equal(shown[1, 0], [100] * 3)
    np.testing.assert_array_equal(shown[0, 0], [100] * 3)
    np.testing.assert_array_equal(shown[0, 1], [160, 40, 40])
    shown = overlay(image, mask, class_colors(["road", "sky"]))
    np.testing.assert_array_equal(shown[0, 0], [117, 40, 40])
    assert (colorize(mask, distinct_colors(2))[1, 0] == 255).all()


def test_the_grid_shows_errors(rng):
    images = rng.integers(0, 255, (2, 6, 8, 3)).astype(np.uint8)
    labels = rng.integers(0, 3, (2, 6, 8)).astype(np.uint8)
    predictions = labels.copy()
    predictions[0, 2, 3] = (labels[0, 2, 3] + 1) % 3
    figure = grid(images, labels, predictions, ("road", "sky", "car"))
    assert len(figure.axes) == 8
    error = np.asarray(figure.axes[3].images[0].get_array())
    changed = (error != images[0]).any(-1)
    assert changed.sum() == 1
    assert changed[2, 3]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["road", "sky", "car"]
