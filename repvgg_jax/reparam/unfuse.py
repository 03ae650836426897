"""`unfuse_params`: one convolution becomes the branches of a block again."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from repvgg_jax.reparam.algebra import EPSILON, Affine, affine, parallel, widened
from repvgg_jax.reparam.blocks import BUILT_IN, BlockSpec
from repvgg_jax.reparam.linear import (
    Chain,
    Conv,
    Geometry,
    Linear,
    Norm,
    Sum,
    kernel_size,
    names,
    present,
)
from repvgg_jax.reparam.tree import (
    Path,
    Tree,
    Walk,
    check_block,
    check_leaves,
    children_of,
    leading_axes,
    path_name,
    rebuild,
    summary,
)


def unfuse_params(
    deployed: Tree,
    *,
    like: Tree,
    blocks: Sequence[BlockSpec] = BUILT_IN,
    exclude: Sequence[str] = (),
    epsilon: float = EPSILON,
) -> Tree:
    """Turns a deploy-form tree into a trainable one that computes the same function.

    A kernel can be split over several branches in many ways. Here all branches but one are those
    of `like`; the one with the largest kernel takes the rest, with its norm set to multiply by
    one. This is always solvable and never divides by a small scale. `fuse_params` of the result
    is `deployed` up to rounding.

    The two functions are equal in evaluation, that is with running statistics, which are those
    of `like`. Training normalizes by the statistics of its batches instead, so the first steps
    change the function; start with a warm-up.

    Args:
      deployed: the variables of a deploy-form network.
      like: the variables of the same network in training form, e.g. from `init`. Auxiliary
        heads, which a deploy-form tree lacks, come from here.
      blocks: as in `fuse_params`.
      exclude: as in `fuse_params`.
      epsilon: of batch normalization.

    Returns:
      `{"params": …, "batch_stats": …}` with the names and shapes of `like`.

    Raises:
      ValueError: the two trees are not two forms of one network, with the first difference, or
        a block has no inverse.
    """
    for what, tree in (("deployed", deployed), ("like", like)):
        if not isinstance(tree, Mapping) or not isinstance(tree.get("params"), Mapping):
            raise ValueError(
                f"unfuse_params: `{what}` must be variables, {{'params': …}}, not {summary(tree)}"
            )
    unfusing = _Unfusing(tuple(blocks), tuple(exclude), epsilon)
    params = unfusing.node(like["params"], like.get("batch_stats"), deployed["params"], ())
    if not unfusing.count:
        raise ValueError(
            "unfuse_params: `like` contains no training-form block; give the variables of the "
            "training form, create_model(…).init(…)"
        )
    stats = _merge(like.get("batch_stats", {}), deployed.get("batch_stats", {}))
    return {**deployed, "params": params, "batch_stats": stats}


class _Unfusing(Walk):
    """One walk over two trees."""

    def node(self, like: Tree, stats: Tree, deployed: Tree, path: Path) -> Tree:
        where = path_name(path)
        if spec := self.train_spec(like, path):
            self.count += 1
            geometry = check_block(spec, like, stats, path=path)
            if not self.deploy_spec(deployed, path):
                raise ValueError(
                    f"{where}: expected a deploy-form block with {spec.deploy} in `deployed`, "
                    f"found {summary(deployed)}"
                )
            return self.block(spec, geometry, like, stats, deployed, where)
        if not isinstance(like, (Mapping, list, tuple)):
            check_leaves({where: deployed}, {where: getattr(like, "shape", None)}, "`deployed`")
            return deployed
        if isinstance(deployed, Mapping) != isinstance(like, Mapping) or not isinstance(
            deployed, (Mapping, list, tuple)
        ):
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
            else child
            for key, child in ours.items()
        }
        return children if isinstance(like, Mapping) else rebuild(like, children)

    def block(
        self,
        spec: BlockSpec,
        geometry: Geometry,
        like: Mapping[str, Any],
        stats: Mapping[str, Any],
        deployed: Mapping[str, Any],
        where: str,
    ) -> dict[str, Any]:
        target = deployed[spec.deploy]
        lead = leading_axes(spec.train, like)
        in_per_group = geometry.in_channels // geometry.groups
        shape = (*lead, *spec.kernel_size(geometry), in_per_group, geometry.features)
        expected = {"kernel": shape, "bias": (*lead, geometry.features)}
        check_leaves(target, expected, f"{where}/{spec.deploy}")
        wide = Affine(*(widened(target[leaf]) for leaf in ("kernel", "bias")))
        train = present(spec.train, geometry.has_same_shape)
        assert train is not None, "check_block has resolved it"
        inverse = _Inverse(geometry, like, stats, self.epsilon)
        try:
            changed = inverse.solve(train, wide)
        except ValueError as error:
            raise ValueError(f"{where}: a {spec.name} block has no inverse: {error}") from error
        return {
            **like,
            **{n: {**like[n], **_astype(leaves_, like[n])} for n, leaves_ in changed.items()},
            **{key: deployed[key] for key in deployed if key in spec.keep},
        }


@dataclasses.dataclass
class _Inverse:
    """Parameters for which an expression computes a given map."""

    geometry: Geometry
    params: Mapping[str, Any]
    stats: Mapping[str, Any]
    epsilon: float

    def solve(self, term: Linear, target: Affine) -> dict[str, dict[str, Any]]:
        """Parameters that change, by child name; the others stay."""
        if isinstance(term, Conv) and term.dilation == 1:
            if term.bias:
                return {term.name: {"kernel": target.kernel, "bias": target.bias}}
            raise ValueError(f"{term.name} has neither a bias nor a norm")
        if isinstance(term, Chain) and isinstance(term.terms[-1], Norm):
            norm = term.terms[-1].name
            mean, var = (widened(self.stats[norm][leaf]) for leaf in ("mean", "var"))
            xp = np if isinstance(var, np.ndarray) else jnp
            neutral = {"scale": xp.sqrt(var + self.epsilon), "bias": target.bias + mean}
            rest = term.terms[:-1]
            if len(rest) != 1:
                raise ValueError("only a single term before a norm can be solved for")
            if isinstance(rest[0], Conv) and rest[0].dilation == 1 and not rest[0].bias:
                return {rest[0].name: {"kernel": target.kernel}, norm: neutral}
            inner = self.solve(rest[0], Affine(target.kernel, xp.zeros_like(target.bias)))
            return {**inner, norm: neutral}
        if isinstance(term, Sum):
            size = target.kernel.shape[-4:-2]
            error = ValueError(f"no term of the sum has the whole kernel of size {size}")
            for free in term.terms:
                if kernel_size(free) != size or not names(free):
                    continue
                others = [self._affine(t) for t in term.terms if t is not free]
                negated = [Affine(-other.kernel, -other.bias) for other in others]
                try:
                    return self.solve(free, parallel([target, *negated]))
                except ValueError as reason:
                    error = reason
            raise error
        raise ValueError(f"{type(term).__name__} cannot be solved for")

    def _affine(self, term: Linear) -> Affine:
        geometry = dataclasses.replace(self.geometry, same_shape=False)
        return affine(term, geometry, self.params, self.stats, epsilon=self.epsilon)


def _astype(leaves_: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    return {name: leaf.astype(like[name].dtype) for name, leaf in leaves_.items()}


def _merge(like: Tree, deployed: Tree) -> Tree:
    """The statistics of `like`, except those that the deploy-form tree still has."""
    if not isinstance(like, (Mapping, list, tuple)):
        return deployed
    theirs = dict(children_of(deployed))
    children = {
        key: _merge(child, theirs[key]) if key in theirs else child
        for key, child in children_of(like)
    }
    return children if isinstance(like, Mapping) else rebuild(like, children)
