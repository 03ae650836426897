"""Fusing the blocks of any Linen module, which a traced call finds."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn

from repvgg_jax.block import ReparamBlock
from repvgg_jax.reparam import Geometry, fuse_block
from repvgg_jax.reparam.containers import unboxed
from repvgg_jax.reparam.fuse import check_variances
from repvgg_jax.reparam.linear import names
from repvgg_jax.reparam.tree import is_auxiliary_head, path_name


def fuse_model(
    model: nn.Module,
    variables: Mapping[str, Any],
    *args: Any,
    expect: int | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Fuses every `ReparamBlock` of a Linen model, found by walking its modules.

    Needed for blocks whose parameters do not show their structure, such as an identity without
    a norm. Unlike `fuse_params` it knows every block's spec, shapes and epsilon.

    Args:
      model: a module that contains blocks in training form, at any depth.
      variables: `{"params": …, "batch_stats": …}`; leading axes as `nn.scan` and `nn.vmap` make
        them are kept.
      *args: what `model.apply` takes after the variables, e.g. images; only shapes matter.
      expect: how many blocks there must be; None for at least one.
      **kwargs: of `model.apply`, e.g. `method`.

    Returns:
      The variables of the same model with every block in deploy form, without the auxiliary
      heads beside blocks, as in `fuse_params`.

    Raises:
      ValueError: no block, not as many as expected, a block whose leaves do not fit, or (for
        concrete values) a negative variance.
    """
    called = called_blocks(model, variables, *args, **kwargs)
    blocks = {path: found for path, found in called.items() if not found[0].deploy}
    if not blocks or expect not in (None, len(blocks)):
        wanted = "at least one" if expect is None else str(expect)
        raise ValueError(
            f"{type(model).__name__} calls {len(blocks)} blocks in training form, expected {wanted}"
        )
    fused = {name: tree for name, tree in variables.items() if name != "batch_stats"}
    stats = variables.get("batch_stats", {})
    check_variances(
        [
            (path_name((*path, norm)), leaf["var"])
            for path, (block, _) in blocks.items()
            for norm, leaf in unboxed(at_path(stats, path)).items()
            if norm in names(block.spec.train) and "var" in leaf
        ]
    )
    for path, (block, geometry) in blocks.items():
        deployed = fuse_block(
            block.spec,
            at_path(fused["params"], path),
            at_path(stats, path),
            geometry=geometry,
            epsilon=block.epsilon,
            path=path,
        )
        fused["params"] = _replaced(fused["params"], path, deployed)
        stats = _replaced(stats, path, None)
        for depth in range(len(path)):  # beside the block, or beside what the block is in
            head = (*path[:depth], f"aux_{path[depth]}")
            if is_auxiliary_head(at_path(fused["params"], head)):
                fused["params"] = _replaced(fused["params"], head, None)
                stats = _replaced(stats, head, None)
    return {**fused, "batch_stats": stats} if stats else fused


def called_blocks(
    model: nn.Module, variables: Mapping[str, Any], *args: Any, **kwargs: Any
) -> dict[tuple[str, ...], tuple[ReparamBlock, Geometry]]:
    """Every `ReparamBlock` that a traced call finds, by path and in order, with its shapes.

    The arguments are those of `fuse_model`.
    """
    blocks: dict[tuple[str, ...], tuple[ReparamBlock, Geometry]] = {}

    def record(call: Any, call_args: Any, call_kwargs: Any, context: Any) -> Any:
        block = context.module
        if isinstance(block, ReparamBlock) and context.method_name == "__call__":
            x = call_args[0] if call_args else call_kwargs["x"]
            blocks[block.path] = (block, block.geometry(x))
        return call(*call_args, **call_kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(lambda v, *a: model.apply(v, *a, **kwargs), variables, *args)
    return blocks


def at_path(tree: Any, path: Sequence[str]) -> Any:
    """The node at a path; an empty mapping if there is none."""
    for key in path:
        tree = tree.get(key, {})
    return tree


def _replaced(tree: Any, path: Sequence[str], value: Any) -> Any:
    """A tree with another node at a path; None takes it out, and what it leaves empty."""
    if not path:
        return value
    children = dict(tree)
    child = _replaced(children.get(path[0], {}), path[1:], value)
    children.pop(path[0], None) if not child else children.update({path[0]: child})
    return children
