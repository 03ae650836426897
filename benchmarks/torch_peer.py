"""RepVGG in PyTorch as its users run it: the peer of the benchmarks.

Written from the paper, from the same table of architectures. `torch` and `timm` are imported
on request; timm runs without torchvision, whose transforms are not needed here.
"""

import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

from repvgg_jax.variants import VARIANTS, Layer, get_variant


def installed(package: str = "torch") -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def build(name: str, *, deploy: bool, num_classes: int = 1000) -> Any:
    """A `torch.nn.Module` of a variant, with random weights; timm's of blocks other than RepVGG."""
    variant = get_variant(name)
    if variant.block != "repvgg":
        return build_timm(name, deploy=deploy, num_classes=num_classes)
    import torch
    from torch import nn

    def conv(layer: Layer, size: int, inputs: int, bias: bool) -> nn.Conv2d:
        return nn.Conv2d(
            inputs,
            layer.features,
            size,
            stride=layer.stride,
            padding=size // 2,
            groups=layer.groups,
            bias=bias,
        )

    class Block(nn.Module):
        def __init__(self, layer: Layer):
            super().__init__()
            inputs, width = layer.in_channels or 3, layer.features
            self.fused = conv(layer, 3, inputs, True) if deploy else None
            if not deploy:
                self.branch3 = nn.Sequential(conv(layer, 3, inputs, False), nn.BatchNorm2d(width))
                self.branch1 = nn.Sequential(conv(layer, 1, inputs, False), nn.BatchNorm2d(width))
                self.identity = nn.BatchNorm2d(width) if layer.identity else None

        def forward(self, x: Any) -> Any:
            if self.fused is not None:
                return torch.relu(self.fused(x))
            y = self.branch3(x) + self.branch1(x)
            if self.identity is not None:
                y = y + self.identity(x)
            return torch.relu(y)

    blocks = [Block(layer) for layer in variant.layers()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(variant.features, num_classes)]
    return nn.Sequential(*blocks, *head)


def build_timm(name: str, *, deploy: bool, num_classes: int = 1000) -> Any:
    """Timm's model of a variant, reparameterized if deployed.

    Raises:
      ValueError: timm has no such network.
    """
    _without_torchvision()
    import timm
    from timm.utils.model import reparameterize_model

    variant = get_variant(name)
    theirs = f"repvgg_{variant.name.lower()}" if variant.name in VARIANTS else variant.name
    if not timm.is_model(theirs):
        raise ValueError(f"timm has no {theirs} to compare {variant.name} with")
    model = timm.create_model(theirs, pretrained=False, num_classes=num_classes)
    if not deploy:
        return model
    model = reparameterize_model(model.eval())
    if hasattr(model, "fuse"):  # RepViT, all of whose modules fuse
        model.fuse()
    return model


def on_gpu() -> bool:
    """Whether PyTorch is installed and sees a GPU."""
    if not installed():
        return False
    import torch

    return torch.cuda.is_available()


def peak_mib(run: Callable[[], None]) -> float:
    """The most memory that PyTorch held on the GPU during two runs, in MiB."""
    import torch

    run()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() / 2**20


def optimizer(model: Any) -> Any:
    """SGD with momentum and weight decay, as in `step.py`."""
    import torch

    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)


def trainer(model: Any, images: Any, labels: Any, *, channels_last: bool = False,
            compile: bool = False, bf16: bool = False,
            wait: bool = True) -> Callable[[], Any]:  # fmt: skip
    """A function that does one step of SGD with momentum, waits for it, and returns the loss.

    Args:
      model: in training form.
      images: NumPy (images, height, width, 3) in float32.
      labels: NumPy (images,).
      channels_last: keep images and weights channels last in memory.
      compile: through `torch.compile`.
      bf16: under bfloat16 autocast.
      wait: return when the step is done, and not as soon as it is started.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    memory = torch.channels_last if channels_last else torch.contiguous_format
    model = model.train().to(device=device, memory_format=memory)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).to(device).contiguous(memory_format=memory)
    y = torch.from_numpy(labels).long().to(device)
    sgd = optimizer(model)
    forward = torch.compile(model) if compile else model

    def step() -> Any:
        sgd.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = torch.nn.functional.cross_entropy(forward(x), y)
        loss.backward()
        sgd.step()
        if wait:
            _wait(loss)
        return loss

    return step


def predictor(model: Any, images: Any, *, channels_last: bool = False, compile: bool = False,
              freezing: bool = False, bf16: bool = False, whole: bool = False,
              wait: bool = True) -> Callable[[], Any]:  # fmt: skip
    """A function that computes the logits of `images` and waits for them; as `trainer`.

    With `freezing` the compiler takes the weights as constants, in the whole process. With `whole`
    weights and images are in bfloat16, too, and there is no autocast.
    """
    import torch

    if freezing:
        import torch._inductor.config as inductor

        inductor.freezing = True

    device = "cuda" if torch.cuda.is_available() else "cpu"
    memory = torch.channels_last if channels_last else torch.contiguous_format
    model = model.eval().to(device=device, memory_format=memory)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).to(device).contiguous(memory_format=memory)
    if bf16 and whole:
        model, x, bf16 = model.to(torch.bfloat16), x.to(torch.bfloat16), False
    mode = "max-autotune" if device == "cuda" else None
    forward = torch.compile(model, mode=mode) if compile else model

    def run() -> Any:
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=bf16):
            logits = forward(x)
        if wait:
            _wait(logits)
        return logits

    return run


def _wait(result: Any) -> None:
    if result.is_cuda:
        import torch

        torch.cuda.synchronize()


def _without_torchvision() -> None:
    """Lets timm import where torchvision is absent; only its data transforms would need it."""
    if "torchvision" in sys.modules or installed("torchvision"):  # perhaps the stand-in below
        return

    def anything(_: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return AnyClass(name, (), {})

    AnyClass = type("AnyClass", (type,), {"__getattr__": anything})
    Empty = type("Empty", (types.ModuleType,), {"__getattr__": anything})

    names = ("transforms", "transforms.functional", "ops", "ops.misc", "datasets",
             "models", "models.feature_extraction")  # fmt: skip
    for full in ("torchvision", *(f"torchvision.{name}" for name in names)):
        module = Empty(full)
        module.__path__ = []
        sys.modules[full] = module
        parent, _, child = full.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
