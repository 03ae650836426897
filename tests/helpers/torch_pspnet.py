"""A small PSPNet in PyTorch, written for the tests alone; it shares no line with `repvgg_jax`.

The backbone's blocks are those of `torch_reference`, or torch bottlenecks for the ResNet.
"""

import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers.torch_reference import DIALECTS, Block


class ConvNorm(nn.Sequential):
    """Convolution, norm and, unless it ends a branch, ReLU."""

    def __init__(self, inputs, outputs, size, stride=1, dilation=1, relu=True):
        conv = nn.Conv2d(
            inputs,
            outputs,
            size,
            stride=stride,
            padding=dilation * (size // 2),
            dilation=dilation,
            bias=False,
        )
        super().__init__(conv, nn.BatchNorm2d(outputs), *([nn.ReLU()] if relu else []))


class RepVGGStages(nn.Module):
    """Blocks given one by one: (outputs, stride, dilation, groups, identity), by stage."""

    def __init__(self, stages):
        super().__init__()
        inputs = 3
        self.stages = nn.ModuleList()
        for blocks in stages:
            made = []
            for outputs, stride, dilation, groups, identity in blocks:
                made.append(
                    Block(
                        inputs,
                        outputs,
                        dialect=DIALECTS["official"],
                        stride=stride,
                        dilation=dilation,
                        groups=groups,
                        identity=identity,
                    )
                )
                inputs = outputs
            self.stages.append(nn.Sequential(*made))

    def forward(self, x):
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class Bottleneck(nn.Module):
    def __init__(self, inputs, width, stride, dilation, projects):
        super().__init__()
        self.convs = nn.Sequential(
            ConvNorm(inputs, width, 1),
            ConvNorm(width, width, 3, stride, dilation),
            ConvNorm(width, 4 * width, 1, relu=False),
        )
        shortcut = ConvNorm(inputs, 4 * width, 1, stride, relu=False)
        self.shortcut = shortcut if projects else None

    def forward(self, x):
        return F.relu(self.convs(x) + (x if self.shortcut is None else self.shortcut(x)))


class ResNetStages(nn.Module):
    """A deep stem and bottlenecks given one by one: (width, stride, dilation), by stage."""

    def __init__(self, stem, stages):
        super().__init__()
        first, second, third = stem
        self.stem = nn.Sequential(
            ConvNorm(3, first, 3, stride=2), ConvNorm(first, second, 3), ConvNorm(second, third, 3)
        )
        inputs = third
        self.stages = nn.ModuleList()
        for blocks in stages:
            made = []
            for width, stride, dilation in blocks:
                # The first of a stage projects, as with its stride in the classifier.
                made.append(Bottleneck(inputs, width, stride, dilation, projects=not made))
                inputs = 4 * width
            self.stages.append(nn.Sequential(*made))

    def forward(self, x):
        x = F.max_pool2d(self.stem(x), 3, stride=2, padding=1)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class PSPNet(nn.Module):
    """As in the authors' example: images have 8k + 1 pixels, and corners stay on corners."""

    def __init__(self, backbone, channels, before, *, classes, width, auxiliary_width, bins):
        super().__init__()
        self.backbone, self.bins = backbone, bins
        share = channels // len(bins)
        self.levels = nn.ModuleList(ConvNorm(channels, share, 1) for _ in bins)
        self.decoder = ConvNorm(channels + share * len(bins), width, 3)
        self.head = nn.Conv2d(width, classes, 1)
        self.auxiliary = ConvNorm(before, auxiliary_width, 3)
        self.auxiliary_head = nn.Conv2d(auxiliary_width, classes, 1)

    def forward(self, x):
        size = x.shape[2:]
        *_, before, last = self.backbone(x)

        def resized(y, to):
            return F.interpolate(y, to, mode="bilinear", align_corners=True)

        levels = [last]
        for windows, level in zip(self.bins, self.levels, strict=True):
            pooled = F.adaptive_avg_pool2d(last, windows)
            levels.append(resized(level(pooled), last.shape[2:]))
        main = self.head(self.decoder(torch.cat(levels, 1)))
        auxiliary = self.auxiliary_head(self.auxiliary(before))
        return resized(main, size), resized(auxiliary, size)
