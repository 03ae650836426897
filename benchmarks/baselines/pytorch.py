"""Folded networks as PyTorch modules, with the same parameters."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from baselines.network import (
    Affine,
    Average,
    Conv,
    Dense,
    Flatten,
    Gate,
    MaxPool,
    Network,
    Part,
    Sum,
)

_ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, None: nn.Identity}


def build(network: Network, params: Mapping[str, Any]) -> nn.Module:
    """The module in evaluation, for images (images, channels, height, width).

    Args:
      network: what to build.
      params: of the deploy form, NumPy arrays.
    """
    return nn.Sequential(*(_module(part, params) for part in network.parts)).eval()


def _module(part: Part, params: Mapping[str, Any]) -> nn.Module:
    match part:
        case Conv():
            own = params[part.name]
            kernel, bias = map(_tensor, (own.get("reparam", own)[k] for k in ("kernel", "bias")))
            conv = nn.Conv2d(
                kernel.shape[2] * part.groups,
                part.features,
                part.size,
                part.stride,
                part.size // 2,
                groups=part.groups,
            )
            _set(conv, kernel.permute(3, 2, 0, 1), bias)
            return nn.Sequential(conv, _ACTIVATIONS[part.activation]())
        case Dense():
            return nn.Sequential(_linear(params[part.name]), _ACTIVATIONS[part.activation]())
        case Affine():
            return _Affine(*(_tensor(params[part.name][leaf]) for leaf in ("scale", "bias")))
        case Gate():
            return _Gate(
                _linear(params[f"{part.name}_reduce"]),
                _ACTIVATIONS[part.activation](),
                _linear(params[f"{part.name}_expand"]),
            )
        case Sum():
            branches = [
                nn.Sequential(*(_module(inner, params) for inner in branch))
                for branch in part.branches
            ]
            return _Sum(branches, _ACTIVATIONS[part.activation]())
        case MaxPool():
            return nn.MaxPool2d(part.size, part.stride, part.padding)
        case Average():
            return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        case Flatten():
            return _Flatten()


class _Sum(nn.Module):
    def __init__(self, branches: list[nn.Module], activation: nn.Module):
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, *others = self.branches
        y = first(x)
        for branch in others:
            y = y + branch(x)
        return self.activation(y)


class _Gate(nn.Module):
    def __init__(self, reduce: nn.Module, activation: nn.Module, expand: nn.Module):
        super().__init__()
        self.reduce, self.activation, self.expand = reduce, activation, expand

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.expand(self.activation(self.reduce(x.mean((2, 3)))))
        return x * torch.sigmoid(y)[:, :, None, None]


class _Affine(nn.Module):
    def __init__(self, scale: torch.Tensor, bias: torch.Tensor):
        super().__init__()
        self.scale = nn.Parameter(scale[:, None, None])
        self.bias = nn.Parameter(bias[:, None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale + self.bias


class _Flatten(nn.Module):
    """In the order height, width, channels, as the parameters are; no copy if channels are last."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)


def _linear(own: Mapping[str, Any]) -> nn.Linear:
    kernel, bias = _tensor(own["kernel"]), _tensor(own["bias"])
    layer = nn.Linear(*kernel.shape)
    _set(layer, kernel.T, bias)
    return layer


def _set(layer: Any, weight: torch.Tensor, bias: torch.Tensor) -> None:
    layer.weight = nn.Parameter(weight.contiguous())
    layer.bias = nn.Parameter(bias)


def _tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(array)
