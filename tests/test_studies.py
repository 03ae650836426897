"""The studies: their rows, their results on disk, and what their pages say."""

import dataclasses
import importlib
import json
import math
import pathlib
import time

import chex
import jax
import numpy as np
import pytest

from repvgg_jax import ReparamBlock, Variant, cost, create_model
from repvgg_jax.data import clutter, dataset
from repvgg_jax.data.dataset import load
from repvgg_jax.quantization import quantize
from repvgg_jax.reparam import ABLATIONS
from repvgg_jax.studies import integers, integers_page, page
from repvgg_jax.studies.report import Sample, difference, draw_intervals, is_clear
from repvgg_jax.studies.rows import ROWS, network, recipe
from repvgg_jax.studies.runs import Results, Trainer, digest
from repvgg_jax.train.experiment import build_model
from repvgg_jax.train.loop import train
from repvgg_jax.train.settings import Settings
from tests.helpers.runs import final_state, small_config, small_settings
from tests.helpers.trees import random_images, random_variables, randomize

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "configs" / "ablation"


class TestRows:
    def test_every_row_has_a_recipe(self):
        assert {path.stem for path in FOLDER.glob("*.py")} == set(ROWS)
        for name in ROWS:
            module = importlib.import_module(f"configs.ablation.{name}")
            assert module.get_config().to_dict() == recipe(name).to_dict()
            text = (FOLDER / f"{name}.py").read_text()
            assert f"python train.py --config configs/ablation/{name}.py" in text
            assert ROWS[name].title in text

    def test_the_papers_numbers(self):
        printed = {name: row.paper for name, row in ROWS.items() if row.table}
        assert len(printed) == 11
        assert (printed["neither"], printed["both"], printed["acb"]) == (72.39, 75.14, 73.58)

    @pytest.mark.parametrize("name", ROWS)
    def test_a_row_trains_as_many_convolutions_as_any_other(self, name):
        settings = Settings.from_config(recipe(name))
        variant = settings.model.variant
        model = build_model(settings, 10)
        shape = jax.ShapeDtypeStruct((2, 32, 32, 3), "float32")
        variables = jax.eval_shape(model.init, jax.random.key(0), shape)
        square = [
            path for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"])
            if leaf.shape[:2] == (3, 3)
        ]  # fmt: skip
        assert len(square) == 15
        counted = cost(variant, image_size=32, num_classes=10).params_train
        assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == counted

    def test_an_unknown_row(self):
        with pytest.raises(ValueError, match=r"'bothh'.*did you mean 'both'"):
            recipe("bothh")


class TestResidual:
    """Blocks of two convolutions train as a ResNet's, and say why they cannot be fused."""

    @pytest.mark.parametrize("block", ["residual", "residual_repvgg"])
    def test_it_is_the_composition_of_its_parts(self, block):
        variant = Variant("one", (1,), (8,), 8, strides=(1,), stem_stride=1, block=block)
        spec = variant.layers()[1].block
        whole = ReparamBlock(8, spec=spec)
        x = random_images((2, 6, 6, 8))
        shapes = jax.eval_shape(whole.init, jax.random.key(0), x)
        variables = randomize(shapes, 1)
        part = {"residual": "no branches", "residual_repvgg": "full"}[block]
        y = x
        for suffix, activation in (("_a", jax.nn.relu), ("_b", None)):
            own = {
                collection: {
                    name.removesuffix(suffix): leaf
                    for name, leaf in tree.items()
                    if name.endswith(suffix)
                }
                for collection, tree in variables.items()
            }
            y = ReparamBlock(8, spec=ABLATIONS[part], activation=activation).apply(own, y)
        expected = jax.nn.relu(y + x)
        np.testing.assert_allclose(whole.apply(variables, x), expected, rtol=2e-4, atol=2e-4)
        with pytest.raises(ValueError, match="relu inside branch 1 of 2"):
            whole.clone(deploy=True).init(jax.random.key(0), x)

    @pytest.mark.slow
    def test_a_run_ends_without_a_deploy_form(self, tmp_path, caplog):
        caplog.set_level("INFO", "repvgg_jax")
        sizes = {"depths": (1,), "channels": (8,), "strides": (1,)}
        variant = dataclasses.replace(network("r", "relu_in_branches"), **sizes)
        config = small_config(variant, train__epochs=1, optimizer__warmup_epochs=0.0)
        outcome = train(config, tmp_path / "run")
        assert outcome.accuracy is not None
        assert outcome.accuracy_fused is None
        assert "has no deploy form: a relu inside branch 1 of 3" in caplog.text
        assert "convert.py" not in caplog.text


class TestRuns:
    @pytest.mark.slow
    def test_a_trainer_takes_the_steps_of_train(self, tmp_path):
        overrides = {"train__epochs": 1, "optimizer__warmup_epochs": 0.0, "seed": 3}
        train(small_config(**overrides), tmp_path / "run")
        expected = final_state(tmp_path / "run", small_config(**overrides))
        settings = small_settings(**{**overrides, "seed": 0})
        trainer = Trainer(settings, load(settings.data))
        state = trainer.train(3)
        chex.assert_trees_all_close(
            jax.device_get(state.variables), expected.variables, rtol=1e-3, atol=1e-4
        )
        found = trainer.accuracies(state)
        assert found["accuracy"] == found["accuracy_fused"]

    def test_what_is_done_is_found_again(self, tmp_path):
        settings, other = small_settings(), small_settings(train__epochs=3)
        results = Results(tmp_path / "deep" / "results.jsonl")
        assert results.find("both", 1, settings) is None
        results.add("both", 1, settings, {"accuracy": 0.5}, time.perf_counter())
        with results.path.open("a") as file:
            file.write('{"name": "both", "se')  # killed while it wrote
        results.add("both", 2, settings, {"accuracy": 0.25}, time.perf_counter())
        assert results.find("both", 1, settings)["accuracy"] == 0.5
        assert results.find("both", 2, settings)["accuracy"] == 0.25
        assert results.find("both", 1, other) is None
        assert results.find("neither", 1, settings) is None
        assert digest(settings) == digest(dataclasses.replace(settings, seed=5)) != digest(other)

    @pytest.mark.parametrize(
        ("name", "expected"), [("both", "c1887fea53e1"), ("residual_repvgg", "e894a76c1781")]
    )
    def test_results_of_earlier_versions_stay_those_of_the_recipes(self, name, expected):
        """Whatever settings and fields of a variant are added."""
        settings = Settings.from_config(recipe(name))
        assert digest(settings) == expected
        assert settings.eval.batch_size % 8 == settings.train.batch_size % 8 == 0
        other = dataclasses.replace(settings.eval, batch_size=16)
        assert digest(dataclasses.replace(settings, eval=other)) == expected


def filled(path, accuracies, make=lambda accuracy: {"accuracy": accuracy}):
    results = Results(path / "results.jsonl")
    for name, values in accuracies.items():
        settings = Settings.from_config(recipe(name))
        for seed, value in enumerate(values):
            results.add(name, seed, settings, make(value), time.perf_counter())
    return results


class TestReport:
    def test_means_spreads_and_differences(self):
        a, b = Sample((80.0, 82.0, 84.0)), Sample((90.0, 91.0, 92.0))
        assert (a.mean, a.spread, a.error) == (82, 2, pytest.approx(2 / math.sqrt(3)))
        assert difference(b, a) == (9, pytest.approx(math.sqrt((4 + 1) / 3)))
        assert is_clear(a, b)
        assert not is_clear(a, Sample((84.0, 80.0, 83.0)))
        assert not is_clear(a, Sample((90.0,)))  # a single seed has no spread

    def test_the_page_says_what_is_clear_and_what_the_paper_has(self, tmp_path):
        results = filled(
            tmp_path,
            {
                "both": (0.90, 0.91, 0.90),
                "neither": (0.80, 0.81, 0.82),
                "relu_in_branches": (0.85, 0.86, 0.85),
                "acb": (0.90, 0.92, 0.89),
            },
        )
        text = page.write_page(tmp_path, results)
        assert text == (tmp_path / "ablation.md").read_text()
        assert "| neither (plain) | 6 | 72.39 | -2.75 | 81.00 ± 1.00 (3) | -9.33" in text
        assert "below" in text
        assert "told apart" in text
        assert "ACB" in text.split("told apart")[1]
        assert "1 have the sign" in text
        assert "ReLU in branches the other one" in text
        assert (tmp_path / "ablation.svg").read_text().count("<path") > 10

    def test_results_of_other_settings_do_not_count(self, tmp_path):
        results = filled(tmp_path, {"both": (0.9,)})
        lines = results.path.read_text().replace(
            digest(Settings.from_config(recipe("both"))), "0" * 12
        )
        results.path.write_text(lines)
        assert page.write_page(tmp_path, results) == "no results yet"

    def test_a_picture_is_readable_on_black_and_on_white(self, tmp_path):
        draw_intervals(
            tmp_path / "a.svg", {"": {"x": Sample((1.0, 2.0))}}, label="y", marks={"x": 1.5}
        )
        text = (tmp_path / "a.svg").read_text()
        assert "#808080" in text
        for color in ("#ffffff", "#000000"):
            assert f"fill: {color}" not in text
            assert f"stroke: {color}" not in text


class TestIntegers:
    def runs(self, **drops):
        methods = dict.fromkeys(integers.METHODS, 0.0)
        layers = [{"weights": 2.0, "activations": 3.0, "noise": 0.01}] * 3
        return {
            name: [{"accuracies": {"float": 0.9, **{m: 0.9 + d + drop for m, d in methods.items()}}}
                   | {"layers": layers, "seed": 0}]
            for name, drop in drops.items()
        }  # fmt: skip

    def test_the_finding_appears_or_not(self):
        found = integers_page.sentences(self.runs(RepVGG=-0.2, QARepVGG=-0.01))
        assert "appears here" in found
        found = integers_page.sentences(self.runs(RepVGG=-0.001, QARepVGG=-0.001))
        assert "does not appear" in found

    def test_the_page(self, tmp_path):
        results = Results(tmp_path / "results.jsonl")
        for name, (run,) in self.runs(RepVGG=-0.2, MobileOne=-0.1).items():
            found = {key: run[key] for key in ("accuracies", "layers")}
            results.add(name, 0, integers.recipe(name), found, time.perf_counter())
        text = integers_page.write_page(tmp_path, results)
        assert "| RepVGG | 90.00 (1) | -20.00 |" in text
        for picture in ("int8.svg", "layers.svg"):
            assert (tmp_path / picture).read_text().startswith("<?xml")
        json.loads(results.path.read_text().splitlines()[0])

    def test_one_scale_per_kernel_is_coarser(self):
        model = create_model(Variant("t", (1,), (8,), 8, strides=(1,)), num_classes=4)
        deployed = model.fuse(random_variables(model, size=8, seed=4))
        images = random_images((16, 8, 8, 3))
        own = quantize(model.clone(deploy=True), deployed, images)
        logits = [np.asarray(each(images)) for each in (own, integers.per_tensor(own))]
        floats = np.asarray(model.clone(deploy=True).apply(deployed, images))
        errors = [np.square(each - floats).mean() for each in logits]
        assert 0 < errors[0] < errors[1]
        layers = integers.layer_ranges(own)
        assert len(layers) == 3
        assert all(layer["weights"] >= 1 and layer["activations"] > 0 for layer in layers)


@pytest.mark.slow
def test_the_study_of_quantization_end_to_end(monkeypatch):
    """On a few images: trained, quantized in all ways, trained through integers.

    RepOpt-VGG, which needs a run of another network before its own.
    """
    small = clutter.load_clutter(training=256, validation=64)
    monkeypatch.setattr(dataset, "load_clutter", lambda: small)
    make = integers.small_recipe

    def short(variant):
        config = make(dataclasses.replace(variant, depths=(1, 1), channels=(8, 8), strides=(1, 2)))
        config.train.epochs = 1
        config.optimizer.warmup_epochs = 0.0
        config.eval.batch_size = 32
        return config

    monkeypatch.setattr(integers, "small_recipe", short)
    study = integers.Study(load(integers.recipe("RepVGG").data))
    found = study.run("RepOpt-VGG", 0)
    assert set(found["accuracies"]) == {"float", *integers.METHODS}
    assert all(0 <= value <= 1 for value in found["accuracies"].values())
