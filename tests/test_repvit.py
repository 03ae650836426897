"""RepViT: parity with timm's models in both forms, and the fold of the whole network."""

import jax
import numpy as np
import pytest

from repvgg_jax.repvit import REPVITS, RepViTVariant, create_repvit
from repvgg_jax.weights.repvit import load_repvit
from tests.helpers.trees import randomize

TINY = RepViTVariant("tiny", (2, 3), (16, 24))


def shapes(model, size=64):
    images = jax.ShapeDtypeStruct((1, size, size, 3), "float32")
    return jax.eval_shape(model.init, jax.random.key(0), images)


@pytest.mark.parametrize("distillation", [True, False])
def test_fused_in_float64(distillation):
    with jax.enable_x64(True):
        model = create_repvit(
            TINY, num_classes=5, distillation=distillation, dtype="float64", param_dtype="float64"
        )
        variables = randomize(shapes(model), seed=1)
        images = np.random.default_rng(0).standard_normal((2, 37, 50, 3))
        expected = np.asarray(model.apply(variables, images))
        fused = model.fuse(variables)
        assert list(fused) == ["params"]
        found = np.asarray(model.clone(deploy=True).apply(fused, images))
    assert np.abs(found - expected).max() <= 1e-12 * np.abs(expected).max()


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n != "repvit_m0_9" else []) for n in REPVITS],
)
def test_parameters_are_those_of_timm(name):
    timm, torch = pytest.importorskip("timm"), pytest.importorskip("torch")
    with torch.device("meta"):
        theirs = timm.create_model(name)
    model = create_repvit(name)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes(model)["params"]))
    assert count == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("distillation", [True, False])
def test_parity_with_timm(distillation):
    pytest.importorskip("timm")
    torch = pytest.importorskip("torch")
    from timm.models.repvit import RepVit

    theirs = RepVit(
        embed_dim=TINY.channels, depth=TINY.depths, num_classes=5, distillation=distillation
    ).eval()
    rng = torch.Generator().manual_seed(0)
    state = {
        key: torch.rand(value.shape, generator=rng) * 0.5 + 0.2
        if value.is_floating_point() and ("bn" in key)
        else torch.randn(value.shape, generator=rng) * 0.2
        if value.is_floating_point()
        else value
        for key, value in theirs.state_dict().items()
    }
    theirs.load_state_dict(state)
    model = create_repvit(TINY, num_classes=5, distillation=distillation)
    variables = load_repvit(state)
    wanted = {"params": shapes(model)["params"], "batch_stats": shapes(model)["batch_stats"]}
    assert jax.tree.map(np.shape, variables) == jax.tree.map(lambda leaf: leaf.shape, wanted)
    images = np.random.default_rng(0).standard_normal((2, 3, 64, 48)).astype(np.float32)
    expected = theirs(torch.from_numpy(images)).detach().numpy()
    ours = images.transpose(0, 2, 3, 1)
    with jax.default_matmul_precision("highest"):
        found = np.asarray(model.apply(variables, ours))
        deployed = model.clone(deploy=True)
        fused = np.asarray(deployed.apply(model.fuse(variables), ours))
        scale = np.abs(expected).max()
        assert np.abs(found - expected).max() <= 1e-5 * scale
        assert np.abs(fused - expected).max() <= 1e-5 * scale
        # Their own fold, read in deploy form.
        for module in theirs.modules():
            for name, child in list(module.named_children()):
                if hasattr(child, "fuse"):
                    setattr(module, name, child.fuse())
        again = load_repvit(theirs.state_dict())
        assert list(again) == ["params"]
        assert np.abs(np.asarray(deployed.apply(again, ours)) - expected).max() <= 1e-5 * scale


@pytest.mark.slow
def test_training_updates_statistics():
    model = create_repvit(TINY, num_classes=5)
    images = np.random.default_rng(0).standard_normal((4, 32, 32, 3)).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    logits, new = model.apply(variables, images, train=True, mutable=["batch_stats"])
    assert logits.shape == (4, 5)
    mean = new["batch_stats"]["head"]["bn_head"]["mean"]
    assert np.abs(np.asarray(mean)).max() > 0


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"stages.0.blocks.0.token_mixer.conv1.c.weight": np.zeros((8, 1, 1, 1))}, "conv1.c"),
        ({"stages.0.blocks.0.token_mixer.bn.weight": np.zeros(8), "x.weight": np.zeros(3)}, "x.w"),
    ],
    ids=["legacy", "other"],
)
def test_other_networks_are_refused(state, words):
    with pytest.raises(ValueError, match=f"not a RepViT.*{words}"):
        load_repvit(state)
    with pytest.raises(ValueError, match="repvit_m0_9"):
        create_repvit("repvit_m09")
