"""Cross-layer equalization: the same function with channels of more equal ranges.

A ReLU commutes with positive factors, relu(s x) = s relu(x), and so does everything else between
two convolutions of a plain network: pooling, padding with zeros. So the outputs of a layer can be
divided by one factor per channel if the next layer multiplies its inputs by them. This takes
nothing from the float network, and makes it easier to quantize.

Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV
2019, section 4.1; with ranges of activations, the factors are those of SmoothQuant (Xiao et al.,
ICML 2023) with alpha 1/2.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repvgg_jax.reparam.containers import (
    Tree,
    boxed_like,
    children_of,
    rebuild,
    unboxed,
    variables_in,
)
from repvgg_jax.text import first_few

Array = Any  # a NumPy or a JAX array, concrete or traced

SWEEPS = 10
"""Passes over all pairs of layers; the factors change by less than a percent after that."""


def equalize(
    variables: Tree,
    order: Sequence[str],
    *,
    activations: Mapping[str, Array] | None = None,
    sweeps: int = SWEEPS,
) -> Tree:
    """Scales the channels between layers so that both sides have the same range per channel.

    Between two layers with ranges r1 of a channel before and r2 after it, the factor is
    s = sqrt(r1 / r2): the channel is divided by s in the first layer and multiplied in the second.
    The network computes what it did, to rounding, if between the layers there are only ReLUs,
    pooling and zero padding, and no connection around a layer.

    A layer with squeeze-and-excite behind it (`se`, with `reduce`) takes part: `reduce` multiplies
    its inputs, too, so the gate stays the same.

    Pure, and usable under `jax.jit`. NumPy arrays are computed in float64 and rounded once, JAX
    arrays in at least float32.

    Args:
      variables: deploy-form variables, `{"params": …}`, or such parameters alone.
      order: paths of the layers as the data pass them, e.g. `("stem", "stage1_block0", …, "head")`;
        `repvgg_jax.quantization.chain(model)` gives a classifier's, and `chains(model)` the several
        of a segmenter. A layer is a mapping with a kernel (height, width, channels in / groups,
        channels out) or (channels in, channels out) and a bias, or a block in deploy form, which
        contains one such mapping.
      activations: by layer, the largest |activation| of each of its output channels, float
        (channels,): r1 is then this instead of the largest |weight|, which suits weights that are
        quantized per channel. Layers that it lacks use weights.
      sweeps: passes over all pairs of layers.

    Returns:
      The same tree with other kernels and biases. A channel without a range, all zeros on one
      side, stays.

    Raises:
      ValueError: no such layer, one in training form, or channels that do not fit the next layer.
    """
    if collections := variables_in(variables):
        changed = equalize(collections["params"], order, activations=activations, sweeps=sweeps)
        return rebuild(variables, {**collections, "params": changed})
    layers = [_Layer(variables, name) for name in order]
    if len(layers) < 2:
        raise ValueError(f"equalization takes at least two layers, not [{first_few(order)}]")
    for before, after in itertools.pairwise(layers):
        before.check(after)
    xp = _numpy(variables)
    # Largest |weight| by input and output channel: all that the factors depend on.
    ranges = [xp.abs(layer.kernel(xp)).max(axis=(0, 1)) for layer in layers]
    factors = [xp.ones(layer.features, ranges[0].dtype) for layer in layers]
    known = dict(activations or {})
    for _ in range(sweeps):
        for i, layer in enumerate(layers[:-1]):
            if layer.name in known:
                r1 = xp.abs(xp.asarray(known[layer.name], ranges[0].dtype))
            else:
                r1 = layer.of_outputs(xp, ranges[i], factors[i - 1] if i else None).max(axis=0)
            after = layers[i + 1]
            r2 = after.by_input(xp, ranges[i + 1] / factors[i + 1][None])
            usable = (r1 > 0) & (r2 > 0)
            s = xp.sqrt(xp.where(usable, r1, 1) / xp.where(usable, r2, 1))
            factors[i] = xp.where(usable, s, 1)
    factors[-1] = xp.ones_like(factors[-1])
    changed = variables
    for i, layer in enumerate(layers):
        changed = layer.scaled(changed, factors[i - 1] if i else None, factors[i], xp)
    return changed


class _Layer:
    """A layer of the chain: where its kernel is, and how its inputs and outputs are arranged."""

    def __init__(self, params: Tree, name: str):
        self.name = name
        node = params
        for key in name.split("/"):
            children = dict(children_of(node))
            if key not in children:
                raise ValueError(
                    f"there is no layer {name} in these parameters; they have "
                    f"{first_few(map(str, children))}"
                )
            node = children[key]
        self.node = node
        self.path = tuple(name.split("/"))
        self.child = None if _is_layer(node) else self._deploy_child(node)
        self.own = unboxed(node if self.child is None else node[self.child])
        shape = self.own["kernel"].shape
        self.in_per_group, self.features = shape[-2:]
        self.groups = 1

    def _deploy_child(self, node: Tree) -> str:
        found = [key for key, child in children_of(node) if key != "se" and _is_layer(child)]
        if len(found) != 1:
            raise ValueError(
                f"{self.name} is not a layer in deploy form, with one kernel and one bias, but has "
                f"[{first_few(str(key) for key, _ in children_of(node))}]; pass the variables "
                "through fuse_params first"
            )
        return found[0]

    def check(self, after: "_Layer") -> None:
        """Whether the outputs are the inputs of that layer; notes its groups.

        Raises:
          ValueError: they cannot be.
        """
        groups, rest = divmod(self.features, after.in_per_group)
        if rest or not groups or after.features % groups:
            raise ValueError(
                f"{self.name} has {self.features} output channels, which do not fit the "
                f"{after.in_per_group} input channels per group of {after.name}; give the layers "
                "in the order in which the data pass them"
            )
        after.groups = groups

    def kernel(self, xp: Any) -> Array:
        """The kernel, (height, width, inputs per group, outputs)."""
        kernel = xp.asarray(self.own["kernel"], _wide(xp, self.own["kernel"]))
        return kernel if kernel.ndim == 4 else kernel[None, None]

    def of_outputs(self, xp: Any, ranges: Array, factors: Array | None) -> Array:
        """Ranges (inputs per group, outputs) with the inputs multiplied by these factors."""
        return ranges if factors is None else ranges * self._per_output(xp, factors)

    def by_input(self, xp: Any, ranges: Array) -> Array:
        """The largest of ranges (inputs per group, outputs) per input channel, (inputs,)."""
        grouped = ranges.reshape(self.in_per_group, self.groups, -1).max(axis=-1)
        return grouped.T.reshape(-1)

    def _per_output(self, xp: Any, factors: Array) -> Array:
        """Factors (inputs,) as (inputs per group, outputs)."""
        grouped = factors.reshape(self.groups, self.in_per_group).T
        return xp.repeat(grouped, self.features // self.groups, axis=1)

    def scaled(self, params: Tree, before: Array | None, after: Array, xp: Any) -> Tree:
        """The whole tree with this layer's inputs multiplied and its outputs divided."""
        kernel, bias = self.own["kernel"], self.own["bias"]
        by = (1 / after)[None] if before is None else self._per_output(xp, before) / after[None]
        wide = xp.asarray(kernel, _wide(xp, kernel))
        wide = wide * by.reshape((1,) * (wide.ndim - 2) + by.shape)
        own = {
            "kernel": wide.astype(kernel.dtype),
            "bias": (xp.asarray(bias, wide.dtype) / after).astype(bias.dtype),
        }
        boxes = dict(children_of(self.node if self.child is None else self.node[self.child]))
        layer = rebuild(
            self.node if self.child is None else self.node[self.child],
            {key: boxed_like(boxes[key], own.get(key, boxes[key])) for key in boxes},
        )
        if self.child is None:
            return _replaced(params, self.path, layer)
        children = {**dict(children_of(self.node)), self.child: layer}
        if "se" in children:
            children["se"] = self._gate(children["se"], after, xp)
        return _replaced(params, self.path, rebuild(self.node, children))

    def _gate(self, gate: Tree, after: Array, xp: Any) -> Tree:
        """Squeeze-and-excite that opens as before for outputs that were divided."""
        reduce = dict(children_of(gate))["reduce"]
        box = dict(children_of(reduce))["kernel"]
        kernel = unboxed({"kernel": box})["kernel"]
        wide = xp.asarray(kernel, _wide(xp, kernel)) * after[:, None]
        changed = {
            **dict(children_of(reduce)),
            "kernel": boxed_like(box, wide.astype(kernel.dtype)),
        }
        return rebuild(gate, {**dict(children_of(gate)), "reduce": rebuild(reduce, changed)})


def _is_layer(node: Tree) -> bool:
    """Whether a node holds one kernel and one bias."""
    return isinstance(node, Mapping) and node.keys() == {"kernel", "bias"}


def _replaced(tree: Tree, path: tuple[str, ...], value: Tree) -> Tree:
    if not path:
        return value
    children = dict(children_of(tree))
    children[path[0]] = _replaced(children[path[0]], path[1:], value)
    return rebuild(tree, children)


def _numpy(params: Tree) -> Any:
    """NumPy, or `jax.numpy` if any leaf is a JAX array."""
    leaves = jax.tree.leaves(params)
    return jnp if any(isinstance(leaf, jax.Array) for leaf in leaves) else np


def _wide(xp: Any, array: Array) -> Any:
    return np.float64 if xp is np else jnp.promote_types(array.dtype, jnp.float32)
