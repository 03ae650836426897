"""Exports with other outputs and inputs: feature maps, images of any size, modules of one's own."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict
from safetensors import safe_open

from repvgg_jax import RepVGGBlock, create_model, fuse_model, fuse_params, load_weights
from repvgg_jax.export import FORMATS, Network, Normalize, Target, export
from repvgg_jax.export.module import with_settings
from tests.helpers import export_networks as nets
from tests.helpers.trees import random_variables

STAGES = ("stage1", "stage3")


def network_of(kind="plain", **options):
    options = {"images": nets.images(), "normalize": Normalize(nets.MEAN, nets.STD), **options}
    return Network(nets.model(kind), fuse_params(nets.variables(kind)), **options)


def maps_of(kind, images):
    """What the training form says."""
    normalized = np.float32((images / 255 - np.asarray(nets.MEAN)) / np.asarray(nets.STD))
    with jax.default_matmul_precision("highest"):
        return nets.model(kind).apply(nets.variables(kind), normalized, method="features")


class TestFeatureMaps:
    """What detectors and segmenters need."""

    @pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True])
    def test_stablehlo(self, dynamic, tmp_path):
        network = network_of(
            feature_maps=STAGES[::-1], dynamic_size=dynamic, with_preprocessing=True
        )
        artifact = export("stablehlo", network, tmp_path / "model.stablehlo")
        assert artifact.proofs["jax"].relative <= 1e-5
        assert "same largest number" in str(artifact)
        call = jax.export.deserialize(bytearray(artifact.path.read_bytes())).call
        size = (nets.HEIGHT, nets.WIDTH)
        sizes = [size, (17, 30)] if dynamic else [size]
        for height, width in sizes:
            images = np.resize(nets.images()[:2], (2, height, width, 3))
            found, wanted = call(images), maps_of("plain", images)
            assert found.keys() == set(STAGES)
            for stage, values in found.items():
                assert nets.relative(np.asarray(wanted[stage]), np.asarray(values)) <= 1e-5

    def test_stages_that_are_not_asked_for_take_no_space(self, tmp_path):
        whole = export("stablehlo", network_of(), tmp_path / "whole")
        part = export("stablehlo", network_of(feature_maps=["stem"]), tmp_path / "part")
        assert part.size < whole.size / 2

    def test_description(self):
        about = network_of("dilated", feature_maps=STAGES, dynamic_size=True).description("NHWC")
        assert about["output"] == list(STAGES)
        assert about["strides"] == {"stage1": 2, "stage3": 2}
        assert about["dynamic_size"] is True
        plain = network_of().description("NHWC")
        assert (plain["output"], plain["dynamic_size"]) == ("logits", False)

    def test_unknown_stages_are_refused(self):
        with pytest.raises(ValueError, match=r"stage9; it has stem, stage1, stage2, stage3"):
            network_of(feature_maps=["stage1", "stage9"])

    @pytest.mark.parametrize("options", [{"feature_maps": STAGES}, {"dynamic_size": True}])
    @pytest.mark.parametrize("name", ["tflite", "savedmodel"])
    def test_formats_that_cannot(self, name, options):
        with pytest.raises(ValueError, match=f"{name} .*: stablehlo, onnx"):
            Target.parse(name).check(network_of(**options))

    def test_a_map_that_disagrees_is_never_written(self, tmp_path):
        """Also the smaller of two maps, and at the other image size only."""
        network = network_of(feature_maps=STAGES, dynamic_size=True)
        target = Target.parse("stablehlo")
        reference = network.apply

        def run(images, scale=1.0):
            maps = jax.tree.map(np.asarray, reference(network.params, images))
            maps["stage1"] = maps["stage1"] * (1 + 1e-3 * (images.shape[1] != 24) * scale)
            return maps

        assert not target._compare(network, run).holds
        assert target._compare(network, lambda images: run(images, 0.0)).holds


class Neck(nn.Module):
    """A detector's: two maps of a backbone, a norm that is no block's, and two heads."""

    backbone: nn.Module
    classes: int = 4
    deploy: bool = False

    @nn.compact
    def __call__(self, images, train=False):
        maps = self.backbone.features(images, train)
        block = RepVGGBlock(8, deploy=self.deploy, name="smooth")
        x = nn.BatchNorm(use_running_average=not train, name="norm")(maps["stage2"])
        x = block(x, train)
        scores = nn.Dense(self.classes, name="scores")(x)
        return {"scores": scores, "boxes": (nn.Dense(4, name="boxes")(x), maps["stage1"])}


@pytest.fixture(scope="module")
def own():
    """A module, its variables in training form, fused."""
    model = Neck(create_model(nets.variant(), num_classes=0))
    variables = random_variables(model, size=nets.HEIGHT, seed=3)
    images = jnp.zeros((1, nets.HEIGHT, nets.WIDTH, 3))
    return model, variables, fuse_model(model, variables, images)


def own_network(own, **options):
    options = {"images": nets.images(), "normalize": Normalize(nets.MEAN, nets.STD), **options}
    return Network(own[0], own[2], **options)


class TestModulesOfYourOwn:
    """Any Linen module with blocks in it."""

    @pytest.mark.slow
    @pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True])
    def test_stablehlo_computes_what_the_training_form_does(self, own, dynamic, tmp_path):
        model, variables, _ = own
        network = own_network(own, with_preprocessing=True, dynamic_size=dynamic)
        artifact = export("stablehlo", network, tmp_path / "model.stablehlo")
        assert artifact.proven
        assert artifact.description["variant"] == "Neck"
        assert artifact.description["output"] == ["boxes_0", "boxes_1", "scores"]
        call = jax.export.deserialize(bytearray(artifact.path.read_bytes())).call
        images = nets.images()[:3, : 20 if dynamic else 24]
        normalized = np.float32((images / 255 - np.asarray(nets.MEAN)) / np.asarray(nets.STD))
        with jax.default_matmul_precision("highest"):
            wanted = model.apply(variables, normalized)
        assert jax.tree.structure(call(images)) == jax.tree.structure(wanted)
        for one, other in zip(jax.tree.leaves(wanted), jax.tree.leaves(call(images)), strict=True):
            assert nets.relative(np.asarray(one), np.asarray(other)) <= 1e-5

    @pytest.mark.parametrize("name", ["safetensors", "orbax"])
    def test_weights_are_read_back(self, own, name, tmp_path):
        artifact = export(name, own_network(own), tmp_path / "weights")
        assert artifact.identical
        if name == "safetensors":
            with safe_open(artifact.path, "numpy") as opened:
                names = set(opened.keys())
                assert json.loads(opened.metadata()["output"])[-1] == "scores"
            assert names == set(flatten_dict(own[2], sep="/"))
            assert "batch_stats/norm/mean" in names

    def test_the_form_is_set_wherever_a_field_has_it(self, own):
        block = RepVGGBlock(4)
        model = nn.Sequential([block, nn.relu, nn.Sequential((RepVGGBlock(4, lowering="auto"),))])
        changed = with_settings(model)
        assert changed.layers[0].deploy
        assert changed.layers[2].layers[0].deploy
        assert changed.layers[2].layers[0].lowering == "plain"
        assert not block.deploy
        assert with_settings(own[0]).backbone.deploy

    def test_a_sequence_with_labels(self, tmp_path):
        class Pooled(nn.Module):
            """The mean over pixels."""

            @nn.compact
            def __call__(self, x):
                return x.mean((1, 2))

        model = nn.Sequential([RepVGGBlock(4), RepVGGBlock(5), Pooled()])
        variables = random_variables(model, size=nets.HEIGHT, seed=4)
        options = {"images": nets.images(), "normalize": Normalize(nets.MEAN, nets.STD)}
        fused = fuse_params(variables)
        network = Network(model, fused, labels=nets.LABELS, **options)
        assert export("stablehlo", network, tmp_path / "model").description["output"] == "output"
        with pytest.raises(ValueError, match="2 labels"):
            Network(model, fused, labels=("a", "b"), **options)
        with pytest.raises(ValueError, match=r"training form.*fuse_params"):
            Network(model, variables, **options)

    @pytest.mark.parametrize(
        "name", [name for name, form in FORMATS.items() if not form.own_modules]
    )
    def test_formats_of_repvgg_only(self, own, name, tmp_path):
        with pytest.raises(ValueError, match=f"{name} .*Neck.*: orbax, safetensors, stablehlo"):
            export(name, own_network(own), tmp_path / "model")
        assert not list(tmp_path.iterdir())

    def test_what_does_not_fit_is_refused(self, own):
        with pytest.raises(ValueError, match="stages; let Neck return its own"):
            own_network(own, feature_maps=("stage1",))

        class Total(nn.Module):
            """One number for all images."""

            deploy: bool = False

            @nn.compact
            def __call__(self, x):
                return RepVGGBlock(4, deploy=self.deploy)(x).sum()

        class Fixed(nn.Module):
            """A block that stays in training form."""

            @nn.compact
            def __call__(self, x):
                return RepVGGBlock(4)(x)

        options = {"images": nets.images(), "normalize": Normalize(nets.MEAN, nets.STD)}
        for model, reason in ((Total(), "axis of images"), (Fixed(), "field deploy")):
            fused = fuse_params(random_variables(model, size=nets.HEIGHT, seed=5))
            with pytest.raises(ValueError, match=reason):
                Network(model, fused, **options)


@pytest.mark.slow
def test_the_page_says_how(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"images": nets.images(), "variant": nets.variant(), "mean": nets.MEAN, "std": nets.STD}
    (block,) = nets.documented("Modules of your own")
    exec(compile(block, "docs/deploy.md", "exec"), given)
    jax.tree.map(np.testing.assert_array_equal, given["again"], given["fused"])
    call = jax.export.deserialize(bytearray((tmp_path / "detector.stablehlo").read_bytes())).call
    assert call(np.zeros((2, 17, 40, 3), np.float32))["scores"].shape == (2, 3, 5, 3)


def test_weights_of_a_network_with_maps_are_whole(tmp_path):
    network = network_of(feature_maps=STAGES, dynamic_size=True).without_preprocessing()
    path = export("safetensors", network, tmp_path / "model.safetensors").path
    assert load_weights(path, variant=nets.variant()).num_classes == 5
