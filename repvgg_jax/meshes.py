"""Meshes with axes of type Explicit, JAX's default, and axes of `jax.shard_map`.

On explicit axes every operation must know how its result is sharded, and many do not: reshapes,
sums over a sharded batch, convolutions with sharded kernels. Inside `on_auto_axes` the compiler
decides, as on axes of type Auto. It decides badly about convolutions in channel groups, which
`grouped_convolution` is for.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax._src import core
from jax.sharding import NamedSharding, PartitionSpec

Convolution = Callable[[jax.Array, jax.Array], jax.Array]


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
    out = jax.tree.map(sharding, jax.eval_shape(function, x_shape, *args_shapes))
    axes = mesh.explicit_axes  # without those of a `jax.shard_map` around
    return jax.sharding.auto_axes(function, axes=axes, out_sharding=out)(x, *args)


def grouped_convolution(
    convolve: Convolution, x: jax.Array, kernel: jax.Array, cpu: Convolution | None = None
) -> jax.Array:
    """`convolve(x, kernel)`; if it is in channel groups, every GPU computes its own images.

    XLA's partitioner, unless it is that for TPUs, splits such convolutions along channels only:
    every device receives the whole batch and computes all of it. Where the images are sharded over
    one of several axes of a mesh, it sums the kernel's gradient over the others, too. Therefore
    `jax.shard_map` splits the images: on GPUs, and on meshes of several axes everywhere. It
    splits them along all axes of type Auto, or along those of type Explicit that they are sharded
    over. Without groups or a mesh, and if the images cannot be split evenly, this is only a call.

    Args:
      convolve: the convolution.
      x: (images, height, width, channels).
      kernel: (height, width, channels / groups, features).
      cpu: what CPUs compute instead.
    """

    def compute(x: jax.Array, kernel: jax.Array, **gpus: Convolution) -> jax.Array:
        by_platform = gpus if cpu is None else {"cpu": cpu, **gpus}
        if not by_platform:
            return convolve(x, kernel)
        return jax.lax.platform_dependent(x, kernel, **by_platform, default=convolve)

    if x.shape[-1] == kernel.shape[-2]:  # no groups
        return compute(x, kernel)
    mesh, axes = _image_axes(x, kernel)
    devices = _devices(mesh, axes)
    if devices == 1 or x.shape[0] % devices:
        return compute(x, kernel)
    one_axis = devices == mesh.size and len(axes) == 1
    split = jax.shard_map(
        convolve if one_axis else compute,
        mesh=mesh,
        in_specs=(PartitionSpec(axes), PartitionSpec()),
        out_specs=PartitionSpec(axes),
        axis_names=set(axes),
    )
    return compute(x, kernel, cuda=split, rocm=split) if one_axis else split(x, kernel)


def on_own_images(
    function: Callable[..., jax.Array],
    images: Sequence[jax.Array],
    weights: Sequence[jax.Array],
    otherwise: Callable[..., jax.Array],
) -> jax.Array:
    """`function(*images, *weights)`, computed by every device for its own images.

    For what the compiler cannot split, such as a kernel written for one device.

    Args:
      function: of feature maps and weights; the result has the images on its first axis, too.
      images: feature maps, each with the images on its first axis.
      weights: the other arguments.
      otherwise: computes the same where `jax.shard_map` cannot split the images: on meshes of
        several axes, and if the devices do not divide the images.
    """
    mesh, axes = _image_axes(images[0], weights[0])
    devices, all_devices = (
        _devices(mesh, names) for names in (axes, (*mesh.auto_axes, *mesh.explicit_axes))
    )
    if all_devices == 1:
        return function(*images, *weights)
    if devices != all_devices or len(axes) > 1 or images[0].shape[0] % devices:
        return otherwise(*images, *weights)
    split = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(*(PartitionSpec(axes) for _ in images), *(PartitionSpec() for _ in weights)),
        out_specs=PartitionSpec(axes),
        axis_names=set(axes),
    )
    return split(*images, *weights)


def _image_axes(x: jax.Array, kernel: jax.Array) -> tuple[Any, tuple[str, ...]]:
    """The mesh around a convolution, and its axes of more than one device to split images over.

    No axes inside a `jax.vmap` over an axis of a mesh: it cannot map what `jax.shard_map` splits.
    """
    sharding = jax.typeof(x).sharding
    mesh, (images, *rest) = sharding.mesh, sharding.spec
    if _mapped_over_a_mesh():
        return mesh, ()
    if not mesh.explicit_axes:
        return mesh, tuple(name for name in mesh.auto_axes if mesh.shape[name] > 1)
    if images is None or any((*rest, *jax.typeof(kernel).sharding.spec)):
        return mesh, ()  # with sharded kernels, pixels or channels, JAX itself decides
    return mesh, images if isinstance(images, tuple) else (images,)


def _mapped_over_a_mesh() -> bool:
    """Whether a `jax.vmap` over an axis of a mesh is around; jax has no public way to ask."""
    try:
        around: Any = core.get_axis_env()
        return bool(around.spmd_axis_names or around.explicit_mesh_axis_names)
    except AttributeError:  # another version of jax
        return False


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
