"""Every branch of a block as a kernel, and its share of the fused one."""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from repvgg_jax.fuse_module import at_path, called_blocks
from repvgg_jax.reparam import (
    EPSILON,
    Affine,
    AvgPool,
    BlockSpec,
    Chain,
    Conv,
    Filter,
    Geometry,
    Linear,
    Sum,
    affine,
    parallel,
)
from repvgg_jax.reparam.linear import names, present, walk

SIDE = 6
"""Rows and columns of the kernels of a block that are kept to be drawn."""


@dataclasses.dataclass(frozen=True)
class BlockKernels:
    """The fused kernel of a block, summarized.

    Attributes:
      name: the block's path in the parameter tree, e.g. `stage1_block0`.
      stage: the part of the network that it belongs to, e.g. `stage1`.
      norm: the fused kernel's L2 norm.
      shares: by kind of branch, e.g. `3x3`, its share of that norm: with branch kernels K_i that
        add up to K, the sum of <K_i, K> / <K, K>. Shares add up to 1. One is negative if the branch
        cancels what others compute. Empty for a block in deploy form.
      taps: (height, width), the share of the squared norm at every position of the kernel.
      shown: (count, height, width), the kernels of its first channels: six output channels, each
        with six input channels, or if there are fewer of these, more output channels.
    """

    name: str
    stage: str
    norm: float
    shares: dict[str, float]
    taps: np.ndarray
    shown: np.ndarray


def branch_kernels(
    spec: BlockSpec,
    geometry: Geometry,
    params: Mapping[str, Any],
    stats: Mapping[str, Any],
    *,
    epsilon: float = EPSILON,
) -> dict[str, np.ndarray]:
    """The kernel of every branch of a block, batch normalization folded into it.

    Branches are the terms of the sum in the block's expression; what is behind the sum is part of
    each. They are called by what they do, e.g. `3x3`, `1x1` and `identity`; several that do the
    same also by a child of their own, e.g. `3x3 (conv_0)`, or by number if they have none.

    Args:
      spec: of the block.
      geometry: its shapes.
      params: its parameters by child name, in training form.
      stats: its running statistics by child name.
      epsilon: of batch normalization.

    Returns:
      float64 kernels (height, width, in_channels / groups, out_channels), all padded to the size
      of the largest one, which add up to the fused kernel.

    Raises:
      ValueError: the block has no deploy form, or stacks several blocks.
    """
    if spec.obstacle:
        raise ValueError(f"block {spec.name} has no deploy form: {spec.obstacle}")
    params, stats = jax.tree.map(np.asarray, (dict(params), dict(stats)))
    resolved = present(spec.train, geometry.has_same_shape)
    assert resolved is not None, "a block has terms"
    terms = list(_summands(resolved))
    called = [_called(term) for term in terms]
    maps = [affine(term, geometry, params, stats, epsilon=epsilon) for term in terms]
    shape = tuple(max(m.kernel.shape[axis] for m in maps) for axis in range(2))
    if any(m.kernel.ndim != 4 for m in maps):
        raise ValueError(f"block {spec.name} is a stack of blocks; give one of them")
    frame = Affine(np.zeros((*shape, *maps[0].kernel.shape[2:])), np.zeros_like(maps[0].bias))
    children = [names(term) for term in terms]
    kernels = {}
    for place, (name, one) in enumerate(zip(called, maps, strict=True)):
        others = frozenset().union(*children[:place], *children[place + 1 :])
        own = max(children[place] - others, default=str(called[:place].count(name) + 1))
        unique = name if called.count(name) == 1 else f"{name} ({own})"
        kernels[unique] = parallel([one, frame]).kernel
    return kernels


def inspect_blocks(
    model: nn.Module, variables: Mapping[str, Any], images: Any
) -> list[BlockKernels]:
    """Summarizes every block of a Linen model, in the order in which they are called.

    Args:
      model: with blocks in either form, at any depth.
      variables: of the model.
      images: what it takes; only shape and dtype matter, e.g. a `jax.ShapeDtypeStruct`.

    Raises:
      ValueError: the model calls no block, or one of them has no deploy form.
    """
    found = called_blocks(model, variables, images)
    if not found:
        raise ValueError(f"{type(model).__name__} calls no block")
    summaries = []
    for path, (block, geometry) in found.items():
        params = at_path(variables["params"], path)
        if block.deploy:
            kernel = np.asarray(params[block.spec.deploy]["kernel"], np.float64)
            branches = {}
        else:
            stats = at_path(variables.get("batch_stats", {}), path)
            branches = branch_kernels(block.spec, geometry, params, stats, epsilon=block.epsilon)
            kernel = sum(branches.values(), np.zeros(()))
        summaries.append(_summary(path, kernel, branches))
    return summaries


def stage_shares(blocks: Sequence[BlockKernels]) -> dict[str, dict[str, float]]:
    """The branches' shares by stage: means over its blocks, 0 where a block lacks the branch."""
    stages = collections.defaultdict(list)
    for block in blocks:
        stages[block.stage].append(block)
    return {
        stage: {
            branch: float(np.mean([block.shares.get(branch, 0.0) for block in members]))
            for branch in dict.fromkeys(name for block in members for name in block.shares)
        }
        for stage, members in stages.items()
    }


def _summands(term: Linear) -> Iterator[Linear]:
    """Terms whose kernels add up to that of an expression without `SameShape`."""
    if isinstance(term, Sum):
        for child in term.terms:
            yield from _summands(child)
        return
    if isinstance(term, Chain):
        for place, child in enumerate(term.terms):
            if isinstance(child, Sum):
                before, behind = term.terms[:place], term.terms[place + 1 :]
                for one in child.terms:
                    yield from _summands(Chain((*before, one, *behind)))
                return
    yield term


def _called(term: Linear) -> str:
    """What a branch does, in a word: the sizes of its kernels."""
    found = []
    for part in walk(term):
        if isinstance(part, (Conv, AvgPool, Filter)):
            height, width = part.kernel_size
            kind = {AvgPool: "average ", Filter: "filter "}.get(type(part), "")
            found.append(f"{kind}{height}x{width}")
    return ", ".join(found) or "identity"


def _summary(
    path: Sequence[str], kernel: np.ndarray, branches: Mapping[str, np.ndarray]
) -> BlockKernels:
    square = float(np.vdot(kernel, kernel))
    shares: dict[str, float] = collections.defaultdict(float)
    for name, one in branches.items():
        shares[name.partition(" (")[0]] += float(np.vdot(one, kernel)) / (square or 1.0)
    by_channels = kernel.transpose(3, 2, 0, 1)[:, :SIDE].reshape(-1, *kernel.shape[:2])
    return BlockKernels(
        name="/".join(path),
        stage="/".join((*path[:-1], path[-1].partition("_block")[0])) if path else "block",
        norm=square**0.5,
        shares=dict(shares),
        taps=np.square(kernel).sum(axis=(2, 3)) / (square or 1.0),
        shown=by_channels[: SIDE**2].copy(),
    )
