"""Quantization-aware training: branches are trained through the integers that will be deployed.

The forward pass fuses the branches, rounds the fused kernels to integers per output channel, rounds
what goes into every convolution and linear layer to integers per tensor, and runs the deploy form.
Gradients pass through the rounding unchanged and through the fold to the branches, as in RepQ
(BMVC 2023, arXiv 2311.05317). Biases stay floats, as runtimes keep them in 32 bits.

Ranges of activations are observed while training and live in the variables, in `batch_stats` under
the name `quantization`, so that checkpoints and averages hold them like running statistics.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from repvgg_jax.layers import BatchNorm
from repvgg_jax.model import RepVGG
from repvgg_jax.quantization import passes
from repvgg_jax.quantization.fake import fake_quantize, range_scale, weight_scale
from repvgg_jax.quantization.grid import Grid
from repvgg_jax.quantization.network import (
    Plan,
    checked,
    forward,
    layer_of,
    of_output,
    plan,
    with_layers,
)
from repvgg_jax.quantization.quantize import (
    Quantized,
    batches,
    layer_noise,
    measured,
    weight_grids,
)
from repvgg_jax.quantization.settings import TARGETS, TRAINED, Settings

RANGES = "quantization"
"""Name of the ranges in `batch_stats`."""

Tree = Any
Range = Mapping[str, jax.Array]  # low, high
RangeOf = Callable[[str, jax.Array], Range]  # of a tensor's name and its values


@dataclasses.dataclass(frozen=True)
class Simulation:
    """A network in deploy form that computes as its integers would; differentiable.

    Attributes:
      model: in deploy form.
      target: a name in `TARGETS`.
      float_layers: layers that stay in float, by name or pattern.
    """

    model: RepVGG
    target: str = "vnni"
    float_layers: tuple[str, ...] = ()

    @property
    def plan(self) -> Plan:
        """Which tensors are quantized."""
        return plan(self.model, self.float_layers)

    def apply(self, variables: Mapping[str, Any], images: jax.Array) -> jax.Array:
        """Logits of normalized images; `variables` as `model.fuse` gives them, with ranges."""
        ranges = variables["batch_stats"][RANGES]
        return self.run(variables["params"], images, lambda name, _: layer_of(ranges, name))

    def run(self, params: Tree, images: jax.Array, range_of: RangeOf) -> jax.Array:
        """Logits of normalized images, with float parameters of the deploy form."""
        numbers, planned = TARGETS[self.target], self.plan

        def before(name: str, x: jax.Array) -> jax.Array:
            found = range_of(name, x)
            return fake_quantize(x, *range_scale(found["low"], found["high"], numbers))

        def after(name: str, y: jax.Array, _: Any) -> jax.Array:
            return before(of_output(name), y)

        return forward(
            self.model,
            {"params": self.rounded(params)},
            images,
            before=dict.fromkeys(planned.inputs, before),
            after=dict.fromkeys(planned.outputs, after),
        )

    def rounded(self, params: Tree) -> Tree:
        """The parameters with kernels as int8 represents them, per output channel."""
        changed = {}
        for name in self.plan.layers:
            kernel = layer_of(params, name)["kernel"]
            changed[name] = {"kernel": fake_quantize(kernel, weight_scale(kernel))}
        return with_layers(params, changed)

    def quantized(
        self, variables: Mapping[str, Any], images: np.ndarray | None = None
    ) -> Quantized:
        """What is exported: the grids of these ranges.

        Args:
          variables: as for `apply`.
          images: normalized, on which noise and errors are measured; None for not at all.
        """
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), variables["params"])
        ranges = jax.device_get(variables["batch_stats"][RANGES])
        activations = {}
        for name in self.plan.tensors:
            low, high = (float(layer_of(ranges, name)[end]) for end in ("low", "high"))
            activations[name] = Grid.of_range(min(low, 0.0), max(high, 0.0), TARGETS[self.target])
        found = Quantized(
            self.model,
            params,
            self.plan,
            activations,
            weight_grids(params, self.plan, activations),
            Settings(
                target=self.target,
                calibrator=TRAINED,
                float_layers=self.float_layers,
                equalize=False,
                bias_correction=False,
            ),
        )
        if images is None:
            return found
        shown = np.asarray(measured(images), np.float32)
        parts = [passes.plain(self.model, params, part) for part in batches(shown)]
        floats = np.concatenate([np.asarray(part) for part in parts])
        error = np.sqrt(((found(shown) - floats) ** 2).mean() / (floats**2).mean())
        noise = layer_noise(found, shown)
        return dataclasses.replace(found, noise=noise, errors={TRAINED: float(error)})


@dataclasses.dataclass(frozen=True)
class Qat:
    """The forward pass of quantization-aware training; see `repvgg_jax.train.settings`.

    Attributes:
      observed_steps: from this step on ranges stay as they are.
      decay: share of the old ranges that a step keeps, once a few steps were taken.
      running: whether running statistics follow the images, as in ordinary training, by another
        pass without gradient; otherwise they stay.
      target: as in `Simulation`.
      float_layers: as in `Simulation`.
    """

    observed_steps: int
    decay: float = 0.99
    running: bool = False
    target: str = "vnni"
    float_layers: tuple[str, ...] = ()

    def simulation(self, model: Any) -> Simulation:
        """The network whose accuracy counts, of one in training form."""
        return Simulation(checked(model.clone(deploy=True)), self.target, self.float_layers)

    def __call__(
        self, model: Any, variables: Mapping[str, Any], images: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, Tree]:
        """What the integers compute, and `batch_stats` after this step.

        Args:
          model: in training form.
          variables: `params` and `batch_stats` of the training form, with ranges.
          images: normalized.
          step: steps taken before this one.
        """
        params, statistics = variables["params"], dict(variables["batch_stats"])
        old = statistics.pop(RANGES)
        if self.running:
            still = {"params": jax.lax.stop_gradient(params), "batch_stats": statistics}
            _, updated = model.apply(still, images, train=True, mutable=["batch_stats"])
            statistics = updated["batch_stats"]
        statistics = jax.lax.stop_gradient(statistics)
        fused = model.fuse({"params": params, "batch_stats": statistics})
        found: dict[tuple[str, ...], Any] = {}

        def range_of(name: str, x: jax.Array) -> Range:
            new = self._observed(layer_of(old, name), x, step)
            found.update({(*name.split("/"), end): value for end, value in new.items()})
            return new

        logits = self.simulation(model).run(fused["params"], images, range_of)
        return logits, {**statistics, RANGES: unflatten_dict(found)}

    def _observed(self, old: Range, x: jax.Array, step: jax.Array) -> Range:
        """The range after this step; the first step takes that of its images."""
        x = jax.lax.stop_gradient(x)
        keep = jnp.minimum(self.decay, step / (step + 10))
        keep = jnp.where(step < self.observed_steps, keep, 1.0)
        new = {"low": x.min(), "high": x.max()}
        return {end: keep * old[end] + (1 - keep) * new[end] for end in new}

    def unobserved(self, model: Any) -> Tree:
        """Ranges before the first step, all zero.

        Args:
          model: in training form.
        """
        names = self.simulation(model).plan.tensors
        ends = [(*name.split("/"), end) for name in names for end in ("low", "high")]
        return unflatten_dict({path: jnp.zeros((), jnp.float32) for path in ends})


def split_ranges(variables: Mapping[str, Any]) -> tuple[dict[str, Any], Tree | None]:
    """Variables without ranges, and the ranges; None if there are none."""
    statistics = dict(variables.get("batch_stats") or {})
    ranges = statistics.pop(RANGES, None)
    if ranges is None:
        return dict(variables), None
    rest = {name: tree for name, tree in variables.items() if name != "batch_stats"}
    return {**rest, **({"batch_stats": statistics} if statistics else {})}, ranges


def with_ranges(variables: Mapping[str, Any], ranges: Tree) -> dict[str, Any]:
    """The inverse of `split_ranges`."""
    return {**variables, "batch_stats": {**variables.get("batch_stats", {}), RANGES: ranges}}


def measure_norms(model: Any, variables: Mapping[str, Any], images: jax.Array) -> dict[str, Any]:
    """Gives every norm the statistics of what goes into it, and scale and bias to match.

    The function stays the same. This inserts batch normalization into a network of which only the
    deploy form is left: unfused (`unfuse_params`), its norms have made-up statistics, which
    training with running statistics would lose. For a block of one convolution it is what RepVGG's
    authors do before quantization-aware training: scale = sqrt(var), bias = mean + bias.

    Args:
      model: in training form.
      variables: of the training form.
      images: normalized, as many as give reliable statistics.
    """
    seen: dict[tuple[str, ...], tuple[jax.Array, jax.Array, float]] = {}

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, BatchNorm) and context.method_name == "__call__":
            x = args[0].astype(jnp.float32)
            count = x.size // x.shape[-1]
            unbiased = x.var(axis=(0, 1, 2)) * count / max(count - 1, 1)
            epsilon = context.module.epsilon
            seen[context.module.path] = x.mean(axis=(0, 1, 2)), unbiased, epsilon
        return call(*args, **kwargs)

    def run(variables: Any, images: jax.Array) -> dict[str, Any]:
        with nn.intercept_methods(intercept):
            model.clone(remat=False).apply(variables, images)
        params, statistics = (flatten_dict(variables[n]) for n in ("params", "batch_stats"))
        for path, (mean, var, epsilon) in seen.items():
            old_mean, old_var = (statistics[*path, name] for name in ("mean", "var"))
            scale, bias = (params[*path, name] for name in ("scale", "bias"))
            factor = scale / jnp.sqrt(old_var + epsilon)
            params[*path, "scale"] = factor * jnp.sqrt(var + epsilon)
            params[*path, "bias"] = bias + factor * (mean - old_mean)
            statistics[*path, "mean"], statistics[*path, "var"] = mean, var
        return {"params": unflatten_dict(params), "batch_stats": unflatten_dict(statistics)}

    return jax.jit(run)(variables, images)
