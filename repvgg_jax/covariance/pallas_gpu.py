"""A kernel for NVIDIA GPUs: the input's gradient by one pass over memory, in Pallas (Triton).

XLA for GPUs writes both 1x1 products of the backward pass to memory and reads them again for their
sum. This kernel keeps them in registers. It was compiled for GPUs and its traffic counted
(`docs/covariance.md`), but never timed, so it is an option: `train_form="covariance_pallas"`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from repvgg_jax.batch_stats import per_image
from repvgg_jax.covariance.ops import BlockSettings, wide_type
from repvgg_jax.meshes import on_own_images

_ROWS, _COLUMNS, _INNER = 128, 128, 32  # of a tile; the last is how much is multiplied at once
_MOST_VALUES = 2**31  # of an array: the kernel counts them in 32 bits


def serves(settings: BlockSettings, x: jax.Array, y: jax.Array) -> bool:
    """Whether the kernel is for such a block, with input `x` and output `y`."""
    return (
        settings.pallas
        and settings.on_gpu
        and settings.stride == settings.groups == settings.image_groups == 1
        and jnp.finfo(x.dtype).bits == 16  # Triton multiplies float32 in fewer bits
        and max(x.size, y.size) < _MOST_VALUES
    )


def input_gradient(
    base: jax.Array,
    dz: jax.Array,
    x: jax.Array,
    to_dz: jax.Array,
    to_x: jax.Array,
    level: jax.Array,
) -> jax.Array:
    """`base + dz to_dz + x to_x + level`, in one pass over memory on NVIDIA GPUs.

    By XLA on other platforms, where the images of a sharded batch cannot be split evenly, and
    under `jax.vmap`.

    Args:
      base: (images, height, width, channels).
      dz: (images, height, width, features), in the same dtype.
      x: (images, height, width, channels), in the same dtype.
      to_dz: (features, channels).
      to_x: (channels, channels).
      level: (channels,), in any dtype.

    Returns:
      An array like `base`. It can be differentiated in reverse mode.
    """
    matrices = to_dz.astype(base.dtype), to_x.astype(base.dtype), level

    def on_nvidia(*args: jax.Array) -> jax.Array:
        return on_own_images(_differentiable, args[:3], args[3:], otherwise=_by_xla)

    return lax.platform_dependent(base, dz, x, *matrices, cuda=on_nvidia, default=_by_xla)


def _by_xla(
    base: jax.Array,
    dz: jax.Array,
    x: jax.Array,
    to_dz: jax.Array,
    to_x: jax.Array,
    level: jax.Array,
) -> jax.Array:
    sum_of_two = dz @ to_dz + x @ to_x + per_image(x, level[None])
    return (base + sum_of_two).astype(base.dtype)


def one_pass(
    base: jax.Array,
    dz: jax.Array,
    x: jax.Array,
    to_dz: jax.Array,
    to_x: jax.Array,
    level: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """What `_by_xla` computes, by the kernel; `interpret` computes it step by step anywhere."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    rows = [a.reshape(-1, a.shape[-1]) for a in (base, dz, x)]
    columns = min(_COLUMNS, max(16, pl.next_power_of_2(base.shape[-1])))
    tiles = pl.cdiv(rows[0].shape[0], _ROWS) * pl.cdiv(base.shape[-1], columns)

    def whole(array: Any) -> Any:  # the kernel takes its tile itself
        return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)

    args = (*rows, to_dz, to_x, level)
    out = pl.pallas_call(
        functools.partial(_tile, columns),
        grid=(tiles,),
        in_specs=[whole(array) for array in args],
        out_specs=whole(rows[0]),
        out_shape=jax.eval_shape(lambda: rows[0]),  # varies over the axes of a mesh that it does
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=3),
        interpret=interpret,
        name="input_gradient",
    )(*args)
    return out.reshape(base.shape)


def _tile(
    columns: int, base: Any, dz: Any, x: Any, to_dz: Any, to_x: Any, level: Any, out: Any
) -> None:
    """One tile of the result. Sizes that a tile does not divide are masked."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    channels = base.shape[-1]
    # Tiles of the same rows follow each other, so that these rows are still in the cache.
    across = pl.cdiv(channels, columns)
    row = (pl.program_id(0) // across * _ROWS + jnp.arange(_ROWS))[:, None]
    column = (pl.program_id(0) % across * columns + jnp.arange(columns))[None, :]
    here, inside = row < base.shape[0], column < channels

    def add_product(left: Any, right: Any, total: jax.Array) -> jax.Array:
        inner = right.shape[0]

        def step(i: jax.Array, total: jax.Array) -> jax.Array:
            at = i * _INNER + jnp.arange(_INNER)
            of_left, of_right = at[None, :], at[:, None]
            a = triton.load(left.at[row, of_left], mask=here & (of_left < inner), other=0)
            b = triton.load(right.at[of_right, column], mask=inside & (of_right < inner), other=0)
            return total + triton.dot(a, b).astype(total.dtype)

        return lax.fori_loop(0, pl.cdiv(inner, _INNER), step, total)

    total = triton.load(base.at[row, column], mask=here & inside, other=0)
    total = total.astype(wide_type(out.dtype))
    total += triton.load(level.at[column], mask=inside, other=0).astype(total.dtype)
    total = add_product(x, to_x, add_product(dz, to_dz, total))
    triton.store(out.at[row, column], total.astype(out.dtype), mask=here & inside)


@jax.custom_batching.custom_vmap
def _mappable(*args: jax.Array) -> jax.Array:
    return one_pass(*args)


@_mappable.def_vmap
def _mapped(size: int, batched: list[bool], *args: jax.Array) -> tuple[jax.Array, bool]:
    axes = [0 if each else None for each in batched]
    return jax.vmap(_by_xla, axes, axis_size=size)(*args), True


@jax.custom_vjp
def _differentiable(*args: jax.Array) -> jax.Array:
    return _mappable(*args)


def _forward(*args: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _mappable(*args), args


def _backward(args: tuple[jax.Array, ...], dout: jax.Array) -> tuple[jax.Array, ...]:
    return jax.vjp(_by_xla, *args)[1](dout)


_differentiable.defvjp(_forward, _backward)
