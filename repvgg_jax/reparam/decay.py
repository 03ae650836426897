"""Weight decay of blocks: which parameters decay, and decay of the kernel that deploys."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from repvgg_jax.reparam.algebra import EPSILON, Affine, dilated, parallel
from repvgg_jax.reparam.blocks import BUILT_IN, BlockSpec
from repvgg_jax.reparam.containers import (
    Tree,
    children_of,
    is_container,
    rebuild,
    unboxed,
    variables_in,
)
from repvgg_jax.reparam.linear import walk
from repvgg_jax.reparam.terms import Chain, Conv, Norm, Sum
from repvgg_jax.reparam.tree import (
    Path,
    is_merged,
    matching_block,
    path_name,
    with_statistics,
)


def equivalent_l2(
    variables: Tree, *, blocks: Sequence[BlockSpec] = BUILT_IN, epsilon: float = EPSILON
) -> jax.Array:
    """The L2 penalty on the kernels that deploy, instead of the kernels that train.

    The "custom L2" of RepVGGplus (the authors' repository). At every position of the deploy
    kernel the kernels of all branches that have a convolution there add up, each scaled by its
    norm, so the sum is what should be small:

        L = sum over positions of (sum_i K_i t_i)^2 / sum_i t_i^2

    with t = scale / sqrt(var + epsilon) per output channel, a constant to the gradient. Where
    only the 3x3 kernel reaches, this is K3^2. The identity branch is not part of it.

    Add `weight_decay / 2` times it to the loss, and leave those kernels out of ordinary weight
    decay (`decay_mask(params, equivalent_l2=True)`).

    Args:
      variables: `{"params": …, "batch_stats": …}` of a network in training form, in any
        container that `fuse_params` takes. Copies such as `ema_params` do not count.
      blocks: as in `fuse_params`.
      epsilon: of batch normalization.

    Returns:
      A float32 scalar, 0 if there is no block.

    Raises:
      ValueError: a block has no running statistics, or is outside any `params`.
    """
    total, found = jnp.zeros((), jnp.float32), False
    stray: list[Path] = []
    for spec, params, stats in _all_blocks(variables, blocks, (), stray):
        found = True
        if pairs := penalized(spec):
            total += _block_l2(pairs, params, stats, epsilon)
    if stray and not found:
        raise ValueError(
            f"{path_name(stray[0])} is a block outside any 'params': give the whole variables, "
            "{'params': …, 'batch_stats': …}, not the parameters alone"
        )
    return total


def decay_mask(
    params: Tree, *, equivalent_l2: bool = False, blocks: Sequence[BlockSpec] = BUILT_IN
) -> Tree:
    """Which parameters weight decay applies to: kernels, and scales of norms with `decay=True`.

    Biases and all other scales do not decay. In RepVGG, the norm with `decay=True` is that of the
    identity branch, whose scale is part of the deploy-form kernel. This is the authors' mask.

    Args:
      params: a tree of parameters.
      equivalent_l2: leave out the kernels that the function `equivalent_l2` penalizes.
      blocks: as in `fuse_params`.

    Returns:
      A tree of bool of the same structure.
    """

    def mask(node: Tree, key: Any, decays: Mapping[str, bool]) -> Tree:
        if _is_leaf(node):
            return decays.get(str(key), str(key) == "kernel")
        spec = matching_block(node, blocks)
        own: dict[str, dict[str, bool]] = {}
        for term in walk(spec.train) if spec else ():
            if isinstance(term, Norm) and term.decay:
                own[term.name] = {"scale": True}
        if spec and equivalent_l2:
            own |= {conv.name: {"kernel": False} for conv, _ in penalized(spec)}
        return rebuild(
            node,
            {
                k: mask(c, k, decays if _is_leaf(c) else own.get(k, {}))
                for k, c in children_of(node)
            },
        )

    return mask(params, "", {})


def penalized(spec: BlockSpec) -> list[tuple[Conv, Norm]]:
    """The convolutions, each with its norm, whose scaled kernels add up to the deploy kernel."""
    terms = spec.train.terms if isinstance(spec.train, Sum) else (spec.train,)
    return [
        (term.terms[0], term.terms[1])
        for term in terms
        if isinstance(term, Chain)
        and len(term.terms) == 2
        and isinstance(term.terms[0], Conv)
        and isinstance(term.terms[1], Norm)
    ]


def _block_l2(pairs: list[tuple[Conv, Norm]], params: Any, stats: Any, epsilon: float) -> jax.Array:
    """The penalty of one block, or of a stack of blocks."""
    kernels, squares, masks = [], [], []
    for conv, norm in pairs:
        kernel = dilated(params[conv.name]["kernel"], conv.dilation)
        t = params[norm.name]["scale"] / jnp.sqrt(stats[norm.name]["var"] + epsilon)
        t = jax.lax.stop_gradient(t)[..., None, None, None, :]
        kernels.append((kernel, kernel * t))
        taps = jnp.ones(params[conv.name]["kernel"].shape, jnp.float32)
        taps = dilated(taps, conv.dilation)
        squares.append(jnp.square(t) * taps)
        masks.append(taps)

    def total(arrays: Sequence[jax.Array]) -> jax.Array:
        bias = jnp.zeros((arrays[0].shape[-1],))
        return parallel([Affine(array, bias) for array in arrays]).kernel

    alone = total([kernel for kernel, _ in kernels])
    deployed, square, branches = total([k for _, k in kernels]), total(squares), total(masks)
    shared = jnp.square(deployed) / jnp.where(square > 0, square, 1.0)
    return jnp.where(branches == 1, jnp.square(alone), shared).sum()


def _all_blocks(
    tree: Tree, blocks: Sequence[BlockSpec], path: Path, stray: list[Path]
) -> Iterator[tuple[BlockSpec, Any, Any]]:
    """Every training-form block in a tree of variables of any shape; `stray` gets the others."""
    if collections := variables_in(tree):
        yield from _blocks(collections["params"], collections.get("batch_stats"), blocks, path)
    elif spec := matching_block(tree, blocks):
        if is_merged(spec, tree):
            yield from _blocks(tree, None, blocks, path)
        else:
            stray.append(path)
    else:
        for key, child in children_of(tree):
            yield from _all_blocks(child, blocks, (*path, key), stray)


def _blocks(
    params: Any, stats: Any, blocks: Sequence[BlockSpec], path: Path
) -> Iterator[tuple[BlockSpec, Any, Any]]:
    """Every training-form block inside a tree, with its statistics."""
    if spec := matching_block(params, blocks):
        params, stats = (unboxed(part) for part in with_statistics(spec, params, stats))
        if absent := [norm.name for _, norm in penalized(spec) if norm.name not in (stats or {})]:
            raise ValueError(
                f"{path_name(path)} has no running statistics of {', '.join(absent)}; give the "
                "whole variables, {'params': …, 'batch_stats': …}"
            )
        yield spec, params, stats
        return
    below = dict(children_of(stats))
    for key, child in children_of(params):
        yield from _blocks(child, below.get(key), blocks, (*path, key))


def _is_leaf(node: Tree) -> bool:
    return not is_container(node)
