"""Re-parameterizable blocks of other networks, each one value or a function of its sizes.

The authors' activation, epsilon and groups are arguments of `ReparamBlock`: YOLO's blocks have
`activation=nn.silu, epsilon=1e-3, momentum=0.97`; all token mixers and large kernels are depthwise,
`groups=features`, and have `activation=None`.
"""

import dataclasses
import functools
import math

import numpy as np

from repvgg_jax.reparam.ablations import ABLATIONS
from repvgg_jax.reparam.blocks import KEPT, REPVGG, BlockSpec, conv_norm
from repvgg_jax.reparam.online import online_train
from repvgg_jax.reparam.terms import (
    AvgPool,
    Chain,
    Conv,
    Filter,
    Identity,
    Linear,
    Norm,
    SameShape,
    Scale,
    Sum,
)

REPCONV = dataclasses.replace(REPVGG, name="RepConv")
"""YOLOv7's RepConv, which is RepVGG's block: BN(K3 * x) + BN(K1 * x) + BN(x)."""

REPCONVN = dataclasses.replace(ABLATIONS["no identity"], name="RepConvN")
"""YOLOv9's RepConvN and the default of Ultralytics' RepConv: BN(K3 * x) + BN(K1 * x)."""

_DILATED = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}


def dilated_reparam(size: int) -> BlockSpec:
    """UniRepLKNet's dilated re-parameterization block with the norm behind it (CVPR 2024).

    Args:
      size: of the large kernel, odd, from 5 to 17. Sizes and dilations of the small kernels
        beside it are the authors'.

    Raises:
      ValueError: another size.
    """
    if size not in _DILATED:
        raise ValueError(f"size={size} must be one of {', '.join(map(str, _DILATED))}")
    branches = [conv_norm("_large", size)]
    branches += [
        conv_norm(f"_{small}_{rate}", small, dilation=rate) for small, rate in _DILATED[size]
    ]
    return BlockSpec(
        f"dilated reparam {size}", Chain((Sum(tuple(branches)), Norm("bn"))), keep=KEPT
    )


def repvit(size: int = 3, *, legacy: bool = False) -> BlockSpec:
    """RepViT's token mixer (Wang et al., CVPR 2024): BN(BN(K3 * x) + K1 * x + x), depthwise.

    Args:
      size: of the kernel.
      legacy: the mixer of m1 to m3: with a norm behind the 1x1 convolution instead of the sum.
    """
    dense = conv_norm("_dense", size)
    if legacy:
        return BlockSpec(
            f"RepViT mixer {size}, legacy",
            Sum((dense, conv_norm("_point", 1), Identity())),
            keep=KEPT,
        )
    total = Sum((dense, Conv("conv_point", (1, 1), bias=True), Identity()))
    return BlockSpec(f"RepViT mixer {size}", Chain((total, Norm("bn_mixer"))), keep=KEPT)


def fastvit(size: int = 3, *, layer_scale: float | None = 1e-5) -> BlockSpec:
    """FastViT's RepMixer (Vasu et al., ICCV 2023): x + s (M(x) - N(x)), depthwise.

    M is MobileOne's depthwise block without activation, N is a norm alone. Fold it from NumPy
    arrays: they are folded in float64, and the difference of two similar terms needs it.

    Args:
      size: of the kernel.
      layer_scale: initial value of s; None for no s.
    """
    mixer = (conv_norm("_mixer", size), conv_norm("_scale", 1), Norm("bn_skip"))
    change: Linear = Sum((*mixer, Chain((Norm("bn_norm"), Scale(factor=-1.0)))))
    if layer_scale is not None:
        change = Chain((change, Scale("layer_scale", initial=layer_scale)))
    return BlockSpec(f"RepMixer {size}", Sum((Identity(), change)), keep=KEPT)


def fastvit_position(size: int = 7) -> BlockSpec:
    """FastViT's conditional position encoding: x + K * x + b, depthwise."""
    conv = Conv("conv_position", (size, size), bias=True)
    return BlockSpec(f"RepCPE {size}", Sum((Identity(), conv)), keep=KEPT)


REPOPT = BlockSpec("RepOpt", Chain((Conv("conv", (3, 3)), Norm("bn"))), keep=KEPT)
"""RepOpt-VGG's block (Ding et al., ICLR 2023): a convolution and a norm, in training, too.

What its branches would do is in the optimizer: `rep_optimizer(repopt_search(), scales)`.
"""


def repopt_search(index: int = 0) -> BlockSpec:
    """RepOpt-VGG's block in the search for scales: BN(s3 K3 * x + s1 K1 * x + s0 x).

    With scales that are not trained it is a CSLA block, which `REPOPT` with `rep_optimizer` equals.

    Args:
      index: of the block in its stage. The scales of the convolutions start at sqrt(2 / index),
        and at 1 for the first one; that of the identity at 1.
    """
    initial = math.sqrt(2 / index) if index else 1.0
    terms = (
        Chain((Conv("conv3x3", (3, 3)), Scale("scale_3x3", initial=initial))),
        Chain((Conv("conv1x1", (1, 1)), Scale("scale_1x1", initial=initial))),
        SameShape(Scale("scale_identity")),
    )
    return BlockSpec("RepOpt search", Chain((Sum(terms), Norm("bn"))), keep=KEPT)


def _frequency_prior(channels: int) -> np.ndarray:
    """OREPA's 3x3 cosines per channel: along the height in the first half, else along the width."""
    half = channels / 2
    index = np.arange(channels)
    frequency = np.where(index < half, index + 1, index + 1 - half)
    wave = np.cos(math.pi / 3 * (np.arange(3)[:, None] + 0.5) * frequency)  # (position, channel)
    along_height = np.broadcast_to(wave[:, None, :], (3, 3, channels))
    return np.where(index < half, along_height, along_height.swapaxes(0, 1))


def _scaled(name: str, initial: float, *terms: Linear) -> Chain:
    return Chain((*terms, Scale(f"scale_{name}", initial=initial)))


def _point(name: str) -> Conv:
    return Conv(f"conv_{name}", (1, 1), strided=False, initial="he")


_OREPA = Chain(
    (
        Sum(
            (
                _scaled("origin", 0.25, Conv("conv_origin", (3, 3), initial="he")),
                _scaled("avg", 0.25, _point("avg"), AvgPool((3, 3))),
                _scaled("prior", 0.0, _point("prior"), Filter(_frequency_prior)),
                _scaled(
                    "kxk",
                    0.5,
                    Sum(
                        (
                            Conv("conv_inner", (1, 1), False, expansion=1, initial="zeros"),
                            Identity(),
                        )
                    ),
                    Conv("conv_kxk", (3, 3), initial="he"),
                ),
                _scaled("1x1", 1.0, Conv("conv_1x1", (1, 1), initial="he")),
                _scaled(
                    "separable",
                    0.5,
                    Conv("conv_depthwise", (3, 3), groups="depthwise", expansion=8, initial="he"),
                    _point("pointwise"),
                ),
            )
        ),
        Norm("bn"),
    )
)
OREPA = BlockSpec("OREPA", _OREPA, keep=KEPT, fast_train=functools.partial(online_train, _OREPA))
"""OREPA (Hu et al., CVPR 2022, figure 4) of 3x3 kernels, in up to 4 groups.

It has one norm, behind the sum, so with `train_form="covariance"` training adds up the kernels and
computes one convolution.
"""

_SOBEL_X = ((1.0, 0.0, -1.0), (2.0, 0.0, -2.0), (1.0, 0.0, -1.0))
_SOBEL_Y = ((1.0, 2.0, 1.0), (0.0, 0.0, 0.0), (-1.0, -2.0, -1.0))
_LAPLACIAN = ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0))


def ecb(multiple: int = 2, *, identity: bool = False) -> BlockSpec:
    """ECBSR's edge-oriented block (Zhang et al., ACM MM 2021), which has biases and no norms.

    K3 * x + K3' * K1 x, and Sobel's and Laplace's filters of 1x1 convolutions. The 1x1
    convolutions are padded with their biases, as the authors do. Its activation is a PReLU.

    Args:
      multiple: inner channels of K3' K1 as a multiple of the block's features.
      identity: whether the input is added in blocks of equal input and output shape.
    """

    def inner(name: str, multiple: int = 1) -> Conv:
        return Conv(f"conv1x1_{name}", (1, 1), strided=False, bias=True, multiple=multiple)

    edges = (("sobel_x", _SOBEL_X), ("sobel_y", _SOBEL_Y), ("laplacian", _LAPLACIAN))
    terms: list[Linear] = [
        Conv("conv3x3", (3, 3), bias=True),
        Chain((inner("3x3", multiple), Conv("conv_expanded", (3, 3), bias=True))),
        *(
            Chain((inner(n), Filter(taps), Scale(n, initial=0.0, bias=True, spread=1e-3)))
            for n, taps in edges
        ),
    ]
    if identity:
        terms.append(SameShape(Identity()))
    return BlockSpec("ECB with identity" if identity else "ECB", Sum(tuple(terms)), keep=KEPT)
