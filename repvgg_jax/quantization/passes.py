"""Forward passes that measure or round the tensors of a network, each compiled once per network."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from repvgg_jax.quantization.calibrators import BINS
from repvgg_jax.quantization.grid import Grid
from repvgg_jax.quantization.network import (
    HEAD,
    After,
    Before,
    Model,
    Plan,
    forward,
    layer_of,
    layers_of,
    of_output,
)


def _compiled(function: Any, static: int) -> Any:
    """Compiled per network and plan, the first arguments; in full float32 precision."""
    compiled = jax.jit(function, static_argnums=tuple(range(static)))

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return compiled(*args)

    return run


_of_network = functools.partial(_compiled, static=1)
_of_plan = functools.partial(_compiled, static=2)


@_of_network
def plain(model: Model, params: Any, images: jax.Array) -> jax.Array:
    """Logits in float."""
    return forward(model, {"params": params}, images)


def _rounding(planned: Plan, grids: dict[str, Grid]) -> tuple[dict[str, Before], dict[str, After]]:
    """Hooks that round the inputs and outputs that are quantized."""

    def before(name: str, x: jax.Array) -> jax.Array:
        return grids[name](x)

    def after(name: str, y: jax.Array, _: Any) -> jax.Array:
        return grids[of_output(name)](y)

    return dict.fromkeys(planned.inputs, before), dict.fromkeys(planned.outputs, after)


@_of_plan
def rounded(
    model: Model, planned: Plan, grids: dict[str, Grid], variables: Any, images: jax.Array
) -> jax.Array:
    """Logits with activations on their grids."""
    before, after = _rounding(planned, grids)
    return forward(model, variables, images, before=before, after=after)


@_of_plan
def extremes(model: Model, planned: Plan, params: Any, images: jax.Array) -> Any:
    """Least and largest value, 0 included, and sum by tensor; largest |output| by block."""
    blocks = [layer.name for layer in layers_of(model) if layer.name != HEAD]
    seen: dict[str, Any] = {}
    channels: dict[str, Any] = {}

    def see(name: str, x: jax.Array) -> jax.Array:
        seen[name] = jnp.minimum(x.min(), 0), jnp.maximum(x.max(), 0), x.sum()
        return x

    def see_output(name: str, y: jax.Array, _: Any) -> jax.Array:
        if name in blocks:
            channels[name] = jnp.abs(y).max(axis=(0, 1, 2))
        return see(of_output(name), y) if name in planned.outputs else y

    before = dict.fromkeys(planned.inputs, see)
    after = dict.fromkeys((*planned.outputs, *blocks), see_output)
    forward(model, {"params": params}, images, before=before, after=after)
    return seen, channels


@_of_plan
def counts(
    model: Model, planned: Plan, ranges: dict[str, Any], params: Any, images: jax.Array
) -> dict[str, jax.Array]:
    """For each tensor, the number of values per bin of its range, then the number of zeros."""
    found: dict[str, Any] = {}

    def count(name: str, x: jax.Array) -> jax.Array:
        low, high = ranges[name]
        place = ((x - low) * (BINS / (high - low))).astype(jnp.int32)
        place = jnp.where(x == 0, BINS, jnp.clip(place, 0, BINS - 1))
        found[name] = jnp.bincount(place.reshape(-1), length=BINS + 1)
        return x

    def count_output(name: str, y: jax.Array, _: Any) -> jax.Array:
        return count(of_output(name), y)

    before = dict.fromkeys(planned.inputs, count)
    after = dict.fromkeys(planned.outputs, count_output)
    forward(model, {"params": params}, images, before=before, after=after)
    return found


def _mean(y: jax.Array) -> jax.Array:
    return y.mean(axis=tuple(range(y.ndim - 1)))


@_of_plan
def means(model: Model, planned: Plan, params: Any, images: jax.Array) -> dict[str, jax.Array]:
    """The mean of each output channel of every layer."""
    found: dict[str, Any] = {}

    def keep(name: str, y: jax.Array, _: Any) -> jax.Array:
        found[name] = _mean(y)
        return y

    forward(model, {"params": params}, images, after=dict.fromkeys(planned.layers, keep))
    return found


@_of_plan
def shifts(
    model: Model,
    planned: Plan,
    grids: dict[str, Grid],
    variables: Any,
    wanted: dict[str, jax.Array],
    images: jax.Array,
) -> dict[str, jax.Array]:
    """What each layer's outputs lack of these means, with all layers before it shifted."""
    found: dict[str, Any] = {}
    before, after = _rounding(planned, grids)

    def shift(name: str, y: jax.Array, module: Any) -> jax.Array:
        found[name] = wanted[name] - _mean(y)
        y += found[name].reshape((1,) * (y.ndim - 1) + (-1,))
        return after[name](name, y, module) if name in after else y

    hooks = {**after, **dict.fromkeys(planned.layers, shift)}
    forward(model, variables, images, before=before, after=hooks)
    return found


@_of_plan
def changes(
    model: Model,
    planned: Plan,
    grids: dict[str, Grid],
    params: Any,
    variables: Any,
    images: jax.Array,
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """What rounding a layer alone does: mean squared change of its outputs, and their variance."""
    inputs: dict[str, Any] = {}
    found: dict[str, Any] = {}

    def keep(name: str, x: jax.Array) -> jax.Array:
        inputs[name] = grids[name](x)
        return x

    def compare(name: str, y: jax.Array, module: Any) -> jax.Array:
        alone = module.clone(parent=None, name=None)
        again = alone.apply({"params": layer_of(variables["params"], name)}, inputs[name])
        axes = tuple(range(y.ndim - 1))
        found[name] = ((again - y) ** 2).mean(axis=axes).sum(), y.var(axis=axes).sum()
        return y

    before = dict.fromkeys(planned.layers, keep)
    forward(
        model,
        {"params": params},
        images,
        before=before,
        after=dict.fromkeys(planned.layers, compare),
    )
    return found
