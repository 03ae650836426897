"""A small RepVGG in PyTorch, written for the tests alone.

An independent statement of the paper: it shares no line and no table with `repvgg_jax`. The
names of its parameters are those of one of the projects whose checkpoints we read, so that
its `state_dict()` is a checkpoint as that project would save it.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

torch.set_num_threads(1)  # the networks are tiny; threads only wait for each other


@dataclasses.dataclass(frozen=True)
class Dialect:
    """One project's names: of a block by its stage (0 is the stem) and index, and inside it."""

    block: Callable[[int, int], str]
    head: str
    dense: str
    point: str
    identity: str
    fused: str
    squeeze: tuple[str, str]
    norm: str = "bn"


def _plus_block(stage: int, index: int) -> str:
    # The small RepVGGplus of the tests splits its third stage after the first block.
    if stage == 0:
        return "stage0"
    if stage == 3:
        return f"stage3_second.blocks.{index - 1}" if index else "stage3_first.blocks.0"
    return f"stage{stage}.blocks.{index}"


_OFFICIAL = Dialect(
    block=lambda stage, index: f"stage{stage}.{index}" if stage else "stage0",
    head="linear",
    dense="rbr_dense",
    point="rbr_1x1",
    identity="rbr_identity",
    fused="rbr_reparam",
    squeeze=("se.down", "se.up"),
)
DIALECTS = {
    "official": _OFFICIAL,
    "plus": dataclasses.replace(
        _OFFICIAL, block=_plus_block, squeeze=("post_se.down", "post_se.up")
    ),
    "timm": Dialect(
        block=lambda stage, index: f"stages.{stage - 1}.{index}" if stage else "stem",
        head="head.fc",
        dense="conv_kxk",
        point="conv_1x1",
        identity="identity",
        fused="reparam_conv",
        squeeze=("attn.fc1", "attn.fc2"),
    ),
    "mmpretrain": Dialect(
        block=lambda stage, index: f"backbone.stage_{stage}.{index}" if stage else "backbone.stem",
        head="head.fc",
        dense="branch_3x3",
        point="branch_1x1",
        identity="branch_norm",
        fused="branch_reparam",
        squeeze=("se_layer.conv1.conv", "se_layer.conv2.conv"),
        norm="norm",
    ),
}


class Block(nn.Module):
    """ReLU of three branches summed, or of one convolution."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        dialect: Dialect,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        identity: bool = False,
        reduction: int | None = None,
        gate_last: bool = False,
        deploy: bool = False,
    ):
        super().__init__()
        self.gate_last = gate_last
        wide = {
            "stride": stride,
            "groups": groups,
            "padding": dilation,
            "dilation": dilation,
        }
        if deploy:
            self.branches = [_attach(self, dialect.fused, nn.Conv2d(inputs, outputs, 3, **wide))]
        else:
            chains = {
                dialect.dense: nn.Conv2d(inputs, outputs, 3, bias=False, **wide),
                dialect.point: nn.Conv2d(
                    inputs, outputs, 1, stride=stride, groups=groups, bias=False
                ),
            }
            self.branches = []
            for name, conv in chains.items():
                _attach(self, f"{name}.conv", conv)
                norm = _attach(self, f"{name}.{dialect.norm}", nn.BatchNorm2d(outputs))
                self.branches.append(lambda x, conv=conv, norm=norm: norm(conv(x)))
            if identity:
                norm = _attach(self, dialect.identity, nn.BatchNorm2d(outputs))
                self.branches.append(norm)
        self.gate = None
        if reduction is not None:
            down = nn.Conv2d(outputs, outputs // reduction, 1)
            up = nn.Conv2d(outputs // reduction, outputs, 1)
            for name, conv in zip(dialect.squeeze, (down, up), strict=True):
                _attach(self, name, conv)
            self.gate = lambda x: torch.sigmoid(up(F.relu(down(F.adaptive_avg_pool2d(x, 1)))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Feature maps of feature maps."""
        y = sum(branch(x) for branch in self.branches)
        if self.gate is None:
            return F.relu(y)
        if self.gate_last:
            y = F.relu(y)
            return y * self.gate(y)
        return F.relu(y * self.gate(y))


class RepVGG(nn.Module):
    """A stem, stages of blocks, global average pooling and one linear layer."""

    def __init__(
        self,
        depths: tuple[int, ...],
        channels: tuple[int, ...],
        *,
        dialect: str = "official",
        stem: int = 8,
        num_classes: int = 5,
        groups: int = 1,
        dilated_from: int | None = None,
        as_timm: bool = False,
        taps: dict[tuple[int, int], str] | None = None,
        **options: object,
    ):
        """`dilated_from` turns the strides from that stage on into dilation.

        With `as_timm`, the first block of such a stage has dilation 1 where the others have 2,
        and otherwise 2, as in timm's create_byob_stages.
        """
        super().__init__()
        names = DIALECTS[dialect]
        self.blocks: list[tuple[tuple[int, int], Block]] = []
        self.heads: dict[tuple[int, int], nn.Sequential] = {}
        self._add(names, (0, 0), Block(3, stem, dialect=names, stride=2, **options))
        inputs, dilation, ordinal = stem, 1, 0
        for stage, (depth, outputs) in enumerate(zip(depths, channels, strict=True), start=1):
            for index in range(depth):
                ordinal += 1
                stride = 2 if index == 0 else 1
                identity = stride == 1 and inputs == outputs
                if dilated_from is not None and stage >= dilated_from and stride == 2:
                    stride, dilation = 1, dilation * 2
                block = Block(
                    inputs,
                    outputs,
                    dialect=names,
                    stride=stride,
                    dilation=min(dilation // 2 or 1, 2) if as_timm and not index else dilation,
                    groups=groups if ordinal % 2 == 0 else 1,
                    identity=identity,
                    **options,
                )
                self._add(names, (stage, index), block)
                inputs = outputs
        for place, name in (taps or {}).items():
            self._add_head(place, name, channels[place[0] - 1], num_classes)
        self.classify = [_attach(self, names.head, nn.Linear(inputs, num_classes))]

    def _add(self, names: Dialect, place: tuple[int, int], block: Block) -> None:
        self.blocks.append((place, _attach(self, names.block(*place), block)))

    def _add_head(self, place: tuple[int, int], name: str, width: int, classes: int) -> None:
        conv = nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False)
        norm, linear = nn.BatchNorm2d(width), nn.Linear(width, classes)
        for suffix, module in (("0.conv", conv), ("0.bn", norm), ("3", linear)):
            _attach(self, f"{name}.{suffix}", module)
        self.heads[place] = lambda x: linear(F.relu(norm(conv(x))).mean((2, 3)))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Class scores, and those of the auxiliary heads."""
        auxiliary = []
        for place, block in self.blocks:
            x = block(x)
            if place in self.heads:
                auxiliary.append(self.heads[place](x))
        return self.classify[0](x.mean((2, 3))), auxiliary

    def randomize(self, seed: int = 0) -> "RepVGG":
        """Random weights, affines and statistics; the last far from where training starts."""
        generator = torch.Generator().manual_seed(seed)

        def uniform(tensor: torch.Tensor, low: float, high: float) -> None:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    uniform(module.weight, 0.5, 1.5)
                    uniform(module.bias, -0.5, 0.5)
                    uniform(module.running_mean, -0.5, 0.5)
                    uniform(module.running_var, 0.5, 2.0)
                elif isinstance(module, (nn.Conv2d, nn.Linear)):
                    bound = module.weight[0].numel() ** -0.5
                    uniform(module.weight, -bound, bound)
                    if module.bias is not None:
                        uniform(module.bias, -0.5, 0.5)
        return self


def _attach(root: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Registers a module under a dotted name, with containers on the way to it."""
    *containers, last = name.split(".")
    for container in containers:
        if container not in dict(root.named_children()):
            root.add_module(container, nn.Module())
        root = root.get_submodule(container)
    root.add_module(last, module)
    return module
