"""Meshes with axes of type Explicit, JAX's default, and axes of `jax.shard_map`.

On explicit axes every operation must know how its result is sharded, and many do not: reshapes,
sums over a sharded batch, convolutions with sharded kernels. Inside `on_auto_axes` the compiler
decides, as on axes of type Auto.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec


def explicit_mesh(tree: Any) -> Any | None:
    """The mesh that JAX arrays in a tree are sharded over explicitly; None if there is none."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            mesh = jax.typeof(leaf).sharding.mesh
            if mesh.explicit_axes:
                return mesh
    return None


def on_auto_axes(function: Callable[..., Any], x: jax.Array, *args: Any) -> Any:
    """`function(x, *args)`, where all axes of the mesh are of type Auto inside.

    Results of the rank of `x`, which are feature maps, are sharded as `x` is, along every axis
    whose size allows it. All others are replicated. Without explicit axes this is only a call.
    """
    mesh = explicit_mesh((x, args))
    if mesh is None:
        return function(x, *args)
    spec = jax.typeof(x).sharding.spec

    def sharding(out: jax.ShapeDtypeStruct) -> NamedSharding:
        axes = [
            axis if axis is not None and size % _devices(mesh, axis) == 0 else None
            for size, axis in zip(out.shape, spec, strict=False)
        ]
        return NamedSharding(mesh, PartitionSpec(*axes if out.ndim == x.ndim else ()))

    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (x, args))
    x_shape, args_shapes = shapes
    out = jax.eval_shape(function, x_shape, *args_shapes)
    return jax.sharding.auto_axes(function, out_sharding=jax.tree.map(sharding, out))(x, *args)


def varying_alike(tree: Any) -> Any:
    """The same arrays, all varying over the same axes of the `jax.shard_map` around.

    Needed by rules of differentiation written by hand, whose cotangents vary over all of them;
    the sum over devices that replicated parameters need is the transpose of this.
    """
    union = frozenset().union(*map(_varying, jax.tree.leaves(tree)))

    def aligned(leaf: jax.Array) -> jax.Array:
        missing = tuple(sorted(union - _varying(leaf)))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(aligned, tree)


def _varying(leaf: Any) -> frozenset[str]:
    """Axes of the `jax.shard_map` around, over which an array may differ."""
    kind: Any = jax.typeof(leaf)
    return kind.vma if hasattr(kind, "vma") else kind.mat.varying  # the latter since JAX 0.10.2


def _devices(mesh: Any, axis: Any) -> int:
    size = 1
    for name in axis if isinstance(axis, tuple) else (axis,):
        size *= mesh.shape[name]
    return size
