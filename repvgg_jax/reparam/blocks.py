"""The blocks that this package knows, each one value.

A block of your own is a `BlockSpec`, too: give it to `repvgg_jax.ReparamBlock` and to
`fuse_params(variables, blocks=(spec,))`. `docs/reparameterization.md` shows one in twenty lines.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from repvgg_jax import covariance
from repvgg_jax.reparam.linear import (
    AvgPool,
    Chain,
    Conv,
    Geometry,
    Identity,
    Linear,
    Norm,
    SameShape,
    Scale,
    Sum,
    kernel_size,
    names,
    present,
    walk,
)
from repvgg_jax.text import first_few


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """A block that trains as an expression and deploys as one convolution with a bias.

    Attributes:
      name: what messages call it.
      train: what it computes before its activation.
      deploy: name of the convolution that replaces the expression.
      keep: children that both forms have, such as squeeze-and-excite.
      fast_train: the expression in training, its activation included, computed in another way
        that is faster; see `repvgg_jax.covariance.train_block` for arguments and result. None
        if there is none.

    Raises:
      ValueError: the expression is not one convolution, and why.
    """

    name: str
    train: Linear
    deploy: str = "reparam"
    keep: frozenset[str] = frozenset()
    fast_train: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.keep, str):
            raise ValueError(f"block {self.name}: keep={self.keep!r} must be a set of names")
        object.__setattr__(self, "keep", frozenset(self.keep))
        for term in walk(self.train):
            self._check_numbers(term)
        self._check_names()
        for term in walk(self.train):
            sizes = term.kernel_size if isinstance(term, (Conv, AvgPool)) else ()
            if any(size < 1 or size % 2 == 0 for size in sizes):
                raise ValueError(
                    f"block {self.name}: kernel size {sizes} must be odd in both axes; "
                    "an even kernel has no center"
                )
            if isinstance(term, Chain):
                self._check_chain(term)

    @functools.cached_property
    def required(self) -> frozenset[str]:
        """Children that every training-form block has."""
        return names(self.train, optional=False)

    @functools.cached_property
    def optional(self) -> frozenset[str]:
        """Children that only blocks of equal input and output shape have."""
        return names(self.train, optional=True) - self.required

    @functools.cached_property
    def traceless(self) -> bool:
        """Whether a tree of parameters does not show which terms of the block exist.

        An identity without a norm has no parameter, so a block with one looks like a block
        without it. `fuse_model` asks the model instead.
        """
        return any(
            isinstance(term, SameShape) and not names(term.term) for term in walk(self.train)
        )

    def kernel_size(self, geometry: Geometry) -> tuple[int, int]:
        """Height and width of the deploy-form kernel."""
        resolved = present(self.train, geometry.has_same_shape)
        return (1, 1) if resolved is None else kernel_size(resolved)

    def _check_numbers(self, term: Linear) -> None:
        if not isinstance(term, Linear):
            raise ValueError(f"block {self.name}: {term!r} is not a term of an expression")
        if isinstance(term, (Conv, AvgPool)):
            size: Any = term.kernel_size
            sides = size if isinstance(size, tuple) else ()
            if len(sides) != 2 or not all(hasattr(side, "__index__") for side in sides):
                raise ValueError(
                    f"block {self.name}: kernel size {size} must be a tuple (height, width)"
                )
        if isinstance(term, Conv):
            for option in ("dilation", "groups", "expansion"):
                value = getattr(term, option)
                if value is not None and value < 1:
                    raise ValueError(
                        f"block {self.name}: {term.name} has {option}={value}, must be 1 or more"
                    )

    def _check_names(self) -> None:
        every = [
            term.name
            for term in walk(self.train)
            if isinstance(term, (Conv, Norm, Scale)) and term.name is not None
        ]
        if not every:
            raise ValueError(f"block {self.name}: no term has parameters")
        every += [*self.keep]
        twice = sorted({name for name in every if every.count(name) > 1})
        if twice or {self.deploy} & {*every}:
            raise ValueError(
                f"block {self.name}: every child needs a name of its own, but "
                f"{first_few(twice or [self.deploy])} occurs more than once"
            )

    def _check_chain(self, chain: Chain) -> None:
        strided = False
        sizes = [kernel_size(term) for term in chain.terms]
        if any(sum(size > 1 for size in axis) > 1 for axis in zip(*sizes, strict=True)):
            raise ValueError(
                f"block {self.name}: two terms of a chain see neighboring pixels along the same "
                "axis; the second one would need values outside the image at its borders, so the "
                "chain is not one convolution"
            )
        for term in chain.terms:
            spatial = max(kernel_size(term)) > 1
            if spatial and strided:
                raise ValueError(
                    f"block {self.name}: {term} sees neighboring pixels behind the block's "
                    "stride; set strided=False in the terms before the last spatial one"
                )
            if any(isinstance(part, (Conv, AvgPool)) and part.strided for part in walk(term)):
                if strided:
                    raise ValueError(
                        f"block {self.name}: two terms of a chain take the block's stride; set "
                        "strided=False in all but one"
                    )
                strided = True


def _conv_norm(suffix: str, size: int | tuple[int, int], **options: Any) -> Chain:
    """A convolution `conv{suffix}`, then a norm `bn{suffix}`."""
    kernel = (size, size) if isinstance(size, int) else size
    return Chain((Conv(f"conv{suffix}", kernel, **options), Norm(f"bn{suffix}")))


_KEPT = frozenset({"se", "activation"})  # squeeze-and-excite, an activation with parameters

REPVGG = BlockSpec(
    "RepVGG",
    Sum((_conv_norm("3x3", 3), _conv_norm("1x1", 1), SameShape(Norm("bn_identity", decay=True)))),
    keep=_KEPT,
    fast_train=covariance.train_block,
)
"""RepVGG (Ding et al., CVPR 2021, figure 2): BN(K3 * x) + BN(K1 * x) + BN(x)."""

ACB = BlockSpec(
    "ACB",
    Sum((_conv_norm("3x3", 3), _conv_norm("1x3", (1, 3)), _conv_norm("3x1", (3, 1)))),
    keep=_KEPT,
)
"""Asymmetric convolution block (ACNet, Ding et al., ICCV 2019): a square kernel and its cross."""

DBB = BlockSpec(
    "DBB",
    Sum(
        (
            _conv_norm("_origin", 3),
            _conv_norm("_1x1", 1),
            Chain(
                (
                    Conv("conv_inner", (1, 1), strided=False, expansion=1),
                    Norm("bn_inner"),
                    *_conv_norm("_kxk", 3).terms,
                )
            ),
            Chain(
                (
                    Conv("conv_pool", (1, 1), strided=False),
                    Norm("bn_pool"),
                    AvgPool((3, 3)),
                    Norm("bn_avg"),
                )
            ),
        )
    ),
    keep=_KEPT,
)
"""Diverse branch block (Ding et al., CVPR 2021) with fewer groups than channels.

Borders behind the inner norms are padded with their response to zero, as the authors do.
"""


def mobileone(size: int, branches: int = 1) -> BlockSpec:
    """MobileOne's block (Vasu et al., CVPR 2023, figure 3), depthwise or pointwise.

    Args:
      size: of the kernel: 3 for the depthwise block, 1 for the pointwise one.
      branches: convolutions of that size, k in the paper.
    """
    terms: list[Linear] = [_conv_norm(f"_{index}", size) for index in range(branches)]
    if size > 1:
        terms.append(_conv_norm("_scale", 1))
    return BlockSpec(
        f"MobileOne {size}x{size}",
        Sum((*terms, SameShape(Norm("bn_skip")))),
        keep=_KEPT,
    )


QAREPVGG = BlockSpec(
    "QARepVGG",
    Chain(
        (Sum((_conv_norm("3x3", 3), Conv("conv1x1", (1, 1)), SameShape(Identity()))), Norm("bn"))
    ),
    keep=_KEPT,
)
"""QARepVGG (Chu et al., AAAI 2024): BN(BN(K3 * x) + K1 * x + x), made for quantization."""


def large_kernel(size: int, small: int) -> BlockSpec:
    """RepLKNet's large kernel with a small one beside it (Ding et al., CVPR 2022).

    Args:
      size: of the large kernel, e.g. 31.
      small: of the small kernel, e.g. 5.
    """
    return BlockSpec(
        f"large kernel {size}+{small}",
        Sum((_conv_norm("_large", size), _conv_norm("_small", small))),
        keep=_KEPT,
    )


def conv_bn(size: int) -> BlockSpec:
    """One convolution and its norm: a block of one branch, as in every other network.

    Its fold is the ordinary folding of batch normalization. Segmentation heads and ResNets are
    made of it, so that one call fuses them with their backbone.

    Args:
      size: of the kernel.
    """
    return BlockSpec(f"conv-BN {size}x{size}", _conv_norm("_single", size))


CONV_BN = (conv_bn(1), conv_bn(3))
"""The sizes that the networks of this package have."""

BUILT_IN = (REPVGG, ACB, DBB, QAREPVGG, *CONV_BN)
"""What `fuse_params` looks for by default: blocks whose children have unmistakable names."""
