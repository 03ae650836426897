"""Trees of parameters: which nodes are blocks, and whether they are complete.

A block is a mapping whose children are exactly those of a `BlockSpec`; running statistics live
in a parallel tree under the same names. Nothing here depends on Flax.
"""

import collections
import dataclasses
import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import jax.numpy as jnp

from repvgg_jax.reparam.blocks import BlockSpec
from repvgg_jax.reparam.containers import Tree, children_of, unboxed
from repvgg_jax.reparam.linear import (
    Geometry,
    leaves,
    names,
    present,
    subterms,
    walk,
    without_initial,
)
from repvgg_jax.reparam.terms import Chain, Conv, Linear, Norm, Scale
from repvgg_jax.text import first_few, tree_path

Path = tuple[Any, ...]


@dataclasses.dataclass
class Walk:
    """What all walks over a tree share; the arguments are those of `fuse_params`."""

    blocks: Sequence[BlockSpec]
    exclude: Sequence[str]
    epsilon: float
    geometries: Mapping[str, Geometry] = dataclasses.field(default_factory=dict)
    count: int = 0
    met: set[str] = dataclasses.field(default_factory=set)  # patterns of `exclude`

    def __post_init__(self) -> None:
        if isinstance(self.blocks, BlockSpec):
            self.blocks = (self.blocks,)
        if wrong := [block for block in self.blocks if not isinstance(block, BlockSpec)]:
            raise ValueError(f"blocks must hold BlockSpecs, e.g. reparam.REPVGG, not {wrong[0]!r}")
        if isinstance(self.exclude, str):
            self.exclude = (self.exclude,)
        if isinstance(self.epsilon, (int, float)) and not 0 <= self.epsilon < math.inf:
            raise ValueError(f"epsilon={self.epsilon} must be a finite number, 0 or more")

    def geometry(self, path: Path) -> Geometry | None:
        """The shapes of the block at this path, if the caller gave them."""
        return self.geometries.get(str(path[-1])) if path else None

    def excluded(self, path: Path) -> bool:
        """Whether a pattern in `exclude` names this path."""
        name = tree_path([part for part in path if part != "params"])
        found = [pattern for pattern in self.exclude if fnmatch.fnmatchcase(name, pattern)]
        self.met |= {*found}
        return bool(found)

    def check_exclude(self) -> None:
        """Raises ValueError if a pattern of `exclude` matched no path, e.g. a misspelled one."""
        if unmet := [pattern for pattern in self.exclude if pattern not in self.met]:
            raise ValueError(f"exclude: the tree has no path {first_few(map(repr, unmet))}")

    def train_spec(self, node: Tree, path: Path) -> BlockSpec | None:
        """The block that this node is, in training form."""
        return None if self.excluded(path) else matching_block(node, self.blocks)

    def deploy_spec(self, node: Tree, path: Path) -> BlockSpec | None:
        """The block that this node is, in deploy form.

        Raises:
          ValueError: it has the children of both forms.
        """
        if not isinstance(node, Mapping) or self.excluded(path):
            return None
        for spec in self.blocks:
            if spec.deploy not in node:
                continue
            rest = node.keys() - {spec.deploy}
            if rest <= spec.keep and _is_affine(node[spec.deploy]):
                return spec
            if spec.required <= rest:
                raise ValueError(
                    f"{path_name(path)} contains both {spec.deploy} and "
                    f"{', '.join(sorted(spec.required))}: a block is in training form or in "
                    "deploy form; remove one of the two"
                )
        return None

    def is_block(self, node: Tree, path: Path) -> bool:
        """Whether this node is a block in either form."""
        return bool(self.train_spec(node, path) or self.deploy_spec(node, path))

    def is_auxiliary_head(self, key: Any, siblings: Mapping[Any, Tree], path: Path) -> bool:
        """Whether that child is the auxiliary classifier of a block or backbone beside it."""
        beside = str(key).removeprefix("aux_")
        return (
            beside != key
            and is_auxiliary_head(siblings[key])
            and self.has_block(siblings.get(beside), (*path, beside))
        )

    def has_block(self, node: Tree, path: Path) -> bool:
        """Whether this node is a block in either form, or has one inside."""
        return self.is_block(node, path) or any(
            self.has_block(child, (*path, key)) for key, child in children_of(node)
        )


def matching_block(node: Tree, blocks: Sequence[BlockSpec]) -> BlockSpec | None:
    """The block whose training-form children are exactly those of this node.

    Raises:
      ValueError: it fits two blocks that compute different functions.
    """
    if not isinstance(node, Mapping):
        return None
    keys = node.keys()
    matches = [
        spec
        for spec in blocks
        if spec.required <= keys <= spec.required | spec.optional | spec.keep
        and keys & (spec.required | spec.optional)
        and all(isinstance(node[key], Mapping) for key in spec.required)
    ]
    # Specs may differ in nothing but the sizes of their kernels.
    fitting = [spec for spec in matches if len(matches) == 1 or _sizes_fit(spec.train, node)]
    for spec in fitting[1:]:
        # Two specs are one for this node if they differ only in terms that it does not have.
        if _expression(spec, keys) != _expression(fitting[0], keys):
            raise ValueError(
                f"[{first_few(sorted(keys), 6)}] fits both {fitting[0].name} and {spec.name}; "
                "give one of them in blocks=, or the model to fuse_model"
            )
    return next(iter(fitting or matches), None)


def _expression(spec: BlockSpec, keys: Set[str]) -> tuple[Linear | None, str]:
    """What a block with these children computes, and the name of its deploy form."""
    train = present(spec.train, bool(spec.optional) and spec.optional <= keys)
    return train and without_initial(train), spec.deploy


def _sizes_fit(train: Linear, params: Mapping[str, Any]) -> bool:
    """Whether all kernels have the height and width that the expression says."""
    for term in walk(train):
        child = params.get(term.name) if isinstance(term, Conv) else None
        if (
            isinstance(term, Conv)
            and isinstance(child, Mapping)
            and getattr(unboxed(child.get("kernel")), "shape", ())[-4:-2] != term.kernel_size
        ):
            return False
    return True


def input_channels(spec: BlockSpec, params: Mapping[str, Any]) -> int | None:
    """Input channels per group of a block in either form; None if the parameters do not show it."""
    params = unboxed(params)
    if spec.deploy in params:
        return int(params[spec.deploy]["kernel"].shape[-2])
    convs = {term.name for term in walk(spec.train) if isinstance(term, Conv)}
    if not spec.required <= params.keys() or not convs & params.keys():
        return None
    geometry = _geometry(spec.train, params)
    return geometry.in_channels // geometry.groups


def _geometry(train: Linear, params: Mapping[str, Any]) -> Geometry:
    """Shapes of a block as far as its parameters show them."""
    optional = names(train, optional=True)
    same_shape = bool(optional) and optional <= params.keys()
    sized = _sized(train, params)
    resolved = present(train, same_shape)
    assert resolved is not None, "a block with children has terms"
    if not any(isinstance(term, Conv) for term in walk(resolved)):
        raise ValueError(
            "without a convolution its parameters do not show the groups of the block; use "
            "fuse_model(model, variables, images)"
        )
    convs = [t for t in walk(resolved) if isinstance(t, Conv) and len(sized.get(t.name, ())) >= 4]
    if not convs:
        channels = next((shape[-1] for shape in sized.values() if shape), 1)
        return Geometry(channels, channels, groups=channels, same_shape=same_shape)
    features = next((sized[t.name][-1] // t.multiple for t in convs if t.expansion is None), 0)
    first = [t for t in _on_input(resolved) if t in convs]
    # The kernel of a depthwise convolution does not show how many channels it takes.
    first.sort(key=lambda term: term.groups == "depthwise")
    in_per_group = sized[(first or convs)[0].name][-2]
    in_channels = next(
        (sized[t.name][-1] // t.expansion for t in first if t.expansion),
        features if same_shape else in_per_group,
    )
    groups = max(1, in_channels // in_per_group) if in_per_group else 1
    if in_channels % max(in_per_group, 1):
        raise ValueError(
            f"an identity branch needs as many input as output channels, but groups of "
            f"{in_per_group} do not divide {in_channels} channels"
        )
    guess = Geometry(in_channels, features or in_channels, groups=groups, same_shape=same_shape)
    if (same_shape and (first or convs)[0].groups is None) or _fits(train, guess, sized):
        return guess
    # Norms, and convolutions behind the first one, may show that there are groups.
    own = (first or convs)[0].groups
    for groups in _divisors(guess.features):
        inputs = guess.in_channels if own == "depthwise" else in_per_group * (own or groups)
        other = dataclasses.replace(guess, in_channels=inputs, groups=groups)
        if _fits(train, other, sized):
            return other
    return guess


def _hides_inputs(train: Linear, geometry: Geometry, params: Mapping[str, Any]) -> bool:
    """Whether a depthwise convolution lets blocks of other groups have the same parameters."""
    if geometry.has_same_shape and names(train, optional=True):
        return False
    own = {term.groups for term in _on_input(train) if term.name in params}
    per_group = geometry.in_channels // geometry.groups
    if own != {None, "depthwise"} or per_group == 1:  # of one channel per group, all fold alike
        return False
    sized = _sized(train, params)
    found = (
        dataclasses.replace(geometry, in_channels=per_group * g, groups=g, same_shape=False)
        for g in _divisors(geometry.features)
    )
    return sum(_fits(train, other, sized) for other in found) > 1


def _sized(train: Linear, params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of kernels and scales by the names of a block's children."""
    return {
        name: tuple(getattr(params[name][leaf], "shape", ()))
        for name in names(train) & params.keys()
        for leaf in ("kernel", "scale")
        if leaf in params[name]
    }


def _divisors(number: int) -> Iterator[int]:
    return (divisor for divisor in range(1, number + 1) if number % divisor == 0)


def _fits(train: Linear, geometry: Geometry, sized: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether kernels and scales of these shapes are those of a block."""
    try:
        expected = leaves(train, geometry)
    except ValueError:
        return False
    return all(
        sized[leaf.name][-len(leaf.shape) :] == leaf.shape
        for leaf in expected
        if leaf.name in sized and leaf.leaf in ("kernel", "scale")
    )


def _on_input(term: Linear) -> list[Conv]:
    """Convolutions that are applied to the block's input itself."""
    if isinstance(term, Chain):
        for child in term.terms:
            if found := _on_input(child):
                return found
        return []
    if isinstance(term, Conv):
        return [term]
    return [found for child in subterms(term) for found in _on_input(child)]


def leading_axes(train: Linear, params: Mapping[str, Any]) -> tuple[int, ...]:
    """Leading axes of a stack of blocks."""
    for term in walk(train):
        if not isinstance(term, (Conv, Norm, Scale)) or term.name is None:
            continue
        if term.name in params:
            leaf, own = ("kernel", 4) if isinstance(term, Conv) else ("scale", 1)
            shape = getattr(params[term.name].get(leaf), "shape", ())
            return tuple(shape[: max(0, len(shape) - own)])
    return ()


def check_block(
    spec: BlockSpec,
    params: Mapping[str, Any],
    stats: Any,
    *,
    geometry: Geometry | None = None,
    path: Path = (),
) -> Geometry:
    """Checks every leaf of a training-form block by name and shape.

    Returns:
      The block's geometry, with stride and dilation 1 if read off the parameters.

    Raises:
      ValueError: with the block's path and the first thing that is wrong.
    """
    where = path_name(path)
    advice = ""
    if geometry is None:
        advice = f"; if it is not a {spec.name} block, leave it alone with exclude=[{where!r}]"
        if spec.traceless:
            raise ValueError(
                f"{where} looks like a {spec.name} block, whose parameters do not show whether it "
                "has an identity branch; use fuse_model(model, variables, images)"
            )
        try:
            geometry = _geometry(spec.train, params)
        except ValueError as error:
            raise ValueError(f"{where} cannot be a {spec.name} block: {error}") from error
        if _hides_inputs(spec.train, geometry, params):
            raise ValueError(
                f"{where}: with a depthwise convolution the parameters of a {spec.name} block do "
                "not show how many channels it takes; use fuse_model(model, variables, images)"
            )
    expected: dict[str, dict[str, tuple[int, ...]]] = collections.defaultdict(dict)
    try:
        for leaf in leaves(spec.train, geometry):
            expected[leaf.name][leaf.leaf] = leaf.shape
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{where} cannot be a {spec.name} block: {error}") from error
    if stats is not None and not isinstance(stats, Mapping):
        raise ValueError(f"{where} in batch_stats is {summary(stats)}, expected a mapping")
    norms = {leaf.name for leaf in leaves(spec.train, geometry) if leaf.collection == "batch_stats"}
    if norms and not stats:
        raise ValueError(
            f"{where} has no running statistics: 'batch_stats' is needed beside 'params'; "
            "model.init gives both, and training updates both"
        )
    absent = sorted(expected.keys() - params.keys())
    absent += [f"{norm} in batch_stats" for norm in sorted(norms - (stats or {}).keys())]
    extra = sorted(params.keys() - expected.keys() - spec.keep)
    extra += [f"{norm} in batch_stats" for norm in sorted(map(str, (stats or {}).keys() - norms))]
    if absent or extra:
        raise ValueError(
            f"{where} is not a complete {spec.name} block: missing [{', '.join(absent)}], "
            f"unexpected [{', '.join(extra)}]"
        )
    lead = leading_axes(spec.train, params)
    for name, shapes in expected.items():
        for child in (params[name], (stats or {}).get(name, {})):
            if not isinstance(child, Mapping):
                raise ValueError(f"{where}/{name} is {summary(child)}, expected a mapping")
        found = {**params[name], **((stats or {}).get(name, {}) if name in norms else {})}
        try:
            check_leaves(found, {k: (*lead, *s) for k, s in shapes.items()}, f"{where}/{name}")
        except ValueError as error:
            raise ValueError(f"{error}{advice}") from None
    return geometry


def with_statistics(spec: BlockSpec, params: Tree, stats: Tree) -> tuple[Tree, Tree]:
    """Parameters and running statistics of a block, apart.

    Flax NNX keeps the statistics of a norm beside its parameters: `bn3x3/{scale, bias, mean,
    var}`. They are told apart only if `stats` is None.
    """
    if stats is not None or not is_merged(spec, params):
        return params, stats
    norms = {term.name for term in walk(spec.train) if isinstance(term, Norm)} & params.keys()
    own, moments = dict(params), {}
    for norm in norms:
        leaves_ = dict(params[norm])
        moments[norm] = {leaf: leaves_.pop(leaf) for leaf in ("mean", "var")}
        own[norm] = leaves_
    return own, moments


def is_merged(spec: BlockSpec, params: Tree) -> bool:
    """Whether a block's running statistics are beside its parameters."""
    norms = [params.get(term.name) for term in walk(spec.train) if isinstance(term, Norm)]
    present_ = [norm for norm in norms if norm is not None]
    return bool(present_) and all(
        isinstance(norm, Mapping) and {"mean", "var"} <= norm.keys() for norm in present_
    )


def _is_affine(node: Tree) -> bool:
    return isinstance(node, Mapping) and node.keys() == {"kernel", "bias"}


def is_auxiliary_head(node: Tree) -> bool:
    """Whether this node has the children of an auxiliary classifier."""
    return isinstance(node, Mapping) and node.keys() == {"conv", "bn", "logits"}


def check_leaves(found: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> None:
    """Raises ValueError unless `found` has the expected leaf names and shapes, all real numbers."""
    if found.keys() != expected.keys():
        raise ValueError(
            f"{where} has [{', '.join(sorted(map(str, found)))}], "
            f"expected [{', '.join(sorted(expected))}]"
        )
    for leaf, shape in expected.items():
        if (have := getattr(found[leaf], "shape", None)) != shape:
            raise ValueError(f"{where}/{leaf}: shape {have}, expected {shape}")
        if not jnp.issubdtype(found[leaf].dtype, jnp.floating):
            raise ValueError(
                f"{where}/{leaf}: {found[leaf].dtype}, expected floating point numbers"
            )


def path_name(path: Path) -> str:
    """A path for messages."""
    return tree_path(path) or "the tree"


def summary(node: Tree) -> str:
    """What a tree looks like from above, for messages."""
    if not isinstance(node, Mapping):
        return f"a {type(node).__name__}"
    return f"a mapping with [{first_few(node, 6)}]"
