"""Branches as kernels, their shares, and the picture of them."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import repvgg_jax as rv
from repvgg_jax import reparam
from repvgg_jax.convert.output import Output
from repvgg_jax.convert.pipeline import convert
from repvgg_jax.convert.source import from_run
from repvgg_jax.export import parse_targets
from repvgg_jax.visualize import branch_kernels, draw_blocks, inspect_blocks, stage_shares
from repvgg_jax.visualize.network import blocks_of
from tests.helpers.commands import ROOT
from tests.helpers.trees import TINY, random_variables, randomize

IMAGES = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)

TWINS = reparam.Sum((reparam.Conv("a", (3, 3)), reparam.Conv("b", (3, 3)), reparam.Identity()))
NORM_BEHIND_TWINS = reparam.BlockSpec("twins", reparam.Chain((TWINS, reparam.Norm("z"))))
NORM_BEFORE_IDENTITIES = reparam.BlockSpec(
    "identities",
    reparam.Chain((reparam.Norm("z"), reparam.Sum((TWINS, reparam.Identity())))),
)


def random_block(spec, *, channels=4, **options):
    """A block's geometry and random variables, float64."""
    with jax.enable_x64(True):
        block = rv.ReparamBlock(4, spec=spec, param_dtype=jnp.float64, **options)
        x = jax.ShapeDtypeStruct((1, 8, 8, channels), jnp.float64)
        variables = randomize(jax.eval_shape(block.init, jax.random.key(0), x))
        return block.geometry(x), variables["params"], variables["batch_stats"]


@pytest.mark.parametrize(
    ("spec", "options", "branches"),
    [
        (reparam.REPVGG, {}, ["3x3", "1x1", "identity"]),
        (reparam.REPVGG, {"stride": 2, "groups": 2}, ["3x3", "1x1"]),
        (reparam.QAREPVGG, {}, ["3x3", "1x1", "identity"]),
        (reparam.acb(5), {}, ["5x5", "1x5", "5x1"]),
        (reparam.DBB, {}, ["3x3", "1x1", "1x1, 3x3", "1x1, average 3x3"]),
        (
            reparam.mobileone(3, branches=2),
            {"groups": 4},
            ["3x3 (conv_0)", "3x3 (conv_1)", "1x1", "identity"],
        ),
        (reparam.dilated_reparam(7), {"groups": 4}, None),
        (reparam.conv_bn(3), {}, ["3x3"]),
        (NORM_BEHIND_TWINS, {}, ["3x3 (a)", "3x3 (b)", "identity"]),
        (
            NORM_BEFORE_IDENTITIES,
            {},
            ["3x3 (a)", "3x3 (b)", "identity (1)", "identity (2)"],
        ),
    ],
)
def test_branches_add_up_to_the_fused_kernel(spec, options, branches):
    geometry, params, stats = random_block(spec, **options)
    kernels = branch_kernels(spec, geometry, params, stats)
    fused = reparam.fuse_block(spec, params, stats, geometry=geometry)[spec.deploy]["kernel"]
    assert {kernel.shape for kernel in kernels.values()} == {fused.shape}
    np.testing.assert_allclose(sum(kernels.values()), fused, atol=1e-12)
    if branches is not None:
        assert sorted(kernels) == sorted(branches)


def test_what_cannot_be_one_kernel():
    spec = reparam.ABLATIONS["ReLU in branches"]
    with pytest.raises(ValueError, match=r"no deploy form.*relu"):
        branch_kernels(spec, *random_block(spec))
    geometry, params, stats = random_block(reparam.REPVGG)
    stacked = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), (params, stats))
    with pytest.raises(ValueError, match="stack of blocks"):
        branch_kernels(reparam.REPVGG, geometry, *stacked)


def test_shares_of_a_network():
    """They add up to one; a branch without weight has none, and one that cancels is negative."""
    model = rv.create_model(TINY, num_classes=3)
    variables = random_variables(model)
    block = variables["params"]["stage2_block1"]
    block["conv1x1"]["kernel"][:] = 0.0
    for name, factor in (("bn3x3", 0.01), ("bn_identity", 1.0)):
        block[name]["scale"][:] = factor
    found = inspect_blocks(model, variables, IMAGES)
    assert [one.name for one in found] == [layer.name for layer in TINY.layers()]
    for one in found:
        assert sum(one.shares.values()) == pytest.approx(1, abs=1e-9)
        assert one.taps.sum() == pytest.approx(1, abs=1e-9)
    last = found[-1]
    assert last.shares["1x1"] == pytest.approx(0, abs=1e-12)
    assert last.shares["identity"] > 0.95
    assert last.taps[1, 1] > 0.95

    block["conv1x1"]["kernel"][0, 0] = np.eye(16)
    stats = variables["batch_stats"]["stage2_block1"]
    stats["bn1x1"], block["bn1x1"] = stats["bn_identity"], {**block["bn_identity"]}
    block["bn1x1"]["scale"] = -0.5 * block["bn_identity"]["scale"]
    cancelled = inspect_blocks(model, variables, IMAGES)[-1]
    assert cancelled.shares["1x1"] == pytest.approx(-1, abs=0.1)
    assert cancelled.shares["identity"] == pytest.approx(2, abs=0.1)
    means = stage_shares(found)
    assert list(means) == ["stem", "stage1", "stage2"]
    stage2 = [one.shares for one in found if one.stage == "stage2"]
    assert means["stage2"]["3x3"] == pytest.approx(np.mean([one["3x3"] for one in stage2]))
    assert means["stage2"]["identity"] == pytest.approx(stage2[1]["identity"] / 2)


def test_both_forms_have_the_same_kernels():
    model = rv.create_model(TINY, num_classes=0)
    variables = random_variables(model)
    trained = inspect_blocks(model, variables, IMAGES)
    fused = inspect_blocks(model.clone(deploy=True), rv.fuse_params(variables), IMAGES)
    for one, other in zip(trained, fused, strict=True):
        assert (one.name, one.stage, other.shares) == (other.name, other.stage, {})
        np.testing.assert_allclose(one.shown, other.shown, atol=1e-5)
        np.testing.assert_allclose(one.taps, other.taps, atol=1e-5)


def test_blocks_of_a_segmenter():
    variant = rv.Variant("tiny", (1, 1, 1, 1), (8, 8, 16, 16), 8)
    model = rv.create_segmenter(variant, num_classes=3, width=8, auxiliary_width=8)
    variables = randomize(jax.eval_shape(model.init, jax.random.key(0), IMAGES))
    stages = [one.stage for one in inspect_blocks(model, variables, IMAGES)]
    assert stages[:2] == ["backbone/stem", "backbone/stage1"]
    assert "decoder" in stages


@pytest.fixture(scope="module")
def deployed(small_run, tmp_path_factory):
    path = tmp_path_factory.mktemp("visualize") / "deploy"
    convert(from_run(small_run[0]), Output(path), targets=parse_targets(["safetensors"]))
    return path


def test_a_deploy_directory_shows_the_branches_of_its_source(deployed, small_run):
    title, blocks = blocks_of(str(deployed))
    assert str(deployed) in title
    assert str(small_run[0]) in title
    assert list(blocks[1].shares) == ["3x3", "1x1", "identity"]
    assert blocks_of(str(small_run[0]), "newest")[1][1].shares == blocks[1].shares


@pytest.mark.parametrize("damage", ["gone", "other"])
def test_without_its_source_only_fused_kernels_are_shown(
    deployed, small_run, damage, monkeypatch, caplog
):
    from repvgg_jax.visualize import network

    load_run = network.load_run

    def changed(path, **options):
        if damage == "gone":
            raise ValueError(f"{path} does not exist")
        run = load_run(path, **options)
        run.variables["params"]["stem"]["conv3x3"]["kernel"] *= 2
        return run

    monkeypatch.setattr(network, "load_run", changed)
    title, blocks = blocks_of(str(deployed))
    assert str(small_run[0]) not in title
    assert [block.shares for block in blocks] == [{}] * len(blocks)
    assert {"gone": "does not exist", "other": "other weights"}[damage] in caplog.text


def test_a_step_is_of_a_run(deployed):
    with pytest.raises(ValueError, match="--step=3 is for a run"):
        blocks_of(str(deployed), "3")


@pytest.mark.parametrize("deploy", [False, True])
def test_the_picture_has_a_column_per_stage(deploy):
    model = rv.create_model(TINY, num_classes=0, deploy=deploy)
    blocks = inspect_blocks(model, random_variables(model), IMAGES)
    figure = draw_blocks(blocks, "a title")
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["stem, 3x3", "stage1, 3x3", "stage2, 3x3"]
    bars = [axes for axes in figure.axes if axes.containers]
    assert len(bars) == (not deploy)
    for axes in bars:
        assert [text.get_text() for text in axes.get_legend().get_texts()] == [
            "3x3", "1x1", "identity",
        ]  # fmt: skip
        heights = [[bar.get_height() for bar in container] for container in axes.containers]
        np.testing.assert_allclose(np.sum(heights, axis=0), 1.0)


def visualize(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "repvgg_jax.visualize", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.system
def test_the_command(deployed, small_run, tmp_path):
    picture = tmp_path / "kernels.png"
    done = visualize(f"--model={small_run[0]}", f"--output={picture}")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^stage2 +1 +3x3 +[\d.]+% +[\d.]+%", done.stdout, re.MULTILINE)
    assert np.asarray(Image.open(picture).convert("L")).std() > 10
    done = visualize(f"--model={deployed}", f"--output={tmp_path / 'kernels.svg'}")
    assert done.returncode == 0
    assert "<svg" in (tmp_path / "kernels.svg").read_text()


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --model"),
        (["--model=nowhere.pth"], "nowhere.pth"),
        (["--model=x", "--output=kernels.gif"], r"kernels.gif must end in .png"),
        (["--model=x", "--output=nowhere/kernels.png"], "no directory nowhere"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    done = visualize(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(f"error: .*{message}.*\n", done.stderr)
