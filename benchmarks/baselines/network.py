"""A network as data: a sequence of parts, from which every framework builds the same thing.

`evaluate` walks the parts and lets `operations` say what each of them does: count (`cost`,
`parameters`), compute with Flax (`linen.py`), write an ONNX node (`graph.py`). PyTorch has modules
of its own (`pytorch.py`). Feature maps are NHWC, kernels HWIO.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from repvgg_jax.costs import Cost
from repvgg_jax.reparam import BlockSpec, Chain, Geometry, conv_bn, leaves, macs
from repvgg_jax.reparam import Conv as Convolution
from repvgg_jax.variants import Layer, Variant

Activation = Literal["relu", "silu"] | None


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution padded by half its kernel, batch normalization, an activation.

    Attributes:
      name: of its parameters.
      features: channels out.
      size: height and width of the kernel.
      stride: of both axes.
      groups: of channels; as many as channels for a depthwise convolution.
      activation: of the result.
      norm: whether batch normalization follows; without it there is a bias.
      bias: whether there is a bias before the norm, too.
    """

    name: str
    features: int
    size: int = 3
    stride: int = 1
    groups: int = 1
    activation: Activation = "relu"
    norm: bool = True
    bias: bool = False

    @property
    def spec(self) -> BlockSpec:
        """Convolution and norm as a block of one branch, which `fuse_params` folds."""
        spec = conv_bn(self.size)
        if not self.bias:
            return spec
        conv, norm = spec.train.terms
        return BlockSpec(spec.name, Chain((dataclasses.replace(conv, bias=True), norm)))

    def geometry(self, channels: int) -> Geometry:
        """Its shapes on an input of that many channels."""
        return Geometry(channels, self.features, self.stride, groups=self.groups)


@dataclasses.dataclass(frozen=True)
class Affine:
    """A scale and a bias per channel: the folded norm of an identity branch."""

    name: str


@dataclasses.dataclass(frozen=True)
class MaxPool:
    """The largest value of every window, padded by half of it."""

    size: int
    stride: int
    padding: int = 0


@dataclasses.dataclass(frozen=True)
class Gate:
    """Squeeze-and-excite: every channel times a gate computed from all channels' means.

    Attributes:
      name: of its parameters, `{name}_reduce` and `{name}_expand`.
      squeezed: width of the hidden layer.
      activation: of the hidden layer.
    """

    name: str
    squeezed: int
    activation: Activation


@dataclasses.dataclass(frozen=True)
class Sum:
    """The sum of branches applied to the same input; an empty branch is the input itself."""

    branches: tuple[tuple["Part", ...], ...]
    activation: Activation = None


@dataclasses.dataclass(frozen=True)
class Average:
    """Global average pooling."""


@dataclasses.dataclass(frozen=True)
class Flatten:
    """Height, width and channels as one axis, in this order."""


@dataclasses.dataclass(frozen=True)
class Dense:
    """A linear layer with a bias, and an activation."""

    name: str
    features: int
    activation: Activation = None


Part = Conv | Affine | MaxPool | Gate | Sum | Average | Flatten | Dense


@dataclasses.dataclass(frozen=True)
class Network:
    """A network.

    Attributes:
      name: as in the paper's tables.
      parts: from images to logits.
      image_size: height and width that the paper's row is at, in pixels.
      channels: of the images.
    """

    name: str
    parts: tuple[Part, ...]
    image_size: int = 224
    channels: int = 3

    def convs(self) -> Iterator[Conv]:
        """All convolutions, in order."""
        return (part for part in walk(self.parts) if isinstance(part, Conv))


class Operations(Protocol):
    """What every part does to a value; `evaluate` calls these."""

    def conv(self, part: Conv, x: Any) -> Any: ...  # noqa: D102
    def affine(self, part: Affine, x: Any) -> Any: ...  # noqa: D102
    def max_pool(self, part: MaxPool, x: Any) -> Any: ...  # noqa: D102
    def gate(self, part: Gate, x: Any) -> Any: ...  # noqa: D102
    def add(self, part: Sum, terms: list[Any]) -> Any: ...  # noqa: D102
    def average(self, part: Average, x: Any) -> Any: ...  # noqa: D102
    def flatten(self, part: Flatten, x: Any) -> Any: ...  # noqa: D102
    def dense(self, part: Dense, x: Any) -> Any: ...  # noqa: D102


def walk(parts: Sequence[Part]) -> Iterator[Part]:
    """All parts, those inside sums included, in order."""
    for part in parts:
        yield part
        if isinstance(part, Sum):
            for branch in part.branches:
                yield from walk(branch)


def evaluate(parts: Sequence[Part], x: Any, operations: Operations) -> Any:
    """Applies parts one after another to a value of whatever kind the operations work on."""
    for part in parts:
        match part:
            case Sum():
                terms = [evaluate(branch, x, operations) for branch in part.branches]
                x = operations.add(part, terms)
            case Conv():
                x = operations.conv(part, x)
            case Affine():
                x = operations.affine(part, x)
            case MaxPool():
                x = operations.max_pool(part, x)
            case Gate():
                x = operations.gate(part, x)
            case Average():
                x = operations.average(part, x)
            case Flatten():
                x = operations.flatten(part, x)
            case Dense():
                x = operations.dense(part, x)
    return x


def from_variant(variant: Variant, num_classes: int = 1000) -> Network:
    """A RepVGG in deploy form; its parameters are those of `fuse_params`."""
    if variant.se is not None:
        raise ValueError(f"{variant.name} has squeeze-and-excite, which no table of the paper has")
    blocks = [
        Conv(layer.name, layer.features, stride=layer.stride, groups=layer.groups)
        for layer in variant.layers()
    ]
    return Network(variant.name, (*blocks, Average(), Dense("head", num_classes)))


def unconverted(
    variant: Variant, *, identity: bool = True, pointwise: bool = True, num_classes: int = 1000
) -> Network:
    """A RepVGG that was not converted: its branches, each with its norm folded into it.

    Args:
      variant: the architecture.
      identity: whether blocks have their identity branch.
      pointwise: whether blocks have their 1x1 branch.
      num_classes: of the classifier.
    """

    def block(layer: Layer) -> Part:
        same = {"stride": layer.stride, "groups": layer.groups, "activation": None}
        branches: list[tuple[Part, ...]] = [(Conv(f"{layer.name}_3x3", layer.features, **same),)]
        if pointwise:
            branches.append((Conv(f"{layer.name}_1x1", layer.features, 1, **same),))
        if identity and layer.identity:
            branches.append((Affine(f"{layer.name}_identity"),))
        return Sum(tuple(branches), "relu")

    blocks = [block(layer) for layer in variant.layers()]
    return Network(variant.name, (*blocks, Average(), Dense("head", num_classes)))


def cost(network: Network, *, image_size: int | None = None) -> Cost:
    """Parameters and multiplications, counted as `repvgg_jax.cost` counts them.

    Args:
      network: what to count.
      image_size: height and width of the images; None for the network's own.
    """
    size = image_size or network.image_size
    counter = _Counter()
    evaluate(network.parts, (size, size, network.channels), counter)
    return Cost(
        params_train=counter.train,
        params_deploy=sum(math.prod(shape) for shape in counter.shapes.values()),
        params_auxiliary=0,
        macs_train=counter.macs,
        macs_deploy=counter.macs,
        winograd_muls=counter.winograd,
    )


def shapes(network: Network, *, image_size: int | None = None) -> dict[str, tuple[int, ...]]:
    """Shapes of the deploy form's parameters by path, e.g. `stem/reparam/kernel`."""
    size = image_size or network.image_size
    counter = _Counter()
    evaluate(network.parts, (size, size, network.channels), counter)
    return counter.shapes


def random_params(network: Network, *, image_size: int | None = None, seed: int = 0) -> Any:
    """Deploy-form parameters under which activations keep their size from layer to layer."""
    rng = np.random.default_rng(seed)
    tree: dict[str, Any] = {}
    for path, shape in shapes(network, image_size=image_size).items():
        *parents, leaf = path.split("/")
        values = rng.standard_normal(shape, np.float32)
        # A kernel keeps the variance of what a ReLU passes on; a scale keeps the input.
        values *= (2 / math.prod(shape[:-1])) ** 0.5 if leaf == "kernel" else 0.1
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = values + 1 if leaf == "scale" else values
    return tree


class _Counter:
    """Follows the shape of one image, (height, width, channels), and adds up."""

    def __init__(self) -> None:
        self.train = 0
        self.macs = 0
        self.winograd = 0
        self.shapes: dict[str, tuple[int, ...]] = {}

    def conv(self, part: Conv, x: tuple[int, ...]) -> tuple[int, ...]:
        height, width, channels = x
        geometry = part.geometry(channels)
        folded = Convolution("reparam", (part.size, part.size), bias=True)
        self.train += sum(
            math.prod(leaf.shape)
            for leaf in leaves(part.spec.train if part.norm else folded, geometry)
            if leaf.collection == "params"
        )
        for leaf in leaves(folded, geometry):
            path = (part.name, "reparam", leaf.leaf) if part.norm else (part.name, leaf.leaf)
            self.shapes["/".join(path)] = leaf.shape
        is_winograd = part.size == 3 and part.stride == 1
        self._multiply(macs(folded, geometry, height, width), is_winograd)
        return -(-height // part.stride), -(-width // part.stride), part.features

    def affine(self, part: Affine, x: tuple[int, ...]) -> tuple[int, ...]:
        for leaf in ("scale", "bias"):
            self.shapes[f"{part.name}/{leaf}"] = x[-1:]
            self.train += x[-1]
        return x

    def max_pool(self, part: MaxPool, x: tuple[int, ...]) -> tuple[int, ...]:
        height, width = ((s + 2 * part.padding - part.size) // part.stride + 1 for s in x[:2])
        return height, width, x[2]

    def gate(self, part: Gate, x: tuple[int, ...]) -> tuple[int, ...]:
        self._linear(f"{part.name}_reduce", x[-1], part.squeezed)
        self._linear(f"{part.name}_expand", part.squeezed, x[-1])
        return x

    def add(self, _: Sum, terms: list[tuple[int, ...]]) -> tuple[int, ...]:
        if len(set(terms)) > 1:
            raise ValueError(f"the branches of a sum differ in shape: {terms}")
        return terms[0]

    def average(self, _: Average, x: tuple[int, ...]) -> tuple[int, ...]:
        return x[-1:]

    def flatten(self, _: Flatten, x: tuple[int, ...]) -> tuple[int, ...]:
        return (math.prod(x),)

    def dense(self, part: Dense, x: tuple[int, ...]) -> tuple[int, ...]:
        self._linear(part.name, x[-1], part.features)
        return (part.features,)

    def _linear(self, name: str, inputs: int, outputs: int) -> None:
        self.shapes[f"{name}/kernel"], self.shapes[f"{name}/bias"] = (inputs, outputs), (outputs,)
        self.train += (inputs + 1) * outputs
        self._multiply(inputs * outputs, is_winograd=False)

    def _multiply(self, products: int, is_winograd: bool) -> None:
        self.macs += products
        self.winograd += products * 4 // 9 if is_winograd else products
