"""Checkpoints that PyTorch wrote, under every project's names, and ours that it reads."""

import argparse
import functools

import numpy as np
import pytest

import repvgg_jax as rv
from tests.helpers.jit import quick_jit
from tests.helpers.weights_samples import assert_identical, random_weights

torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra: torch)")

from tests.helpers import torch_reference  # noqa: E402 (needs torch)

CLASSES = 5
SE = rv.Variant("se", (2, 2), (8, 16), stem_channels=8, groups=2, se=rv.SqueezeExcite(4))
PLUS = rv.Variant(
    "plus",
    (2, 1, 3),
    (8, 16, 16),
    stem_channels=8,
    se=rv.SqueezeExcite(2, after_relu=True),
    auxiliary=("stage1_block1", "stage2_block0", "stage3_block0"),
)
PLUS_TAPS = {(1, 1): "stage1_aux", (2, 0): "stage2_aux", (3, 0): "stage3_first_aux"}


def network(dialect, *, deploy=False):
    """A PyTorch network whose state dict has the names of that project."""
    if dialect == "plus":
        return PLUS, torch_reference.RepVGG(
            (2, 1, 3),
            (8, 16, 16),
            dialect=dialect,
            reduction=2,
            gate_last=True,
            deploy=deploy,
            taps=None if deploy else PLUS_TAPS,
        ).randomize()
    return SE, torch_reference.RepVGG(
        (2, 2), (8, 16), dialect=dialect, groups=2, reduction=4, deploy=deploy
    ).randomize()


@functools.cache
def applied(variant, deploy):
    """A compiled function of variables and images."""
    return quick_jit(rv.create_model(variant, num_classes=CLASSES, deploy=deploy).apply)


@pytest.fixture(params=torch_reference.DIALECTS)
def dialect(request):
    return request.param


@pytest.mark.parametrize("deploy", [False, True], ids=["train", "deploy"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_every_family_loads_as_pytorch_loads_it(dialect, deploy, zipped, tmp_path):
    variant, reference = network(dialect, deploy=deploy)
    path = tmp_path / "checkpoint.pth"
    ddp = {f"module.{key}": value for key, value in reference.state_dict().items()}
    saved = {"state_dict": ddp, "epoch": 3, "arch": "RepVGG", "best": torch.tensor(0.7)}
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)

    loaded = rv.load_weights(path, variant=variant)
    by_torch = torch.load(path, weights_only=True)["state_dict"]
    assert_identical(loaded.variables, rv.load_weights(by_torch, variant=variant).variables)
    assert loaded.deploy == deploy
    assert loaded.family == ("official" if dialect == "plus" else dialect)

    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference.eval()(images)[0].numpy()
    logits = applied(variant, deploy)(loaded.variables, images.permute(0, 2, 3, 1).numpy())
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("deploy", [False, True], ids=["train", "deploy"])
def test_what_we_write_pytorch_loads_strictly(dialect, deploy, suffix, tmp_path):
    variant, reference = network(dialect, deploy=deploy)
    variables = random_weights(variant, deploy=deploy, num_classes=CLASSES)
    path = tmp_path / f"ours{suffix}"
    family = "official" if dialect == "plus" else dialect
    rv.save_weights(path, variables, family=family, variant=variant)
    if suffix == ".safetensors":
        state = pytest.importorskip("safetensors.torch").load_file(path)
    else:
        state = torch.load(path, weights_only=True)
    reference.load_state_dict(state, strict=True)
    assert_identical(rv.load_weights(reference.state_dict(), variant=variant).variables, variables)
    assert_identical(rv.load_weights(path, variant=variant).variables, variables)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_other_precisions_are_read_as_pytorch_converts_them(dtype, zipped, tmp_path):
    variant, reference = network("official")
    path = tmp_path / "checkpoint.pth"
    state = reference.to(getattr(torch, dtype)).state_dict()
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    expected = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    for source in (path, state):
        assert_identical(
            rv.load_weights(source, variant=variant).variables,
            rv.load_weights(expected, variant=variant).variables,
        )


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_views_and_parameters_are_read_by_their_strides(zipped, tmp_path):
    """Tensors of any layout, and all of them views of one storage."""
    variant, reference = network("official")
    state = {k: v for k, v in reference.state_dict().items() if v.ndim}
    offsets = np.cumsum([0] + [v.numel() for v in state.values()])
    shared = torch.cat([v.flatten() for v in state.values()])
    views = {
        key: shared[start : start + v.numel()].view(v.shape)
        for (key, v), start in zip(state.items(), offsets, strict=False)
    }
    kernel = "stage1.0.rbr_dense.conv.weight"
    views[kernel] = views[kernel].to(memory_format=torch.channels_last)
    views["linear.weight"] = views["linear.weight"].T.contiguous().T
    every_second = torch.stack([views["linear.bias"], views["linear.bias"]], 1).flatten()
    views["linear.bias"] = every_second[::2]
    views["stage0.rbr_1x1.conv.weight"] = torch.nn.Parameter(views["stage0.rbr_1x1.conv.weight"])
    path = tmp_path / "views.pth"
    torch.save(views, path, _use_new_zipfile_serialization=zipped)
    assert_identical(
        rv.load_weights(path, variant=variant).variables,
        rv.load_weights(state, variant=variant).variables,
    )


def test_files_without_checksums_load(tmp_path):
    variant, reference = network("official")
    path = tmp_path / "checkpoint.pth"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(reference.state_dict(), path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert_identical(
        rv.load_weights(path, variant=variant).variables,
        rv.load_weights(reference.state_dict(), variant=variant).variables,
    )


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickled_module_is_refused(zipped, tmp_path):
    path = tmp_path / "module.pth"
    torch.save(torch.nn.Linear(2, 2), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"torch\.nn\.modules\.linear\.Linear.*state_dict\(\)"):
        rv.load_weights(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_checkpoint_of_a_training_program(zipped, tmp_path):
    """With an averaged model, an optimizer and objects that are no weights."""
    variant, reference = network("official")
    averaged = torch.optim.swa_utils.AveragedModel(reference)
    optimizer = torch.optim.AdamW(reference.parameters())
    for parameter in reference.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    saved = {
        "net": averaged.state_dict(),
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(device=torch.device("cpu"), dtype=torch.float16),
        "rng": (torch.get_rng_state(), np.random.default_rng(0).bit_generator.state),
        "size": torch.Size((1, 2)),
        "best": np.float64(71.5),
        "layer": torch.nn.Linear(2, 2),
        "sparse": torch.ones(2, 2).to_sparse(),
        "complex": torch.ones(2, dtype=torch.complex64),
    }
    path = tmp_path / "checkpoint.pth"
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)
    loaded = rv.load_weights(path, variant=variant)
    expected = {k.removeprefix("module."): v for k, v in averaged.state_dict().items()}
    del expected["n_averaged"]
    assert_identical(loaded.variables, rv.load_weights(expected, variant=variant).variables)
    assert loaded.unused[0] == "n_averaged"
    assert "args (a pickled argparse.Namespace)" in loaded.unused
    assert {"torch.device", "torch.Size", "torch.nn.modules.linear.Linear"} <= set(
        loaded.placeholders
    )


def test_a_torchscript_archive_is_refused(tmp_path):
    from zipfile import ZipFile

    path = tmp_path / "script.pt"
    with ZipFile(path, "w") as archive:  # torch.jit.save is deprecated, its container is not new
        archive.writestr("script/data.pkl", b"\x80\x02}.")
        archive.writestr("script/constants.pkl", b"\x80\x02).")
    with pytest.raises(ValueError, match=r"TorchScript.*state_dict"):
        rv.load_weights(path)
