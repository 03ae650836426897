"""Blocks that an installed package names in its entry points, from training to prediction."""

import contextlib
import importlib
import json
import pathlib
import shutil
import sys

import numpy as np
import pytest

import repvgg_jax as rv
from repvgg_jax.architecture import installed as installed_blocks
from repvgg_jax.convert.output import Output
from repvgg_jax.convert.pipeline import convert
from repvgg_jax.convert.source import from_run
from repvgg_jax.export import parse_targets
from repvgg_jax.train.config import default_config
from repvgg_jax.train.evaluate import evaluate_only
from repvgg_jax.train.loop import train
from repvgg_jax.train.settings import Settings
from repvgg_jax.train.workdir import Workdir
from repvgg_jax.typed import typed
from tests.helpers.jit import QUICK
from tests.helpers.runs import small_config

MODULE = """
import dataclasses
import functools

import numpy as np

from repvgg_jax.reparam import BlockSpec, Chain, Conv, Filter, Norm, SameShape, Sum

branches = [Chain((Conv(f"conv{n}x1", (n, 1)), Norm(f"bn{n}x1"))) for n in (5, 3)]
CROSSED = BlockSpec("crossed", Sum((*branches, SameShape(Norm("bn_skip")))))
number = 3
SIDE = 0.5


def blur(side, channels):
    taps = np.zeros((3, 3, channels))
    taps[1], taps[:, 1] = side, side
    return taps


FILTER = Filter(functools.partial(blur, SIDE))
BLURRED = BlockSpec(
    "blurred", Chain((FILTER, Conv("conv", (1, 1), strided=False), Norm("bn")))
)


def twice(layer):
    second = dataclasses.replace(layer, in_channels=layer.features, stride=1, identity=True)
    return layer, second


def nothing(layer):
    pass


def empty(layer):
    return ()


def fails(layer):
    return {}["x"]
"""
ENTRIES = """
[repvgg_jax.blocks]
crossed = own_blocks:CROSSED
blurred = own_blocks:BLURRED
twice = own_blocks:twice
number = own_blocks:number
missing = own_blocks:missing
absent = no_such_module_of_blocks:x
nothing = own_blocks:nothing
empty = own_blocks:empty
fails = own_blocks:fails
exits = own_exits:x
"""


def install(folder: pathlib.Path, package: str, entries: str, version: str = "1.0") -> None:
    """What pip leaves of a package in site-packages."""
    info = folder / f"{package}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entries)


def upgrade(folder: pathlib.Path, version: str, old: str, new: str) -> None:
    """Another version of the package, in which `new` takes the place of `old`."""
    assert old in MODULE
    for info in folder.glob("own_blocks*.dist-info"):
        shutil.rmtree(info)
    install(folder, "own_blocks", ENTRIES, version)
    (folder / "own_blocks.py").write_text(MODULE.replace(old, new))
    forget()


def forget() -> None:
    """What Python remembers of the package."""
    installed_blocks.installed.cache_clear()
    rv.Variant.layers.cache_clear()
    sys.modules.pop("own_blocks", None)
    importlib.invalidate_caches()


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package that names blocks."""
    install(tmp_path / "site", "own_blocks", ENTRIES)
    (tmp_path / "site" / "own_blocks.py").write_text(MODULE)
    (tmp_path / "site" / "own_exits.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # `upgrade` may take less than a second
    forget()
    yield tmp_path / "site"
    forget()


def variant(block: str) -> rv.Variant:
    return rv.Variant("own", (1, 1), (8, 16), 8, strides=(1, 2), stem_stride=1, block=block)


@pytest.mark.slow
def test_a_run_is_trained_converted_and_predicts(installed, tmp_path):
    config = small_config(variant("crossed"), train__epochs=1, train__compiler_options=QUICK)
    outcome = train(config, tmp_path / "run")
    assert outcome.accuracy == outcome.accuracy_fused
    convert(
        from_run(tmp_path / "run"),
        Output(tmp_path / "deploy"),
        targets=parse_targets(["safetensors"]),
    )
    network = rv.load_deployed(tmp_path / "deploy")
    kernel = network.variables["params"]["stem"]["reparam"]["kernel"]
    assert kernel.shape == (5, 1, 1, 8)
    images = np.zeros((2, 8, 8, 1), np.uint8)
    logits = network.predict(images)
    assert logits.shape == (2, 10)

    evaluated = evaluate_only(config, tmp_path / "none", init_from=str(tmp_path / "deploy"))
    assert evaluated.trained["accuracy"] == pytest.approx(outcome.accuracy, abs=0.011)

    # A block of another title is the same network.
    upgrade(installed, "1.1", '"crossed", Sum', '"renamed", Sum')
    from_run(tmp_path / "run")
    np.testing.assert_array_equal(rv.load_deployed(tmp_path / "deploy").predict(images), logits)
    # Another weight decay is another training, but not another deploy form.
    upgrade(installed, "1.2", 'Norm("bn_skip")', 'Norm("bn_skip", decay=True)')
    rv.load_deployed(tmp_path / "deploy")
    with pytest.raises(ValueError, match=r"own_blocks 1\.2 .* own_blocks 1\.0, .*; install own_bl"):
        from_run(tmp_path / "run")
    shutil.rmtree(installed / "own_blocks-1.2.dist-info")
    forget()
    for read in (from_run, rv.load_deployed):
        path = tmp_path / ("run" if read is from_run else "deploy")
        with pytest.raises(ValueError, match=r"'crossed' is of own_blocks 1\.0, which is not inst"):
            read(path)


@pytest.mark.core
def test_a_function_is_called_with_layers(installed):
    names = [layer.name for layer in variant("twice").layers()]
    assert names[:4] == ["stem", "stem_block1", "stage1_block0", "stage1_block1"]
    assert variant("repvgg").layers()[0].block is rv.reparam.REPVGG


@pytest.mark.core
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("crosed", r"variant 'own': unknown block 'crosed'; did you mean 'crossed'.*entry point"),
        (
            "number",
            "'number', own_blocks:number of own_blocks, is of the type int; .* BlockSpec or",
        ),
        ("missing", "own_blocks:missing of own_blocks, cannot .*: AttributeError.*'missing'"),
        ("nothing", "variant 'own': its block gives None for layer stem; .* BlockSpec or a tuple"),
        ("empty", "variant 'own': it has no layers"),
        ("fails", "variant 'own': its block fails for layer stem: KeyError: 'x'"),
        ("exits", "own_exits:x of own_blocks, cannot be imported: SystemExit: 3"),
        ("absent", "cannot be imported: ModuleNotFoundError: .*no_such_module_of_blocks"),
    ],
)
def test_what_is_wrong_is_named(installed, name, message):
    with pytest.raises(ValueError, match=message):
        variant(name)


@pytest.mark.core
def test_two_packages_of_one_name(installed):
    install(installed, "others", ENTRIES)
    with pytest.raises(ValueError, match=r"CROSSED of [\w-]+ and .*CROSSED of [\w-]+; uninstall"):
        variant("crossed")
    variant("mobileone")  # those of this package are not replaced


def saved(**changes) -> dict:
    """What a file says of the architecture, as JSON gives it back."""
    return json.loads(json.dumps(variant("crossed").as_saved("train") | changes))


@pytest.mark.core
class TestSaved:
    """What a file records of an installed block."""

    def test_is_read_back(self, installed):
        for form in ("train", "deploy"):
            fields = json.loads(json.dumps(variant("crossed").as_saved(form)))
            assert fields["block"].keys() == {"name", "package", "version", "layers", "form"}
            assert typed(rv.Variant, fields, "variant") == variant("crossed")
            assert rv.Variant(**fields) == variant("crossed")

    def test_names_alone_are_read(self, installed):
        assert typed(rv.Variant, saved(block="crossed"), "variant") == variant("crossed")
        assert variant("crossed").as_dict()["block"] == "crossed"
        assert variant("repvgg").as_saved("train")["block"] == "repvgg"

    @pytest.mark.parametrize(
        ("old", "new", "refused"),
        [
            ('"crossed", Sum', '"renamed", Sum', ""),
            ('Norm("bn_skip")', 'Norm("bn_skip", initial=0.5)', ""),
            ('Norm("bn_skip")', 'Norm("bn_skip", decay=True)', "train"),
            ('Norm("bn_skip")', 'Norm("bn_skip", decay=0, initial=2)', ""),
            ("(n, 1)", "(1, n)", "train deploy"),
            ("(n, 1)", "(n, 1), dilation=2", "train deploy"),
        ],
    )
    def test_what_counts(self, installed, old, new, refused):
        """Only what changes the network, in the form that the file is of."""
        before = {form: variant("crossed").as_saved(form) for form in ("train", "deploy")}
        upgrade(installed, "2.0", old, new)
        for form, fields in before.items():
            if form in refused.split():
                with pytest.raises(ValueError, match=r"own_blocks 2\.0 gives other layers"):
                    typed(rv.Variant, fields, "variant")
            else:
                typed(rv.Variant, fields, "variant")

    @pytest.mark.parametrize(
        ("old", "new", "same"),
        [
            ("functools.partial(blur, SIDE)", "lambda channels: blur(SIDE, channels)", True),
            ("functools.partial(blur, SIDE)", "blur(SIDE, 1)[..., 0]", True),
            ("SIDE = 0.5", "SIDE = 0.5 + 1e-12", True),
            ("SIDE = 0.5", "SIDE = 0.6", False),
        ],
    )
    def test_filters_are_what_they_compute(self, installed, old, new, same):
        fields = variant("blurred").as_saved("train")
        upgrade(installed, "2.0", old, new)
        with contextlib.nullcontext() if same else pytest.raises(ValueError, match="other layers"):
            typed(rv.Variant, fields, "variant")

    @pytest.mark.parametrize("body", ["return ()", "return {}['x']", "return layer, layer"])
    def test_the_versions_are_named_where_the_new_one_fails(self, installed, body):
        fields = variant("twice").as_saved("train")
        upgrade(installed, "2.0", "return layer, second", body)
        with pytest.raises(ValueError, match=r"saved with own_blocks 1\.0, and own_blocks 2\.0 is"):
            typed(rv.Variant, fields, "variant")

    def test_a_package_without_a_version(self, installed):
        upgrade(installed, "1.0", "number = 3", "number = 4")
        (info,) = installed.glob("own_blocks*.dist-info")
        (info / "METADATA").write_text("Metadata-Version: 2.1\n")
        fields = json.loads(json.dumps(variant("crossed").as_saved("train")))
        assert typed(rv.Variant, fields, "variant") == variant("crossed")

    def test_settings_may_still_be_changed(self, installed):
        """What is recorded is of files only."""
        config = default_config(variant("crossed"))
        config.model.variant.depths = (2, 1)
        config.model.variant.block = "twice"
        changed = Settings.from_config(config).model.variant
        assert (changed.depths, changed.block) == ((2, 1), "twice")

    def test_a_run_without_a_checkpoint_begins_anew(self, installed, tmp_path):
        settings = Settings.from_config(small_config(variant("crossed")))
        assert settings.as_saved() == json.loads(json.dumps(settings.as_saved()))  # no tuples
        workdir = Workdir(tmp_path / "run")
        workdir.claim(settings)
        workdir.claim(settings)
        upgrade(installed, "2.0", "(n, 1)", "(1, n)")
        workdir.claim(Settings.from_config(small_config(variant("crossed"))))
        saved = json.loads(workdir.config.read_text())["model"]["variant"]["block"]
        assert saved["version"] == "2.0"

    @pytest.mark.parametrize("field", ["activate=False", "residual=1"])
    def test_connections_count(self, installed, field):
        """They leave no trace in the parameters, neither in training nor in deploy form."""
        before = {form: variant("twice").as_saved(form) for form in ("train", "deploy")}
        upgrade(installed, "1.0", "identity=True)", f"identity=True, {field})")
        for fields in before.values():
            with pytest.raises(ValueError, match="install the package as it was"):
                typed(rv.Variant, fields, "variant")

    @pytest.mark.parametrize(
        ("block", "message"),
        [
            (None, "variant.block=None must be a string or an object"),
            ([1], r"variant.block=\[1\] must be a string or an object"),
            ({"name": "crossed"}, "variant.block lacks package, version, layers"),
            ({"train": {}}, "variant.block has no field 'train'"),
        ],
    )
    def test_other_values_are_refused(self, installed, block, message):
        with pytest.raises(ValueError, match=message):
            typed(rv.Variant, saved(block=block), "variant")
