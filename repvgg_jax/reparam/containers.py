"""Containers that trees of parameters are made of, whatever library made them.

Mappings (dict, defaultdict, FrozenDict, `flax.nnx.State`), lists, tuples, named tuples, and
dataclasses that are PyTrees, such as a TrainState. Leaves may be in boxes, PyTree nodes with one
array, such as `flax.linen.Partitioned` and `flax.nnx.Param`. Nothing here depends on Flax.
"""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

Tree = Any


def children_of(node: Tree) -> list[tuple[Any, Tree]]:
    """Keys and children of a container, in order; none of anything else."""
    if isinstance(node, Mapping):
        return list(node.items())
    if isinstance(node, (list, tuple)):
        return list(zip(getattr(node, "_fields", range(len(node))), node, strict=True))
    if _is_pytree_dataclass(node) and not _is_box(node):
        return [
            (field.name, getattr(node, field.name))
            for field in dataclasses.fields(node)
            if field.metadata.get("pytree_node", True)
        ]
    return []


def is_container(node: Tree) -> bool:
    """Whether a node may have children, as opposed to a leaf."""
    return isinstance(node, (Mapping, list, tuple)) or bool(children_of(node))


def rebuild(node: Tree, children: dict[Any, Tree]) -> Tree:
    """A container like `node` with these children; `node` itself if nothing changed.

    Named tuples and dataclasses keep what is not among `children`.
    """
    old = dict(children_of(node))
    if old.keys() == children.keys() and all(old[key] is children[key] for key in old):
        return node
    if isinstance(node, collections.defaultdict):
        return collections.defaultdict(node.default_factory, children)
    if hasattr(node, "raw_mapping"):  # a State of Flax NNX, which holds plain mappings
        plain = {key: getattr(child, "raw_mapping", child) for key, child in children.items()}
        return type(node)(plain)
    if isinstance(node, Mapping):
        return type(node)(children)  # type: ignore[call-arg]
    if hasattr(node, "_fields"):
        return node._replace(**children)
    if dataclasses.is_dataclass(node):
        return dataclasses.replace(node, **children)  # type: ignore[type-var]
    return type(node)(children[key] for key in sorted(children))


def variables_in(node: Tree) -> dict[str, Tree] | None:
    """The collections of a container that has `params`, by name; None for anything else."""
    children = dict(children_of(node))
    return children if is_container(children.get("params")) else None


def copies_of_params(collections_: Mapping[str, Tree]) -> list[tuple[str, str]]:
    """`params` and what is kept beside it in the same structure, such as `ema_params`.

    Returns:
      Names of the parameters and of the statistics that belong to them: `batch_stats`, unless
      the copy has its own, `ema_batch_stats`.
    """
    found = [("params", "batch_stats")]
    for name, tree in collections_.items():
        prefix = str(name).removesuffix("params")
        if prefix not in ("", name) and prefix.endswith("_") and is_container(tree):
            own = f"{prefix}batch_stats"
            has_own = is_container(collections_.get(own))
            found.append((name, own if has_own else "batch_stats"))
    return found


def unboxed(node: Tree) -> Tree:
    """The same mappings, nested, with arrays instead of boxes."""
    if isinstance(node, Mapping):
        return {key: unboxed(child) for key, child in node.items()}
    return jax.tree.leaves(node)[0] if _is_box(node) else node


def boxed_like(box: Tree, value: Any) -> Any:
    """A box like that one around another array; the array itself if `box` is not one."""
    return jax.tree.unflatten(jax.tree.structure(box), [value]) if _is_box(box) else value


def _is_pytree_dataclass(node: Tree) -> bool:
    """Whether a node is a dataclass that JAX looks into; Linen modules are not."""
    if not dataclasses.is_dataclass(node) or isinstance(node, type):
        return False
    return not jax.tree_util.all_leaves((node,))


def _is_box(node: Tree) -> bool:
    """Whether a node is a PyTree node around one array, known to be a box by its methods."""
    if not (hasattr(node, "unbox") or hasattr(node, "get_metadata")):
        return False
    return len(jax.tree.leaves(node)) == 1
