"""Classes belong to a run: other data are refused, or matched by name where that is asked for."""

import dataclasses
import json
import logging
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from repvgg_jax import fuse_params, save_weights
from repvgg_jax.convert.output import Output
from repvgg_jax.convert.pipeline import convert
from repvgg_jax.convert.source import from_run
from repvgg_jax.data.identity import (
    DataIdentity,
    class_difference,
    fingerprint,
    with_classes,
)
from repvgg_jax.data.sources import ArraySource, load_digits, load_folder
from repvgg_jax.data.splits import hold_out
from repvgg_jax.export import parse_targets
from repvgg_jax.train.classes import fit_head
from repvgg_jax.train.evaluate import evaluate_only
from repvgg_jax.train.experiment import Experiment
from repvgg_jax.train.loop import train
from repvgg_jax.train.proof_images import validation_images
from repvgg_jax.train.restore import load_run, load_source, starting_state
from repvgg_jax.train.workdir import Workdir
from tests.helpers.runs import small_config, small_settings

SHADES = {"ash": 30, "bone": 230, "coal": 5, "dusk": 120}


def write_tree(root, shades=SHADES, images=(12, 4)):
    """A folder per class, gray images of its shade."""
    rng = np.random.default_rng(0)
    for split, count in zip(("train", "val"), images, strict=True):
        for name, shade in shades.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.integers(-5, 6, (9, 9, 3)) + shade, 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


def tree_config(root, **overrides):
    """Three epochs of six steps."""
    return small_config(
        data__source=f"folder:{root}",
        data__train_size=8,
        data__mean=(0.4,) * 3,
        data__std=(0.3,) * 3,
        augment__affine__shift=0.0,
        train__batch_size=8,
        train__epochs=3,
        eval__batch_size=16,
        **overrides,
    )


@pytest.fixture(scope="module")
def shades_run(tmp_path_factory):
    """A tree, and a finished run on it."""
    path = tmp_path_factory.mktemp("shades")
    outcome = train(tree_config(write_tree(path / "data")), path / "run")
    assert outcome.accuracy > 0.6  # so that other labels show
    return path


@pytest.fixture
def renamed(shades_run, tmp_path):
    """The run with its tree, in which the first class has become the last one."""
    shutil.copytree(shades_run, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["data"]["source"] = f"folder:{tmp_path / 'data'}"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    for split in ("train", "val"):
        (tmp_path / "data" / split / "ash").rename(tmp_path / "data" / split / "zinc")
    return tmp_path


class TestIdentity:
    """What is stored of a data set tells it from others."""

    def test_it_is_stored_when_a_run_starts(self, shades_run):
        stored = Workdir(shades_run / "run").read_metadata()
        assert stored.classes == tuple(SHADES)
        assert stored.data.train.per_class == (12, 12, 12, 12)
        assert (stored.data.train.images, stored.data.evaluation.images) == (48, 16)
        dataset = Experiment.from_config(tree_config(shades_run / "data")).dataset
        assert DataIdentity.of(dataset) == stored.data

    def test_what_a_fingerprint_covers(self, tmp_path):
        train_images, _, _ = load_folder(write_tree(tmp_path / "a"))
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        assert fingerprint(load_folder(tmp_path / "b")[0]) == fingerprint(train_images)
        (tmp_path / "b/train/coal/3.png").rename(tmp_path / "b/train/coal/33.png")
        assert fingerprint(load_folder(tmp_path / "b")[0]) != fingerprint(train_images)
        digits, *_ = load_digits()
        labels = digits.labels.copy()
        labels[7] = (labels[7] + 1) % 10
        images = digits.images.copy()
        images[-1, 0, 0] ^= 1
        found = {
            fingerprint(source)
            for source in (
                digits,
                ArraySource(digits.images, labels),
                ArraySource(images, digits.labels),
                ArraySource(digits.images[:-1], digits.labels[:-1]),
            )
        }
        assert len(found) == 4

    def test_differences_are_named(self):
        assert class_difference(("a", "b"), ("a", "b")) == ""
        assert "label 0 is 'b', not 'a'" in class_difference(("a", "b"), ("b", "a"))
        found = class_difference(("a", "b"), ("b", "c", "d"))
        assert found == "2 classes -> 3; missing: a; new: c, d"

    def test_classes_matched_by_name(self, tmp_path):
        config = tree_config(write_tree(tmp_path))
        dataset = Experiment.from_config(config).dataset
        found = with_classes(dataset, ("dusk", "new", "coal", "bone", "ash"))
        assert found.classes[4] == "ash"
        assert [found.train[i]["label"] for i in (0, 12, 24, 36)] == [4, 3, 2, 0]
        assert found.train.labels[::12].tolist() == [4, 3, 2, 0]
        with pytest.raises(ValueError, match=r"1 classes .* ash"):
            with_classes(dataset, ("dusk", "coal", "bone"))
        with pytest.raises(ValueError, match="same name"):
            with_classes(dataset, ("dusk", "coal", "bone", "ash", "ash"))


class TestEvaluation:
    def test_a_renamed_class_is_refused(self, renamed):
        config = tree_config(renamed / "data")
        with pytest.raises(ValueError, match=r"missing: ash; new: zinc.*init_from"):
            evaluate_only(config, renamed / "run")
        with pytest.raises(ValueError, match="zinc"):
            evaluate_only(config, renamed / "run", other_data=True)

    def test_a_subset_is_matched_by_name(self, renamed, shades_run, caplog):
        whole = evaluate_only(tree_config(shades_run / "data"), shades_run / "run")
        for split in ("train", "val"):
            shutil.rmtree(renamed / "data" / split / "zinc")
        config = tree_config(renamed / "data")
        with pytest.raises(ValueError, match=r"4 classes -> 3; missing: ash; .*--other_data"):
            evaluate_only(config, renamed / "run")
        part = evaluate_only(config, renamed / "run", other_data=True)
        np.testing.assert_array_equal(
            part.trained["class_accuracy"][1:], whole.trained["class_accuracy"][1:]
        )
        assert np.isnan(part.trained["class_accuracy"][0])
        assert part.classes == tuple(SHADES)

    def test_other_images_of_the_same_classes_are_named(self, renamed, caplog):
        for split in ("train", "val"):
            (renamed / "data" / split / "zinc").rename(renamed / "data" / split / "ash")
        (renamed / "data" / "val" / "coal" / "0.png").unlink()
        evaluate_only(tree_config(renamed / "data"), renamed / "run")
        (record,) = (r for r in caplog.records if r.levelno == logging.WARNING)
        assert "16 -> 15 images (coal 4 -> 3)" in record.getMessage()

    def test_a_converted_directory_knows_its_classes(self, renamed, shades_run):
        output = Output(shades_run / "deploy")
        targets = parse_targets(["safetensors"])
        convert(from_run(shades_run / "run"), output, targets=targets)
        for source in (output.path, output.path / "model.safetensors"):
            with pytest.raises(ValueError, match="missing: ash; new: zinc"):
                evaluate_only(
                    tree_config(renamed / "data"), renamed / "none", init_from=str(source)
                )


class TestResuming:
    def test_other_data_are_refused_and_nothing_is_written(self, renamed):
        before = (renamed / "run" / "metadata.json").read_bytes()
        with pytest.raises(ValueError, match=r"other classes.*new: zinc"):
            train(tree_config(renamed / "data"), renamed / "run")
        for split in ("train", "val"):
            (renamed / "data" / split / "zinc").rename(renamed / "data" / split / "ash")
        (renamed / "data" / "train" / "dusk" / "5.png").unlink()
        with pytest.raises(ValueError, match=r"48 -> 47 images \(dusk 12 -> 11\); .*--other_data"):
            train(tree_config(renamed / "data"), renamed / "run")
        assert (renamed / "run" / "metadata.json").read_bytes() == before

    def test_other_images_are_accepted_if_asked(self, renamed):
        for split in ("train", "val"):
            (renamed / "data" / split / "zinc").rename(renamed / "data" / split / "ash")
        (renamed / "data" / "val" / "dusk" / "1.png").unlink()
        train(tree_config(renamed / "data"), renamed / "run", other_data=True)
        stored = Workdir(renamed / "run").read_metadata()
        assert stored.data.evaluation.per_class == (4, 4, 4, 3)
        train(tree_config(renamed / "data"), renamed / "run")  # they are the run's now

    def test_a_run_that_knows_names_only(self, renamed):
        path = renamed / "run" / "metadata.json"
        content = json.loads(path.read_text())
        del content["data"]
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="zinc"):
            train(tree_config(renamed / "data"), renamed / "run")


class TestConversion:
    def test_names_are_the_runs(self, renamed):
        given = from_run(renamed / "run")
        assert given.labels == tuple(SHADES)
        assert "not those of the run" in given.image_source

    def test_a_head_of_another_number_of_classes(self, renamed):
        path = renamed / "run" / "metadata.json"
        content = json.loads(path.read_text())
        content["classes"] = content["classes"][:3]
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="4 classes, but 3"):
            load_run(renamed / "run")

    def test_images_of_another_shape_are_not_used(self, shades_run, tmp_path):
        run = load_run(shades_run / "run")
        settings = dataclasses.replace(run.settings, data=small_settings().data)
        images, text = validation_images(dataclasses.replace(run, settings=settings), 5)
        assert images.shape[1:] == (8, 8, 3)
        assert "another shape" in text

    def test_images_from_a_directory(self, shades_run, tmp_path):
        run, val = load_run(shades_run / "run"), shades_run / "data" / "val"
        wanted, _ = validation_images(run, 16)
        for data in (shades_run / "data", val, f"folder:{shades_run / 'data'}"):
            found, text = validation_images(run, 16, data=str(data))
            np.testing.assert_array_equal(found, wanted)
            assert str(data) in text
        with pytest.raises(ValueError, match="folder"):
            validation_images(run, 16, data=str(val / "ash"))


class TestStartingFromOtherClasses:
    @pytest.fixture
    def weights(self, shades_run):
        return load_source(str(shades_run / "run"), small_settings()).weights

    def test_the_order_is_that_of_the_data(self, weights):
        kernel = weights.variables["params"]["head"]["kernel"]
        kept, note = fit_head(weights, tuple(SHADES), tuple(SHADES))
        assert (kept is weights, note) == (True, "")
        found, note = fit_head(weights, ("a", "b", "c", "d"), ("d", "a", "c", "b"))
        assert "reordered" in note
        head = found.variables["params"]["head"]
        np.testing.assert_array_equal(head["kernel"], kernel[:, [3, 0, 2, 1]])
        old = weights.variables["params"]["head"]["bias"]
        np.testing.assert_array_equal(head["bias"], old[[3, 0, 2, 1]])

    def test_as_many_other_classes_get_a_fresh_head(self, renamed, caplog):
        caplog.set_level(logging.INFO, logger="repvgg_jax")
        config = tree_config(renamed / "data", init_from=str(renamed / "run"))
        state = starting_state(Experiment.from_config(config))
        trained = load_run(renamed / "run").variables["params"]
        assert np.abs(state.params["head"]["kernel"] - trained["head"]["kernel"]).max() > 1e-3
        np.testing.assert_array_equal(
            state.params["stem"]["conv3x3"]["kernel"], trained["stem"]["conv3x3"]["kernel"]
        )
        assert "new: zinc" in caplog.text
        assert "freshly initialized: head" in caplog.text

    def test_weights_without_names_count(self, shades_run, tmp_path, caplog):
        caplog.set_level(logging.INFO, logger="repvgg_jax")
        run = load_run(shades_run / "run")
        path = tmp_path / "w.npz"
        variant = run.model.variant
        save_weights(path, fuse_params(run.variables), family="flax", variant=variant)
        config = tree_config(shades_run / "data", init_from=str(path))
        state = starting_state(Experiment.from_config(config))
        np.testing.assert_allclose(
            state.params["head"]["kernel"], run.variables["params"]["head"]["kernel"]
        )
        assert "do not name their classes" in caplog.text


def test_data_that_were_moved_are_the_same(shades_run, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="repvgg_jax")
    shutil.copytree(shades_run, tmp_path / "moved")
    outcome = train(tree_config(tmp_path / "moved" / "data"), tmp_path / "moved" / "run")
    assert outcome.step == 18
    assert f"-> 'folder:{tmp_path / 'moved' / 'data'}'" in caplog.text


class TestSplits:
    """A test set alone, folders of other names, and images that are held out."""

    def test_a_test_set_alone(self, shades_run, tmp_path):
        config = tree_config(shades_run / "data")
        whole = evaluate_only(config, shades_run / "run")
        shutil.copytree(shades_run / "data" / "val", tmp_path / "set" / "test")
        for root, split in ((tmp_path / "set", "test"), (tmp_path / "set" / "test", ".")):
            config.data.source, config.data.eval_split = f"folder:{root}", split
            found = evaluate_only(config, shades_run / "run")
            assert found.total == 16
            np.testing.assert_array_equal(found.trained["confusion"], whole.trained["confusion"])
        with pytest.raises(ValueError, match="train is not a directory"):
            Experiment.from_config(config)

    def test_folders_of_other_names(self, shades_run, tmp_path):
        shutil.copytree(shades_run / "data" / "val", tmp_path / "validation")
        shutil.copytree(shades_run / "data" / "train", tmp_path / "fit")
        found = Experiment.from_config(tree_config(tmp_path, data__train_split="fit")).dataset
        assert (len(found.train), len(found.evaluation)) == (48, 16)
        assert (found.train.root.name, found.evaluation.root.name) == ("fit", "validation")
        config = tree_config(tmp_path, data__train_split="fit", data__eval_split="none")
        with pytest.raises(ValueError, match="none is not a directory"):
            Experiment.from_config(config)

    def test_a_share_of_each_class_is_held_out(self, shades_run, tmp_path):
        shutil.copytree(shades_run / "data" / "train", tmp_path / "train")
        config = tree_config(tmp_path, data__holdout=0.25)
        found = Experiment.from_config(config).dataset
        assert np.bincount(found.evaluation.labels).tolist() == [3, 3, 3, 3]
        assert np.bincount(found.train.labels).tolist() == [9, 9, 9, 9]
        every = [
            source[i]["name"]
            for source in (found.train, found.evaluation)
            for i in range(len(source))
        ]
        assert len(set(every)) == 48
        again = Experiment.from_config(config).dataset
        assert DataIdentity.of(again) == DataIdentity.of(found)
        assert pickle.loads(pickle.dumps(found.train))[7]["name"] == found.train[7]["name"]

    def test_small_classes_keep_an_image_on_either_side(self):
        labels = np.array([0] * 50 + [1] * 2 + [2])
        source = ArraySource(np.arange(53, dtype=np.uint8)[:, None, None, None], labels)
        for share in (0.01, 0.5, 0.99):
            rest, held = hold_out(source, share)
            assert {1, 2} <= set(rest.labels)
            assert set(held.labels) == {0, 1}
            assert sorted([*rest.numbers, *held.numbers]) == list(range(53))
        with pytest.raises(ValueError, match="too few"):
            hold_out(ArraySource(source.images[:1], labels[:1]), 0.5)

    def test_in_memory_and_without_labels(self):
        dataset = Experiment.from_config(small_config(data__holdout=0.1)).dataset
        assert len(dataset.train) + len(dataset.evaluation) == 1437
        assert dataset.image_shape == (8, 8, 1)
        assert min(np.bincount(dataset.evaluation.labels)) >= 13

        class Plain(list):
            pass

        rest, held = hold_out(Plain({"label": 0, "image": i} for i in range(10)), 0.3)
        assert (len(rest), len(held), held.labels, held.names) == (7, 3, None, None)
        assert {rest[i]["image"] for i in range(7)}.isdisjoint(held[i]["image"] for i in range(3))
