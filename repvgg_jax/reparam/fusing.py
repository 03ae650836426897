"""`fuse_params`: every three-branch block of a tree becomes one convolution."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from repvgg_jax.reparam import algebra, grammar
from repvgg_jax.reparam.grammar import Path, Tree


def fuse_params(variables: Tree, *, epsilon: float = algebra.EPSILON) -> Tree:
    """Turns every three-branch RepVGG block of a tree into its deploy form.

    A block is a mapping with the children `conv3x3`, `bn3x3`, `conv1x1`, `bn1x1` and perhaps
    `bn_identity` and `se`. Wherever the tree holds `{"params": …, "batch_stats": …}`, at its
    top or anywhere inside, the blocks in them become `reparam/{kernel,bias}`, their running
    statistics go, and so do the auxiliary heads of RepVGGplus, which only training uses.
    Everything else is handed on as it is, the very same arrays. A tree that is in deploy form
    already comes back unchanged.

    Pure, and fit for `jax.jit`, `jax.vmap`, `jax.grad` and sharded arrays, which stay sharded.
    NumPy arrays are folded in float64 and rounded once; JAX arrays in at least float32.

    Args:
      variables: a RepVGG's variables, or any nest of mappings, lists and tuples with such
        inside. Leading axes of the leaves (an ensemble, a scan over layers) are kept.
      epsilon: batch normalisation's.

    Returns:
      The same tree in deploy form. `batch_stats` is left out where nothing remains in it.

    Raises:
      ValueError: no RepVGG block anywhere, no statistics, or a block with missing,
        unexpected, misshapen or (where values are known) impossible leaves.
    """
    fusing = _Fusing(epsilon)
    fused = fusing.outside_params(variables, ())
    fusing.check()
    return fused


class _Fusing:
    """One walk over a tree, and what it met."""

    def __init__(self, epsilon: float):
        self.epsilon = epsilon
        self.blocks = 0
        self.stray: Path | None = None
        self.unchecked: list[tuple[str, Any]] = []

    def outside_params(self, node: Tree, path: Path) -> Tree:
        """Finds the variables in a tree of any shape."""
        if isinstance(node, Mapping) and isinstance(node.get("params"), Mapping):
            params, stats = self.inside_params(node["params"], node.get("batch_stats"), path)
            children = {**node, "params": params, "batch_stats": stats}
            if stats is None or _emptied(node["batch_stats"], stats):
                del children["batch_stats"]
            return _rebuild(node, children)
        if grammar.is_train_block(node):
            self.stray = self.stray or path
            return node
        children = {k: self.outside_params(child, (*path, k)) for k, child in _children(node)}
        return _rebuild(node, children)

    def inside_params(self, params: Tree, stats: Tree, path: Path) -> tuple[Tree, Tree]:
        """Fuses the blocks of a parameter tree; returns it and the statistics that remain."""
        if grammar.is_deploy_block(params, path):
            self.blocks += 1
            return params, stats
        if grammar.is_train_block(params):
            self.blocks += 1
            return self.block(params, stats, path), {}

        children = dict(_children(params))
        among_blocks = any(
            grammar.is_train_block(child) or grammar.is_deploy_block(child, (*path, key))
            for key, child in children.items()
        )
        fused, remaining = {}, dict(_children(stats))
        for key, child in children.items():
            before = remaining.pop(key, None)
            if among_blocks and grammar.is_auxiliary_head(key, child):
                continue
            fused[key], after = self.inside_params(child, before, (*path, key))
            if after is not None and not _emptied(before, after):
                remaining[key] = after
        return _rebuild(params, fused), _rebuild(stats, remaining)

    def block(self, params: Mapping[str, Any], stats: Any, path: Path) -> Mapping[str, Any]:
        grammar.check_train_block(params, stats, path)
        chains = grammar.branches(params)
        for *_, norm in chains:
            var, where = stats[norm]["var"], grammar.name((*path, norm))
            if isinstance(var, np.ndarray):
                _check_variance(where, var, _impossible(var))
            elif not isinstance(var, jax.core.Tracer):
                self.unchecked.append((where, var))
        dtype = params["conv3x3"]["kernel"].dtype
        # Kernels stay as they are: multiplying them by a wide factor widens them, and a second
        # wide copy of the largest arrays would cost more time than all the arithmetic.
        norms = {norm: params[norm] for *_, norm in chains}
        wide, wide_stats = algebra.upcast((norms, dict(stats)))
        kernel, bias = algebra.add(
            [
                grammar.branch(chain, {**params, **wide}, wide_stats, self.epsilon)
                for chain in chains
            ]
        )
        kept = {key: child for key, child in params.items() if key in grammar.KEPT}
        return _rebuild(
            params,
            {grammar.FUSED: {"kernel": kernel.astype(dtype), "bias": bias.astype(dtype)}, **kept},
        )

    def check(self) -> None:
        """Raises where there was nothing to fuse or a running variance cannot be one."""
        if not self.blocks and self.stray is not None:
            raise ValueError(
                f"{grammar.name(self.stray)} is a RepVGG block outside any 'params': give the "
                "whole variables, {'params': …, 'batch_stats': …}, not the parameters alone"
            )
        if not self.blocks:
            raise ValueError(
                "there is no RepVGG block in this tree: expected {'params': …, 'batch_stats': …} "
                "with mappings that hold conv3x3, bn3x3, conv1x1 and bn1x1"
            )
        # Fetched together: one transfer for the whole network, not one a block.
        bad = jax.device_get([_impossible(var) for _, var in self.unchecked])
        for (where, var), is_bad in zip(self.unchecked, bad, strict=True):
            _check_variance(where, var, is_bad)


def _check_variance(where: str, var: Any, is_bad: bool) -> None:
    if is_bad:
        raise ValueError(
            f"{where}/var: a running variance is finite and not negative, but here it goes from "
            f"{float(var.min()):g} to {float(var.max()):g}; the statistics are damaged or the "
            "training diverged"
        )


def _impossible(var: Any) -> Any:
    xp = algebra.namespace(var)
    return xp.any(~((var >= 0) & xp.isfinite(var)))


def _emptied(before: Tree, after: Tree) -> bool:
    """Whether nothing is left of what was there."""
    return bool(before) and isinstance(after, (Mapping, list, tuple)) and len(after) == 0


def _children(node: Tree) -> list[tuple[Any, Tree]]:
    if isinstance(node, Mapping):
        return list(node.items())
    return list(enumerate(node)) if isinstance(node, (list, tuple)) else []


def _rebuild(node: Tree, children: dict[Any, Tree]) -> Tree:
    """A container like `node` with these children; `node` itself where nothing changed."""
    old = dict(_children(node))
    if old.keys() == children.keys() and all(old[key] is children[key] for key in old):
        return node
    if isinstance(node, Mapping):
        return type(node)(children)  # type: ignore[call-arg]
    values = [children[key] for key in sorted(children)]
    return type(node)(*values) if hasattr(node, "_fields") else type(node)(values)
