"""`unfuse_params`: one convolution becomes the branches of a block again."""

import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from repvgg_jax.reparam.algebra import EPSILON, Affine, affine, namespace, parallel, widened
from repvgg_jax.reparam.blocks import BUILT_IN, BlockSpec
from repvgg_jax.reparam.containers import (
    Tree,
    boxed_like,
    children_of,
    copies_of_params,
    is_container,
    rebuild,
    unboxed,
    variables_in,
)
from repvgg_jax.reparam.linear import Geometry, kernel_size, names, present, walk
from repvgg_jax.reparam.terms import Chain, Conv, Linear, Norm, Scale, Sum
from repvgg_jax.reparam.tree import (
    Path,
    Walk,
    check_block,
    check_leaves,
    is_merged,
    leading_axes,
    path_name,
    summary,
    with_statistics,
)
from repvgg_jax.text import tree_path


def unfuse_params(
    deployed: Tree,
    *,
    like: Tree,
    blocks: Sequence[BlockSpec] = BUILT_IN,
    exclude: Sequence[str] = (),
    epsilon: float = EPSILON,
    geometries: Mapping[str, Geometry] | None = None,
) -> Tree:
    """Turns a deploy-form tree into a trainable one that computes the same function.

    A kernel can be split over several branches in many ways. Here all branches but one are those
    of `like`; the one with the largest kernel takes the rest, with its norm set to multiply by
    one. This is always solvable and never divides by a small scale. `fuse_params` of the result
    is `deployed` up to rounding.

    The two functions are equal in evaluation, that is with running statistics, which are those
    of `like`. Training normalizes by the statistics of its batches instead, so the first steps
    change the function; start with a warm-up, or keep the running statistics
    (`freeze_statistics` of blocks, `config.bn.freeze_statistics` of recipes).

    Args:
      deployed: the variables of a deploy-form network, in any container that `fuse_params`
        takes.
      like: the variables of the same network in training form, e.g. from `init`, in the same
        container or as a TrainState. Auxiliary heads, which a deploy-form tree lacks, come from
        here. Where it has only shapes, as from `jax.eval_shape(model.init, …)`, the values are
        initial ones.
      blocks: as in `fuse_params`.
      exclude: as in `fuse_params`.
      epsilon: of batch normalization.
      geometries: as in `fuse_params`.

    Returns:
      `{"params": …, "batch_stats": …}` with the names and shapes of `like`, in the container of
      `deployed`.

    Raises:
      ValueError: the two trees are not two forms of one network, with the first difference, or
        a block has no inverse.
    """
    ours, theirs = variables_in(like), variables_in(deployed)
    what, tree = ("deployed", deployed) if theirs is None else ("like", like)
    no_variables = ValueError(
        f"unfuse_params: `{what}` must be variables, {{'params': …}}, not {summary(tree)}"
    )
    if (ours is None) != (theirs is None):
        raise no_variables
    arrays = jnp if any(isinstance(x, jax.Array) for x in jax.tree.leaves(deployed)) else np
    unfusing = _Unfusing(blocks, exclude, epsilon, geometries or {}, arrays=arrays)
    result = unfusing.node(like, None, deployed, ())
    if not unfusing.count:
        if theirs is None:
            raise no_variables
        raise ValueError(
            "unfuse_params: `like` contains no training-form block; give the variables of the "
            "training form, create_model(…).init(…)"
        )
    unfusing.check_exclude()
    return result


@dataclasses.dataclass
class _Unfusing(Walk):
    """One walk over two trees."""

    arrays: Any = np  # the module that makes arrays where `like` has shapes only

    def collections(
        self, ours: dict[str, Tree], theirs: dict[str, Tree], path: Path
    ) -> dict[str, Tree]:
        """Unfuses `params` and copies of it beside it."""
        result, statistics = dict(theirs), dict(copies_of_params(ours))
        for name, _ in copies_of_params(theirs):
            where, stats = path if name == "params" else (*path, name), statistics.get(name)
            like = ours[name] if stats else ours["params"]
            below = ours.get(stats or "batch_stats", {})
            result[name] = self.node(like, below, theirs[name], where)
        for name in dict.fromkeys(
            name for name in statistics.values() if {name} & {*ours, *theirs}
        ):
            result[name] = self.filled(_merge(ours.get(name, {}), theirs.get(name, {})), (name,))
        return result

    def node(self, like: Tree, stats: Tree, deployed: Tree, path: Path) -> Tree:
        where = path_name(path)
        if stats is None:  # outside of any `params`
            ours, theirs = variables_in(like), variables_in(deployed)
            if ours and theirs:
                return rebuild(deployed, self.collections(ours, theirs, path))
        if spec := self.train_spec(like, path):
            self.count += 1
            if not self.deploy_spec(deployed, path):
                raise ValueError(
                    f"{where}: expected a deploy-form block with {spec.deploy} in `deployed`, "
                    f"found {summary(deployed)}"
                )
            return rebuild(like, self.block(spec, like, stats, deployed, path))
        if not is_container(like):
            shapes = [getattr(unboxed(leaf), "shape", None) for leaf in (like, deployed)]
            if shapes[0] != shapes[1]:
                raise ValueError(f"`deployed`/{where}: shape {shapes[1]}, expected {shapes[0]}")
            return deployed
        if not is_container(deployed):
            raise ValueError(
                f"{where}: expected {summary(like)} in `deployed`, found {summary(deployed)}"
            )
        ours, theirs = dict(children_of(like)), dict(children_of(deployed))
        below = dict(children_of(stats))
        absent = [
            str(key)
            for key in ours
            if key not in theirs
            and not (isinstance(like, Mapping) and self.is_auxiliary_head(key, like, path))
        ]
        extra = [str(key) for key in theirs if key not in ours]
        if absent or extra:
            raise ValueError(
                f"{where}: `deployed` lacks [{', '.join(absent)}] of `like` "
                f"and has [{', '.join(extra)}] beyond it"
            )
        children = {
            key: self.node(child, below.get(key), theirs[key], (*path, key))
            if key in theirs
            else self.filled(child, (*path, key))  # an auxiliary head
            for key, child in ours.items()
        }
        return rebuild(like, children)

    def block(
        self, spec: BlockSpec, like: Tree, stats: Tree, deployed: Tree, path: Path
    ) -> dict[str, Any]:
        """The children of a block in training form."""
        merged = not stats and is_merged(spec, like)
        own, moments = with_statistics(spec, like, None if merged else stats)
        own = {name: child for name, child in own.items() if name not in spec.keep}
        plain, plain_moments = (self.filled(unboxed(tree), path) for tree in (own, moments))
        given = self.geometry(path)
        geometry = check_block(spec, plain, plain_moments, geometry=given, path=path)
        where, target = path_name(path), unboxed(deployed[spec.deploy])
        lead = leading_axes(spec.train, plain)
        in_per_group = geometry.in_channels // geometry.groups
        shape = (*lead, *spec.kernel_size(geometry), in_per_group, geometry.features)
        expected = {"kernel": shape, "bias": (*lead, geometry.features)}
        check_leaves(target, expected, f"{where}/{spec.deploy}")
        wide = Affine(*(widened(target[leaf]) for leaf in ("kernel", "bias")))
        train = present(spec.train, geometry.has_same_shape)
        assert train is not None, "check_block has resolved it"
        inverse = _Inverse(geometry, plain, plain_moments or {}, self.epsilon)
        try:
            changed = inverse.solve(train, wide)
        except ValueError as error:
            raise ValueError(f"{where}: a {spec.name} block has no inverse: {error}") from error
        children: dict[str, Any] = {}
        for name in own:
            leaves_ = {**plain[name], **_astype(changed.get(name, {}), plain[name])}
            if merged:
                leaves_ |= plain_moments.get(name, {})
            boxes = like[name]
            boxed = {leaf: boxed_like(boxes[leaf], array) for leaf, array in leaves_.items()}
            children[name] = rebuild(boxes, boxed)
        return children | {key: deployed[key] for key in deployed if key in spec.keep}

    def filled(self, tree: Tree, path: Path) -> Tree:
        """Initial values where a tree has `jax.ShapeDtypeStruct`, as `jax.eval_shape` gives.

        Kernels are uniform as PyTorch's are, from a seed that depends on their path; norms are
        neutral.
        """
        if children := children_of(tree):
            return rebuild(tree, {key: self.filled(c, (*path, key)) for key, c in children})
        leaf = unboxed(tree)
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return tree
        if path[-1] == "kernel":
            rng = np.random.default_rng(zlib.crc32(tree_path(path).encode()))
            bound = max(1, math.prod(leaf.shape[-4:-1])) ** -0.5
            value = rng.uniform(-bound, bound, leaf.shape)
        else:
            value = np.full(leaf.shape, path[-1] in ("scale", "var"))
        return boxed_like(tree, self.arrays.asarray(value, leaf.dtype))


@dataclasses.dataclass
class _Inverse:
    """Parameters for which an expression computes a given map."""

    geometry: Geometry
    params: Mapping[str, Any]
    stats: Mapping[str, Any]
    epsilon: float

    def solve(
        self, term: Linear, target: Affine, *, unbiased: bool = False
    ) -> dict[str, dict[str, Any]]:
        """Parameters that change, by child name; the others stay.

        Args:
          term: the expression.
          target: what it must compute.
          unbiased: whether the target's bias is zero, whatever the values.
        """
        if _is_free(term):
            if term.bias:
                return {term.name: {"kernel": target.kernel, "bias": target.bias}}
            if unbiased:
                return {term.name: {"kernel": target.kernel}}
            raise ValueError(f"{term.name} has neither a bias nor a norm")
        first = term.terms[0] if isinstance(term, Chain) and len(term.terms) == 2 else None
        if isinstance(term, Chain) and isinstance(first, Norm):
            then = term.terms[1]
            neutral = self._neutral(first, 0 * self.params[first.name]["bias"])
            return {**self.solve(then, target, unbiased=unbiased), first.name: neutral}
        last = term.terms[-1] if isinstance(term, Chain) else None
        if isinstance(term, Chain) and isinstance(last, (Norm, Scale)):
            rest = term.terms[:-1]
            if len(rest) != 1:
                raise ValueError("only a single term before a norm or scale can be solved for")
            if isinstance(last, Norm):
                neutral = self._neutral(last, target.bias)
                target = target._replace(bias=namespace(target.bias).zeros_like(target.bias))
                return {**self.solve(rest[0], target, unbiased=True), last.name: neutral}
            if last.name is None and last.factor:
                scaled = Affine(target.kernel / last.factor, target.bias / last.factor)
                return self.solve(rest[0], scaled, unbiased=unbiased)
            if last.name is not None and last.factor == 1 and not last.bias:
                ones = {"scale": 0 * target.bias + 1}
                return {**self.solve(rest[0], target, unbiased=unbiased), last.name: ones}
        if isinstance(term, Sum):
            size = target.kernel.shape[-4:-2]
            error = ValueError(f"no term of the sum has the whole kernel of size {size}")
            for free in term.terms:
                if kernel_size(free) != size or not names(free):
                    continue
                others = [self._affine(t) for t in term.terms if t is not free]
                negated = [Affine(-other.kernel, -other.bias) for other in others]
                alone = unbiased and not any(_has_bias(t) for t in term.terms if t is not free)
                try:
                    return self.solve(free, parallel([target, *negated]), unbiased=alone)
                except ValueError as reason:
                    error = reason
            raise error
        raise ValueError(f"{type(term).__name__} cannot be solved for")

    def _neutral(self, norm: Norm, shift: Any) -> dict[str, Any]:
        """Parameters with which a norm adds `shift` and does nothing else."""
        mean, var = (widened(self.stats[norm.name][leaf]) for leaf in ("mean", "var"))
        xp = namespace(var)  # not always that of the shift, which may be traced
        return {"scale": xp.sqrt(var + self.epsilon), "bias": shift + mean}

    def _affine(self, term: Linear) -> Affine:
        geometry = dataclasses.replace(self.geometry, same_shape=False)
        return affine(term, geometry, self.params, self.stats, epsilon=self.epsilon)


def _is_free(term: Linear) -> TypeGuard[Conv]:
    """Whether it is a convolution whose kernel can be any kernel."""
    return isinstance(term, Conv) and term.dilation == 1 and not term.unit


def _has_bias(term: Linear) -> bool:
    """Whether there is anything in it that adds to its input."""
    return any(
        isinstance(part, Norm) or (isinstance(part, (Conv, Scale)) and part.bias)
        for part in walk(term)
    )


def _astype(leaves_: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    return {name: leaf.astype(like[name].dtype) for name, leaf in leaves_.items()}


def _merge(like: Tree, deployed: Tree) -> Tree:
    """The statistics of `like`, except those that the deploy-form tree still has."""
    if not is_container(like):
        return deployed
    theirs = dict(children_of(deployed))
    children = {
        key: _merge(child, theirs[key]) if key in theirs else child
        for key, child in children_of(like)
    }
    return rebuild(like, children)
