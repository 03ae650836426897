"""Weights to start from and to convert: of runs, files and the hub."""

import dataclasses
import json
import logging
import pathlib
import re
import shutil

import chex
import jax
import numpy as np
import pytest

from repvgg_jax import create_model, fuse_params, save_weights, to_state_dict
from repvgg_jax.data.dataset import load
from repvgg_jax.data.sources import photo_crops
from repvgg_jax.export import export
from repvgg_jax.train import loop, resume
from repvgg_jax.train.experiment import Experiment
from repvgg_jax.train.proof_images import validation_images
from repvgg_jax.train.restore import load_run, load_source, starting_state
from repvgg_jax.train.workdir import Workdir
from tests.helpers import export_networks as nets
from tests.helpers.runs import SMALL, final_state, small_config, small_settings
from tests.helpers.trees import random_variables

OLD = pathlib.Path(__file__).parent / "data" / "v0.1-0164ae8" / "run"


@pytest.fixture(autouse=True)
def _log_everything(caplog):
    caplog.set_level(logging.INFO, logger="repvgg_jax")


class TestLoadRun:
    """A run's weights need neither its data nor its optimizer."""

    def test_what_is_in_a_run(self, small_run):
        run = load_run(small_run[0])
        assert str(run) == f"step 22 of {small_run[0]}"
        assert run.settings == resume.started(small_settings(), "cpu")
        assert run.classes == tuple("0123456789")
        assert (run.normalize.mean, run.normalize.std) == ((0.305,), (0.376,))
        assert run.eval_shape == run.metadata.image_shape == (8, 8, 1)
        assert (run.model.variant, run.model.num_classes) == (SMALL, 10)
        chex.assert_trees_all_equal(run.variables, final_state(small_run[0]).variables)
        assert load_run(Workdir(small_run[0]), step=11).step == 11

    @pytest.fixture
    def elsewhere(self, small_run, tmp_path):
        """The run on a machine without its data."""
        path = tmp_path / "run"
        shutil.copytree(small_run[0], path)
        content = json.loads((path / "config.json").read_text())
        content["data"]["source"] = "folder:/data/that/is/not/here"
        content["data"]["train_size"] = 8
        (path / "config.json").write_text(json.dumps(content))
        return path

    def test_without_its_data(self, small_run, elsewhere):
        run = load_run(elsewhere)
        chex.assert_trees_all_equal(run.variables, load_run(small_run[0]).variables)
        assert run.classes == tuple("0123456789")
        images, _ = validation_images(run, 9)
        assert (images.shape[1:], images.dtype) == ((8, 8, 1), np.uint8)
        np.testing.assert_allclose(images, photo_crops(8).mean(-1, keepdims=True), atol=0.5)

    def test_starting_from_it(self, small_run, elsewhere):
        config = small_config(init_from=str(elsewhere), optimizer__name="adamw")
        state = starting_state(Experiment.from_config(config))
        trained = final_state(small_run[0]).variables
        chex.assert_trees_all_equal(jax.device_get(state.variables), trained)

    def test_images_to_prove_it_on(self, small_run, elsewhere):
        images, source = validation_images(load_run(small_run[0]), 100)
        assert (images.shape, images.dtype) == ((100, 8, 8, 1), np.uint8)
        assert source == "100 validation images of digits"
        metadata = json.loads((elsewhere / "metadata.json").read_text())
        metadata["eval_shape"] = [32, 32, 3]
        (elsewhere / "metadata.json").write_text(json.dumps(metadata))
        images, source = validation_images(load_run(elsewhere), 100)
        np.testing.assert_array_equal(images, photo_crops(32))
        assert "photographs" in source
        assert "/data/that/is/not/here" in source

    def test_one_of_a_version_without_metadata(self, caplog):
        run = load_run(OLD)
        assert (run.step, run.classes, run.eval_shape) == (66, tuple("0123456789"), (8, 8, 1))
        assert "classes from digits" in caplog.text

    @pytest.mark.parametrize("text", ["{", "[]", '{"classes": 3}'])
    def test_damaged_metadata(self, elsewhere, text):
        (elsewhere / "metadata.json").write_text(text)
        with pytest.raises(ValueError, match=r"metadata\.json"):
            load_run(elsewhere)


class TestInitFrom:
    def test_a_file_of_ours_names_its_network(self, tmp_path):
        """The recipe is not the right one, or was not given."""
        path = tmp_path / "model.safetensors"
        export("safetensors", nets.network("plain"), path)
        with pytest.raises(ValueError, match=r"is of tiny, but .*variant is small; .*--config"):
            load_source(str(path), small_settings())

    """Fine-tuning starts from whatever somebody trained, and says from what."""

    def start(self, source):
        config = small_config(init_from=str(source))
        return starting_state(Experiment.from_config(config))

    def test_another_run(self, small_run, caplog):
        state = self.start(small_run[0])
        trained = final_state(small_run[0])
        chex.assert_trees_all_equal(jax.device_get(state.variables), trained.variables)
        assert int(state.step) == 0
        assert "small, training form, 10 classes" in caplog.text
        assert f"({small_run[0]})" in caplog.text

    @pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
    def test_a_file_of_the_authors_names(self, small_run, tmp_path, suffix):
        trained = final_state(small_run[0]).variables
        save_weights(tmp_path / f"w{suffix}", trained, family="official", variant=SMALL)
        state = self.start(tmp_path / f"w{suffix}")
        chex.assert_trees_all_equal(jax.device_get(state.variables), trained)

    def test_a_file_in_deploy_form(self, small_run, tmp_path, caplog):
        trained = final_state(small_run[0]).variables
        deployed = fuse_params(trained)
        save_weights(tmp_path / "w.safetensors", deployed, family="flax", variant=SMALL)
        state = self.start(tmp_path / "w.safetensors")
        back = jax.device_get(fuse_params(state.variables))
        chex.assert_trees_all_close(back, deployed, rtol=1e-5, atol=1e-5)
        assert "deploy form" in caplog.text

    def test_other_classes_replace_the_head(self, small_run, tmp_path, caplog):
        trained = final_state(small_run[0]).variables
        head = {"kernel": np.zeros((16, 7), np.float32), "bias": np.zeros(7, np.float32)}
        other = {**trained, "params": {**trained["params"], "head": head}}
        save_weights(tmp_path / "w.npz", other, family="flax", variant=SMALL)
        state = self.start(tmp_path / "w.npz")
        assert state.params["head"]["kernel"].shape == (16, 10)
        assert re.search("fresh.*head", caplog.text)
        np.testing.assert_array_equal(
            state.params["stem"]["conv3x3"]["kernel"],
            trained["params"]["stem"]["conv3x3"]["kernel"],
        )

    def test_a_file_without_a_classifier_gets_a_fresh_one(self, small_run, tmp_path, caplog):
        trained = final_state(small_run[0]).variables
        body = {name: leaf for name, leaf in trained["params"].items() if name != "head"}
        backbone = {**trained, "params": body}
        save_weights(tmp_path / "w.npz", backbone, family="flax", variant=SMALL)
        state = self.start(tmp_path / "w.npz")
        chex.assert_trees_all_equal(jax.device_get(state.params["stem"]), body["stem"])
        assert re.search("fresh.*head", caplog.text)

    @pytest.mark.parametrize("deploy", [False, True])
    def test_of_color_images_for_gray_ones(self, tmp_path, caplog, rng, deploy):
        """The same network on images that repeat the channel."""
        model = create_model(SMALL, num_classes=10)
        color = random_variables(model, channels=3)
        stored = fuse_params(color) if deploy else color
        save_weights(tmp_path / "w.npz", stored, family="timm", variant=SMALL)
        started = jax.device_get(self.start(tmp_path / "w.npz").variables)
        gray = rng.normal(size=(2, 8, 8, 1)).astype(np.float32)
        wanted = model.apply(color, np.repeat(gray, 3, axis=-1))
        np.testing.assert_allclose(model.apply(started, gray), wanted, rtol=1e-4, atol=1e-4)
        assert "from images of 3 channels to 1" in caplog.text

    def test_a_run_on_gray_images_for_four_channels(self, small_run, rng):
        digits = load(small_settings().data)
        wide = [
            dataclasses.replace(source, images=source.images.repeat(4, axis=-1))
            for source in (digits.train, digits.evaluation)
        ]
        dataset = dataclasses.replace(
            digits, train=wide[0], evaluation=wide[1], image_shape=(8, 8, 4), eval_shape=(8, 8, 4)
        )
        config = small_config(init_from=str(small_run[0]), data__mean=(0.3,) * 4)
        config.data.std = (0.4,) * 4
        experiment = Experiment.from_config(config, dataset=dataset)
        started = jax.device_get(starting_state(experiment).variables)
        gray = rng.normal(size=(2, 8, 8, 1)).astype(np.float32)
        wanted = experiment.model.apply(final_state(small_run[0]).variables, gray)
        found = experiment.model.apply(started, gray.repeat(4, axis=-1))
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)

    def test_another_network_for_other_channels(self, small_run):
        experiment = Experiment.from_config(
            small_config(dataclasses.replace(SMALL, depths=(2, 1)), init_from=str(small_run[0]))
        )
        color = dataclasses.replace(experiment.dataset, image_shape=(8, 8, 3))
        experiment = dataclasses.replace(experiment, dataset=color)
        with pytest.raises(ValueError, match="does not fit"):
            starting_state(experiment)

    def test_one_of_several_entries(self, small_run, tmp_path):
        torch = pytest.importorskip("torch")
        trained = final_state(small_run[0]).variables
        state = to_state_dict(trained, family="official", variant=SMALL)
        entries = {"model": 2.0, "ema": 1.0}
        saved = {
            entry: {
                key: torch.from_numpy(np.asarray(array * factor, array.dtype))
                for key, array in state.items()
            }
            for entry, factor in entries.items()
        }
        torch.save(saved, tmp_path / "w.pth")
        with pytest.raises(ValueError, match="model and ema"):
            self.start(tmp_path / "w.pth")
        config = small_config(init_from=str(tmp_path / "w.pth"), init_entry="ema")
        state = starting_state(Experiment.from_config(config))
        chex.assert_trees_all_equal(jax.device_get(state.variables), trained)
        with pytest.raises(ValueError, match="init_entry='ema' is for checkpoint files"):
            starting_state(
                Experiment.from_config(small_config(init_from=str(small_run[0]), init_entry="ema"))
            )

    def test_training_starts_there(self, small_run, tmp_path, monkeypatch, caplog):
        class Started(Exception):
            pass

        def train_steps(experiment, state, *_):
            raise Started(experiment.settings.init_from, jax.device_get(state))

        monkeypatch.setattr(loop, "_train_steps", train_steps)
        with pytest.raises(Started) as caught:
            loop.train(small_config(), tmp_path / "run", init_from=str(small_run[0]))
        source, state = caught.value.args
        assert source == str(small_run[0])
        assert Workdir(tmp_path / "run").read_settings().init_from == source
        assert int(state.step) == 0
        chex.assert_trees_all_equal(state.variables, final_state(small_run[0]).variables)
        assert "small, training form" in caplog.text

    @pytest.mark.parametrize("source", ["nothing.pth", "repvgg_z9.rvgg_in1k"])
    def test_nothing_there(self, source):
        with pytest.raises(ValueError, match=source):
            self.start(source)
