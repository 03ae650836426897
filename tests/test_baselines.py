"""The baselines of the paper's tables: exact counts, the fold, and parity with other libraries."""

import importlib.util
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repvgg_jax as rv
from repvgg_jax.text import named_leaves
from tests.helpers.jit import quick_jit

# Benchmarks are scripts, not a package; their modules import each other from their own folder.
sys.path.append(str(pathlib.Path(__file__).parents[1] / "benchmarks"))

from baselines import BASELINES, cost, from_variant, random_params, resnet, unconverted
from baselines.linen import Baseline
from baselines.network import Conv, Dense, Flatten, MaxPool, Network, shapes
from baselines.zoo import efficientnet, regnetx, residual
from models_page import TIMM

# Trainable and folded parameters; M parameters, G MACs and G Winograd multiplications as the paper
# prints them in Tables 4 and 5. Parameters are truncated there (EfficientNet-B3's are rounded).
TABLE = {
    "ResNet-18": (11_689_512, 11_684_712, 11.68, 1.8, 1.0),
    "ResNet-34": (21_797_672, 21_789_160, 21.78, 3.7, 1.8),
    "ResNet-50": (25_557_032, 25_530_472, 25.53, 3.9, 2.8),
    "ResNet-101": (44_549_160, 44_496_488, 44.49, 7.6, 5.5),
    "ResNet-152": (60_192_808, 60_117_096, 60.11, 11.3, 8.1),
    "ResNeXt-50": (25_028_904, 24_994_792, 24.99, 4.2, 4.1),
    # The authors decided from measured times which grouped convolutions used Winograd.
    "ResNeXt-101": (44_177_704, 44_108_776, 44.10, 8.0, None),
    "VGG-16": (138_357_544, 138_357_544, 138.35, 15.5, 6.9),
    "VGG-16-BN": (138_365_992, 138_357_544, 138.35, 15.5, 6.9),
    "EfficientNet-B0": (5_288_548, 5_267_540, 5.26, 0.4, None),
    "EfficientNet-B3": (12_233_232, 12_189_584, 12.18, 1.8, None),
    "RegNetX-3.2GF": (15_296_552, 15_265_272, 15.26, 3.2, None),
    "RegNetX-12GF": (46_106_056, 46_057_864, 46.05, 12.1, None),
}


def _vgg(features: int) -> Network:
    convs = [Conv(f"conv{index}", features, norm=True, bias=True) for index in range(2)]
    parts = (convs[0], MaxPool(2, 2), convs[1], Conv("plain", features, norm=False))
    return Network("vgg", (*parts, Flatten(), Dense("hidden", 8, "relu"), Dense("head", 5)))


# Small networks of the same builders, which have every kind of part.
SMALL = {
    "basic": residual("basic", (1, 1), (64, 8), (64, 8), strided=None),
    "bottleneck": residual("bottleneck", (1, 1), (8, 8), (64, 32), strided="1x1"),
    "grouped": residual("grouped", (1, 1), (8, 16), (16, 24), groups=4),
    "vgg": _vgg(8),
    "efficientnet": efficientnet("efficientnet", width=0.25, depth=0.5),
    "regnetx": regnetx("regnetx", (1, 2), (8, 16), 4),
}
SIZE = 33  # odd, so that every stride rounds


def _images(dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((2, SIZE, SIZE, 3)).astype(dtype)


def _variables(model: Baseline, images: np.ndarray) -> dict:
    """Random variables; the statistics and affine parameters of norms are random, too."""
    rng = np.random.default_rng(4)
    shaped = jax.eval_shape(model.init, jax.random.key(0), images)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path[-1].key
        if name in ("var", "scale"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)
        scale = (2 / math.prod(leaf.shape[:-1])) ** 0.5 if name == "kernel" else 0.2
        return (scale * rng.standard_normal(leaf.shape)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shaped)


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())


@pytest.mark.core
def test_the_table_is_complete():
    assert TABLE.keys() == BASELINES.keys()


@pytest.mark.core
@pytest.mark.parametrize("name", TABLE)
def test_counts(name):
    train, deploy, printed, gmacs, winograd = TABLE[name]
    found = cost(BASELINES[name])
    assert (found.params_train, found.params_deploy) == (train, deploy)
    assert int(found.params_deploy / 1e4) / 100 == printed
    assert round(found.macs_deploy / 1e9, 1) == gmacs
    assert winograd is None or round(found.winograd_muls / 1e9, 1) == winograd
    assert all(isinstance(value, int) for value in vars(found).values())


@pytest.mark.core
@pytest.mark.parametrize("name", ["A0", "B1g4"])
def test_a_repvgg_costs_what_the_library_says(name):
    ours, theirs = cost(from_variant(rv.get_variant(name))), rv.cost(name)
    for what in ("params_deploy", "macs_deploy", "winograd_muls"):
        assert getattr(ours, what) == getattr(theirs, what)
    split = cost(unconverted(rv.get_variant(name)))
    assert split.macs_deploy == theirs.macs_train


def test_torchvisions_stride_costs_more():
    assert round(cost(resnet(50, strided="3x3")).macs_deploy / 1e9, 1) == 4.1


@pytest.mark.parametrize("name", ["ResNet-18", "EfficientNet-B0", "VGG-16-BN"])
def test_the_module_has_the_counted_parameters(name):
    network = BASELINES[name]
    image = jax.ShapeDtypeStruct((1, network.image_size, network.image_size, 3), jnp.float32)
    found = cost(network)
    for deploy, count in ((False, found.params_train), (True, found.params_deploy)):
        model = Baseline(network, deploy=deploy)
        params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
        named = named_leaves(params)
        assert sum(leaf.size for leaf in named.values()) == count
    assert {path: leaf.shape for path, leaf in named.items()} == shapes(network)


@pytest.mark.parametrize("name", SMALL)
def test_the_fold_is_exact(name):
    """Every convolution of the folded form follows from the algebra; nothing else changes."""
    with jax.enable_x64(True):
        images = _images(np.float64)
        model = Baseline(SMALL[name], dtype=jnp.float64, param_dtype=jnp.float64)
        variables = _variables(model, images)
        folded = model.fuse(variables)
        assert "batch_stats" not in folded
        deployed = quick_jit(model.clone(deploy=True).apply)(folded, images)
        assert _relative(deployed, quick_jit(model.apply)(variables, images)) < 1e-12


@pytest.mark.parametrize("name", SMALL)
def test_all_frameworks_agree(name, tmp_path):
    _check_frameworks(SMALL[name], tmp_path)


def test_branches_that_are_not_converted(tmp_path):
    """A sum of branches is the network that their summed kernels give."""
    variant = rv.Variant("small", (2, 1), (8, 12), stem_channels=8, groups=2)
    network = unconverted(variant)
    params = random_params(network, image_size=SIZE)
    merged = {"head": params["head"]}
    for layer in variant.layers():
        kernel, bias = (params[f"{layer.name}_3x3"]["reparam"][k] for k in ("kernel", "bias"))
        kernel, small = kernel.copy(), params[f"{layer.name}_1x1"]["reparam"]
        kernel[1:2, 1:2] += small["kernel"]
        bias = bias + small["bias"]
        if identity := params.get(f"{layer.name}_identity"):
            width = layer.features // layer.groups
            for channel, scale in enumerate(identity["scale"]):
                kernel[1, 1, channel % width, channel] += scale
            bias = bias + identity["bias"]
        merged[layer.name] = {"reparam": {"kernel": kernel, "bias": bias}}
    images = _images()
    split = Baseline(network, deploy=True).apply({"params": params}, images)
    model = rv.create_model(variant, deploy=True)
    assert _relative(split, model.apply({"params": merged}, images)) < 1e-5
    _check_frameworks(network, tmp_path)


def test_leaving_out_branches():
    variant = rv.get_variant("B0")
    both = cost(unconverted(variant))
    no_identity = cost(unconverted(variant, identity=False))
    neither = cost(unconverted(variant, identity=False, pointwise=False))
    assert both.macs_deploy == no_identity.macs_deploy > neither.macs_deploy
    assert both.params_deploy > no_identity.params_deploy > neither.params_deploy
    assert neither.params_deploy == rv.cost("B0").params_deploy


def test_a_variant_with_gates_is_refused():
    with pytest.raises(ValueError, match="D2se"):
        from_variant(rv.get_variant("D2se"))


def _check_frameworks(network: Network, folder: pathlib.Path) -> None:
    """PyTorch, onnxruntime and OpenVINO, where installed, compute what the Flax module does."""
    images, params = _images(), random_params(network, image_size=SIZE)
    reference = quick_jit(Baseline(network, deploy=True).apply)({"params": params}, images)
    nchw = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    compared = []
    if importlib.util.find_spec("torch"):
        import torch
        from baselines import pytorch

        with torch.inference_mode():
            logits = pytorch.build(network, params)(torch.from_numpy(nchw)).numpy()
        assert _relative(logits, reference) < 1e-5
        compared.append("torch")
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
        import onnxruntime
        from baselines import graph

        path = folder / "model.onnx"
        graph.write(network, params, path, SIZE)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        assert _relative(session.run(None, {graph.INPUT: nchw})[0], reference) < 1e-5
        compared.append("onnxruntime")
    if not compared:
        pytest.skip("neither PyTorch nor onnxruntime is installed")


TORCHVISION = {
    name: TIMM[name] for name in ("ResNet-18", "ResNet-50", "ResNeXt-50", "VGG-16", "VGG-16-BN")
}  # whose layers are in the same order; its EfficientNet and RegNet are timm's


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_parity_with_timm(name):
    pytest.importorskip("torch")
    timm = pytest.importorskip("timm")
    _check_parity(name, timm.create_model(TIMM[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_parity_with_torchvision(name):
    pytest.importorskip("torch")
    models = pytest.importorskip("torchvision.models")
    _check_parity(name, getattr(models, TORCHVISION[name])())


def _check_parity(name: str, theirs) -> None:
    """The same logits with the same random weights, in training form and folded."""
    import torch

    network, size = BASELINES[name], 64
    if name.startswith("VGG"):
        size = 224  # its linear layers fix it
    assert sum(p.numel() for p in theirs.parameters()) == cost(network).params_train
    if network.name in ("ResNet-50", "ResNet-101", "ResNet-152"):
        for block in theirs.modules():  # the paper's stride, see `baselines.zoo`
            if type(block).__name__ == "Bottleneck" and block.conv2.stride == (2, 2):
                block.conv1.stride, block.conv2.stride = (2, 2), (1, 1)
    generator = torch.Generator().manual_seed(0)
    for norm in theirs.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            for tensor in (norm.weight.data, norm.running_var):
                tensor.uniform_(0.5, 1.5, generator=generator)
            for tensor in (norm.bias.data, norm.running_mean):
                tensor.normal_(0, 0.2, generator=generator)
    images = np.random.default_rng(0).standard_normal((1, size, size, 3)).astype(np.float32)
    with torch.inference_mode():
        nchw = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        expected = theirs.eval()(nchw).numpy()
    model = Baseline(network)
    variables = _converted(network, theirs)
    assert _relative(quick_jit(model.apply)(variables, images), expected) < 1e-5
    deployed = quick_jit(model.clone(deploy=True).apply)(model.fuse(variables), images)
    assert _relative(deployed, expected) < 1e-5


def _converted(network: Network, theirs) -> dict:
    """Variables from the layers of a PyTorch network, which are in the order of ours."""
    import torch
    from baselines.network import Gate, walk

    kinds = (torch.nn.Conv2d, torch.nn.Linear, torch.nn.BatchNorm2d)
    layers = iter([layer for layer in theirs.modules() if isinstance(layer, kinds)])
    params: dict = {}
    stats: dict = {}

    def weights(*, dense: bool) -> dict:
        layer = next(layers)
        kernel = layer.weight.detach().numpy()
        kernel = kernel.transpose(2, 3, 1, 0) if kernel.ndim == 4 else _hwc_first(kernel)
        if dense:
            kernel = kernel.reshape(-1, kernel.shape[-1])
        own = {"kernel": kernel}
        return own | ({} if layer.bias is None else {"bias": layer.bias.detach().numpy()})

    for part in walk(network.parts):
        if isinstance(part, Conv) and part.norm:
            conv, norm = weights(dense=False), next(layers)
            scale = {"scale": norm.weight.detach().numpy(), "bias": norm.bias.detach().numpy()}
            moments = {"mean": norm.running_mean.numpy(), "var": norm.running_var.numpy()}
            convs, norms = (term.name for term in part.spec.train.terms)
            params[part.name] = {convs: conv, norms: scale}
            stats[part.name] = {norms: moments}
        elif isinstance(part, (Conv, Dense)):
            params[part.name] = weights(dense=isinstance(part, Dense))
        elif isinstance(part, Gate):
            for half in ("reduce", "expand"):
                params[f"{part.name}_{half}"] = weights(dense=True)
    assert next(layers, None) is None
    return {"params": params} | ({"batch_stats": stats} if stats else {})


def _hwc_first(kernel: np.ndarray) -> np.ndarray:
    """A linear layer's (outputs, inputs) as (inputs, outputs), inputs in our order if flattened."""
    if kernel.shape[1] == 7 * 7 * 512:
        kernel = kernel.reshape(-1, 512, 7, 7).transpose(0, 2, 3, 1).reshape(len(kernel), -1)
    return kernel.T
