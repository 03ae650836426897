"""`BlockSpec`, the type that describes a block, and the built-in blocks.

A block of your own is a `BlockSpec`, too: give it to `repvgg_jax.ReparamBlock` and to
`fuse_params(variables, blocks=(spec,))`. `docs/own_block.md` shows one from definition to export.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from repvgg_jax import covariance
from repvgg_jax.reparam.linear import Geometry, kernel_size, names, present, walk
from repvgg_jax.reparam.terms import (
    AvgPool,
    Chain,
    Conv,
    Filter,
    Identity,
    Linear,
    Nonlinearity,
    Norm,
    SameShape,
    Scale,
    Sum,
)
from repvgg_jax.text import first_few


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """A block that trains as an expression and deploys as one convolution with a bias.

    A block with a `Nonlinearity` inside its expression only trains; fusing it is refused.

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
            sizes = term.kernel_size if isinstance(term, (Conv, AvgPool, Filter)) else ()
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

    @functools.cached_property
    def has_own_groups(self) -> bool:
        """Whether convolutions have groups of their own, which may hide those of the block."""
        return any(isinstance(term, Conv) and term.groups is not None for term in walk(self.train))

    @functools.cached_property
    def obstacle(self) -> str | None:
        """Why the block has no deploy form; None if it has one."""
        found = next((term for term in walk(self.train) if isinstance(term, Nonlinearity)), None)
        if found is None:
            return None
        branch = next(
            (
                f"branch {index} of {len(self.train.terms)}"
                for index, term in enumerate(self.train.terms, start=1)
                if found in walk(term)
            )
            if isinstance(self.train, Sum)
            else iter(()),
            "its expression",
        )
        return (
            f"a {found.function} inside {branch} is not linear, so no convolution computes the "
            "same; put activations behind the block"
        )

    def kernel_size(self, geometry: Geometry) -> tuple[int, int]:
        """Height and width of the deploy-form kernel."""
        resolved = present(self.train, geometry.has_same_shape)
        return (1, 1) if resolved is None else kernel_size(resolved)

    def _check_numbers(self, term: Linear) -> None:
        if not isinstance(term, Linear):
            raise ValueError(
                f"block {self.name}: {term!r} is not a term of an expression; what depends on its "
                "input in another way, such as squeeze-and-excite, cannot be folded with what "
                "surrounds it, and is an option of the module behind the block: ReparamBlock(se=…)"
            )
        if isinstance(term, (Conv, AvgPool)):
            size: Any = term.kernel_size
            sides = size if isinstance(size, tuple) else ()
            if len(sides) != 2 or not all(hasattr(side, "__index__") for side in sides):
                raise ValueError(
                    f"block {self.name}: kernel size {size} must be a tuple (height, width)"
                )
        if isinstance(term, Conv):
            for option in ("dilation", "groups", "expansion", "multiple"):
                value = getattr(term, option)
                if value not in (None, "depthwise") and value < 1:
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
        if any(isinstance(term, Nonlinearity) for term in chain.terms):
            return  # it only trains, so it need not be one convolution at the borders
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
            spans = (Conv, AvgPool, Filter)
            if any(isinstance(part, spans) and part.strided for part in walk(term)):
                if strided:
                    raise ValueError(
                        f"block {self.name}: two terms of a chain take the block's stride; set "
                        "strided=False in all but one"
                    )
                strided = True


def conv_norm(suffix: str, size: int | tuple[int, int], **options: Any) -> Chain:
    """A convolution `conv{suffix}`, then a norm `bn{suffix}`."""
    kernel = (size, size) if isinstance(size, int) else size
    initial = options.pop("norm_initial", 1.0)
    return Chain((Conv(f"conv{suffix}", kernel, **options), Norm(f"bn{suffix}", initial=initial)))


KEPT = frozenset({"se", "activation"})  # squeeze-and-excite, an activation with parameters

REPVGG = BlockSpec(
    "RepVGG",
    Sum((conv_norm("3x3", 3), conv_norm("1x1", 1), SameShape(Norm("bn_identity", decay=True)))),
    keep=KEPT,
    fast_train=covariance.train_block,
)
"""RepVGG (Ding et al., CVPR 2021, figure 2): BN(K3 * x) + BN(K1 * x) + BN(x)."""


def acb(size: int = 3, *, initial: float = 1.0) -> BlockSpec:
    """Asymmetric convolution block (ACNet, Ding et al., ICCV 2019): a square kernel and its cross.

    Args:
      size: of the square kernel.
      initial: scale of the norms; 1/3 is the authors' `reduce_gamma`.
    """
    sizes = ((size, size), (1, size), (size, 1))
    return BlockSpec(
        "ACB" if size == 3 else f"ACB {size}x{size}",
        Sum(tuple(conv_norm(f"{h}x{w}", (h, w), norm_initial=initial) for h, w in sizes)),
        keep=KEPT,
    )


ACB = acb()
"""The asymmetric convolution block of 3x3 kernels."""


def dbb(size: int = 3, *, depthwise: bool = False, single_init: bool = False) -> BlockSpec:
    """Diverse branch block (Ding et al., CVPR 2021).

    Borders behind the inner norms are padded with their response to zero by running statistics,
    in training, too, as the authors do. The 1x1 convolution `conv_inner` starts as the identity;
    the authors store it without its identity, so weight decay acts on `conv_inner` minus the
    identity there.

    Args:
      size: of the kernels.
      depthwise: for blocks with one group per channel: without the 1x1 branch and the 1x1
        convolution before the pooling, and with twice the inner channels.
      single_init: the outer norms' scales start as 1 in the branch of a single convolution and as
        0 in the others.
    """
    other = {"norm_initial": 0.0 if single_init else 1.0}
    outer = Norm("bn_avg", initial=other["norm_initial"])
    pool: tuple[Linear, ...] = (AvgPool((size, size)), outer)
    inner = Conv(
        "conv_inner",
        (1, 1),
        strided=False,
        expansion=2 if depthwise else 1,
        initial="torch" if depthwise else "identity",
    )
    chain = Chain((inner, Norm("bn_inner"), *conv_norm("_kxk", size, **other).terms))
    if depthwise:
        terms: tuple[Linear, ...] = (conv_norm("_origin", size), chain, Chain(pool))
    else:
        before = (Conv("conv_pool", (1, 1), strided=False), Norm("bn_pool"))
        terms = (
            conv_norm("_origin", size),
            conv_norm("_1x1", 1, **other),
            chain,
            Chain((*before, *pool)),
        )
    kind = " depthwise" if depthwise else ""
    return BlockSpec(f"DBB{kind}" + (f" {size}x{size}" if size != 3 else ""), Sum(terms), keep=KEPT)


DBB = dbb()
"""Diverse branch block with 3x3 kernels, for blocks that are not depthwise."""


def mobileone(size: int, branches: int = 1) -> BlockSpec:
    """MobileOne's block (Vasu et al., CVPR 2023, figure 3), depthwise or pointwise.

    Args:
      size: of the kernel: 3 for the depthwise block, 1 for the pointwise one.
      branches: convolutions of that size, k in the paper.
    """
    terms: list[Linear] = [conv_norm(f"_{index}", size) for index in range(branches)]
    if size > 1:
        terms.append(conv_norm("_scale", 1))
    return BlockSpec(
        f"MobileOne {size}x{size}",
        Sum((*terms, SameShape(Norm("bn_skip")))),
        keep=KEPT,
    )


QAREPVGG = BlockSpec(
    "QARepVGG",
    Chain((Sum((conv_norm("3x3", 3), Conv("conv1x1", (1, 1)), SameShape(Identity()))), Norm("bn"))),
    keep=KEPT,
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
        Sum((conv_norm("_large", size), conv_norm("_small", small))),
        keep=KEPT,
    )


def conv_bn(size: int, *, initial: float = 1.0) -> BlockSpec:
    """One convolution and its norm: a block of one branch, as in every other network.

    Its fold is the ordinary folding of batch normalization. Segmentation heads and ResNets are
    made of it, so that one call fuses them with their backbone.

    Args:
      size: of the kernel.
      initial: scale of the norm, e.g. 0 for the last convolution beside a residual connection.
    """
    start = "" if initial == 1 else f" from {initial:g}"
    term = conv_norm("_single", size, norm_initial=initial)
    return BlockSpec(f"conv-BN {size}x{size}{start}", term)


CONV_BN = (conv_bn(1), conv_bn(3))
"""The sizes that the networks of this package have."""

BUILT_IN = (REPVGG, ACB, DBB, QAREPVGG, *CONV_BN)
"""What `fuse_params` looks for by default: blocks whose children have unmistakable names."""
