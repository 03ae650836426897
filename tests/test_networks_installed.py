"""Blocks that an installed package names in its entry points, from training to prediction."""

import pathlib

import numpy as np
import pytest

import repvgg_jax as rv
from repvgg_jax import networks
from repvgg_jax.convert.output import Output
from repvgg_jax.convert.pipeline import convert
from repvgg_jax.convert.source import from_run
from repvgg_jax.export import parse_targets
from repvgg_jax.train.loop import train
from tests.helpers.jit import QUICK
from tests.helpers.runs import small_config

MODULE = """
from repvgg_jax.reparam import BlockSpec, Chain, Conv, Norm, SameShape, Sum

branches = [Chain((Conv(f"conv{n}x1", (n, 1)), Norm(f"bn{n}x1"))) for n in (5, 3)]
CROSSED = BlockSpec("crossed", Sum((*branches, SameShape(Norm("bn_skip")))))
number = 3


def twice(layer):
    return layer, layer


def nothing(layer):
    pass
"""
ENTRIES = """
[repvgg_jax.blocks]
crossed = own_blocks:CROSSED
twice = own_blocks:twice
number = own_blocks:number
missing = own_blocks:missing
absent = no_such_module_of_blocks:x
nothing = own_blocks:nothing
exits = own_exits:x
"""


def install(folder: pathlib.Path, package: str, entries: str) -> None:
    """What pip leaves of a package in site-packages."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entries)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package that names blocks."""
    install(tmp_path / "site", "own-blocks", ENTRIES)
    (tmp_path / "site" / "own_blocks.py").write_text(MODULE)
    (tmp_path / "site" / "own_exits.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(tmp_path / "site")
    networks._installed.cache_clear()
    yield tmp_path / "site"
    networks._installed.cache_clear()


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
    assert network.predict(np.zeros((2, 8, 8, 1), np.uint8)).shape == (2, 10)


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
        ("number", "'number', own_blocks:number of own-blocks, is a int.* BlockSpec or"),
        ("missing", "own_blocks:missing of own-blocks, cannot .*: AttributeError.*'missing'"),
        ("nothing", "variant 'own': its block gives None for layer stem; .* BlockSpec or a tuple"),
        ("exits", "own_exits:x of own-blocks, cannot be imported: SystemExit: 3"),
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
