"""`fuse_params`: every block of a tree becomes one convolution."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from repvgg_jax.reparam.algebra import EPSILON, Affine, affine
from repvgg_jax.reparam.blocks import BUILT_IN, BlockSpec
from repvgg_jax.reparam.containers import (
    Tree,
    boxed_like,
    children_of,
    copies_of_params,
    rebuild,
    unboxed,
    variables_in,
)
from repvgg_jax.reparam.linear import Geometry, names, walk, without_initial
from repvgg_jax.reparam.terms import Filter, Linear
from repvgg_jax.reparam.tree import (
    Path,
    Walk,
    check_block,
    is_auxiliary_head,
    is_merged,
    path_name,
    with_statistics,
)
from repvgg_jax.text import plural


def fuse_params(
    variables: Tree,
    *,
    blocks: Sequence[BlockSpec] = BUILT_IN,
    expect: int | None = None,
    exclude: Sequence[str] = (),
    epsilon: float = EPSILON,
    geometries: Mapping[str, Geometry] | None = None,
) -> Tree:
    """Turns every training-form block of a tree into its deploy form, one convolution.

    Wherever the tree contains `{"params": …, "batch_stats": …}`, at its top or anywhere inside,
    each mapping whose children are exactly those of a block becomes `{"reparam": {"kernel",
    "bias"}}` and loses its running statistics. Auxiliary heads (`aux_` and the name of
    a block or backbone beside it) are dropped, since only training uses them. Everything else is
    returned as it is, the very same arrays. Blocks that are in deploy form already stay.

    Copies of the parameters beside `params`, e.g. `ema_params`, are fused, too, with
    `ema_batch_stats` where that exists, else with `batch_stats`. The optimizer's state stays.

    Pure, and usable under `jax.jit`, `jax.vmap`, `jax.grad` and on sharded arrays, which stay
    sharded. NumPy arrays are folded in float64 and rounded once, JAX arrays in at least float32.

    Args:
      variables: a network's variables, or any nest of mappings, lists, tuples and dataclasses
        with such inside: a TrainState with these fields, a `FrozenDict`. Also a `flax.nnx.State`,
        which has the running statistics beside the parameters. Boxes such as
        `flax.linen.Partitioned` are kept, and so are leading axes of the leaves (an ensemble, a
        scan over layers). `jax.ShapeDtypeStruct` leaves give such leaves.
      blocks: what to look for; by default `BUILT_IN`, the blocks that their children identify.
      expect: how many blocks there must be, in either form; None for at least one.
      exclude: paths that are left alone with everything inside, e.g. `"neck"` or
        `"decoder/*"` (`fnmatch` patterns), for mappings that only look like a block; each must
        name something.
      epsilon: of batch normalization.
      geometries: shapes of blocks by their own name, the last part of their path; of others
        they are read off the parameters. Needed for blocks whose parameters do not show
        whether they have an identity.

    Returns:
      The same tree in deploy form. `batch_stats` is left out if nothing remains in it, or empty
      where it is a field of a dataclass.

    Raises:
      ValueError: no block or not as many as expected, no running statistics, a block whose
        leaves have other names or shapes or are no real numbers, or (for concrete values) a
        negative variance or float16 values that overflow; or an option that cannot be.
    """
    fusing = _Fusing(blocks, exclude, epsilon, geometries or {})
    fused = fusing.outside_params(variables, ())
    fusing.check(expect)
    return fused


def fuse_block(
    spec: BlockSpec,
    params: Mapping[str, Any],
    stats: Any,
    *,
    geometry: Geometry | None = None,
    epsilon: float = EPSILON,
    path: Path = (),
) -> dict[str, Any]:
    """One block in deploy form.

    Args:
      spec: the block.
      params: its parameters by child name.
      stats: its running statistics by child name.
      geometry: its shapes; None to read them off the parameters.
      epsilon: of batch normalization.
      path: where it is, for messages.

    Raises:
      ValueError: leaves of other names or shapes than the block has, or NumPy variances that
        cannot be variances. Those in JAX arrays are left to the caller: `check_variances`.
    """
    if spec.obstacle:
        raise ValueError(f"{path_name(path)} is a {spec.name} block, not fusable: {spec.obstacle}")
    boxes, params, stats = params, unboxed(params), unboxed(stats)
    geometry = check_block(spec, params, stats, geometry=geometry, path=path)
    for norm, leaf in (stats or {}).items():
        if isinstance(leaf["var"], np.ndarray):  # before its square root is taken
            _check_variance(path_name((*path, norm)), leaf["var"])
    own = {name: params[name] for name in sorted(names(spec.train)) if name in params}
    kernels = [child["kernel"] for child in own.values() if "kernel" in child]
    dtype = np.result_type(*[leaf.dtype for leaf in kernels or jax.tree.leaves(own)])

    fold = functools.partial(
        _fold, train=spec.train, geometry=geometry, epsilon=epsilon, dtype=dtype
    )
    leaves = jax.tree.leaves((own, stats))
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        fold = functools.partial(jax.eval_shape, fold)
    elif _can_be_compiled(leaves, spec.train, epsilon):
        # One program per shape of a block; otherwise each operation would be compiled.
        same = geometry.has_same_shape
        fold = functools.partial(
            _fold_compiled,
            train=without_initial(spec.train),
            geometry=dataclasses.replace(geometry, stride=1, dilation=1, same_shape=same),
            epsilon=epsilon,
            dtype=dtype,
        )
    fused = fold(own, stats or {})._asdict()
    if dtype == np.float16:
        _check_range(path_name((*path, spec.deploy)), fused)
    kept = {key: child for key, child in boxes.items() if key in spec.keep}
    return {spec.deploy: _boxed(fused, {name: boxes[name] for name in own}), **kept}


def _fold(
    own: Any, moments: Any, *, train: Linear, geometry: Geometry, epsilon: float, dtype: np.dtype
) -> Affine:
    """The kernel and bias of an expression, from its parameters and running statistics."""
    kernel, bias = affine(train, geometry, own, moments, epsilon=epsilon)
    with np.errstate(over="ignore"):  # `fuse_block` checks it
        return Affine(kernel.astype(dtype), bias.astype(dtype))


_fold_compiled = jax.jit(_fold, static_argnames=("train", "geometry", "epsilon", "dtype"))


def _can_be_compiled(leaves: Sequence[Any], train: Linear, epsilon: Any) -> bool:
    """Whether `_fold_compiled` gives what `_fold` gives, sooner.

    All leaves have to be arrays of JAX with values, on one device each: a compiler would choose
    another sharding. Everything else has to be constant, and to say whether it is the same.
    """
    if not all(
        isinstance(leaf, jax.Array)
        and not isinstance(leaf, jax.core.Tracer)
        and len(leaf.sharding.device_set) == 1
        for leaf in leaves
    ):
        return False
    if any(isinstance(term, Filter) and callable(term.taps) for term in walk(train)):
        return False
    try:
        hash((train, epsilon))
    except TypeError:
        return False
    return True


@dataclasses.dataclass
class _Fusing(Walk):
    """One walk over a tree, and what it met."""

    stray: Path | None = None
    deployed_outside: int = 0  # as in a state of Flax NNX, where there is no `params`
    merged: int = 0  # blocks with statistics beside the parameters, as there
    near_misses: list[str] = dataclasses.field(default_factory=list)
    variances: list[tuple[str, Any]] = dataclasses.field(default_factory=list)

    def outside_params(self, node: Tree, path: Path) -> Tree:
        """Finds the variables in a tree of any shape."""
        if collections := variables_in(node):
            return rebuild(node, self.collections(collections, path, isinstance(node, Mapping)))
        if spec := self.train_spec(node, path):
            if is_merged(spec, node):
                self.merged += 1
                return self.inside_params(node, None, path)[0]
            self.stray = self.stray or path
            return node
        if self.deploy_spec(node, path):
            self.deployed_outside += 1
            return node
        children = {
            key: self.outside_params(child, (*path, key))
            for key, child in children_of(node)
            if not self.is_merged_head(key, node, path)
        }
        return rebuild(node, children)

    def collections(
        self, collections: dict[str, Tree], path: Path, may_drop: bool
    ) -> dict[str, Tree]:
        """Fuses `params` and copies of it; statistics of which nothing is left are dropped."""
        fused, before = dict(collections), self.count
        remaining: dict[str, Tree] = {}
        for name, stats_name in copies_of_params(collections):
            where = path if name == "params" else (*path, name)
            start, stats = self.count, collections.get(stats_name)
            fused[name], after = self.inside_params(collections[name], stats, where)
            remaining.setdefault(stats_name, after)
            if name == "params":
                continue
            # A copy of the parameters has the same blocks, which count once.
            found, expected, self.count = self.count - start, start - before, start
            if found not in (0, expected):
                raise ValueError(
                    f"{path_name(where)} has {plural(found, 'block')}, but 'params' beside it has "
                    f"{expected}; a copy of the parameters must have the same"
                )
        for name, after in remaining.items():
            if after is None or _emptied(collections[name], after):
                fused.pop(name, None)
                if name in collections and not may_drop:  # a field of a dataclass
                    fused[name] = {} if collections[name] is not None else None
            else:
                fused[name] = after
        return fused

    def is_merged_head(self, key: Any, siblings: Tree, path: Path) -> bool:
        """Whether that child is an auxiliary head with statistics beside its parameters."""
        if not isinstance(siblings, Mapping) or not is_auxiliary_head(siblings[key]):
            return False
        is_merged_norm = {"mean", "var"} <= dict(children_of(siblings[key]["bn"])).keys()
        return is_merged_norm and self.is_auxiliary_head(key, siblings, path)

    def inside_params(self, params: Tree, stats: Tree, path: Path) -> tuple[Tree, Tree]:
        """Fuses the blocks of a parameter tree; returns it and the statistics that remain."""
        if self.deploy_spec(params, path):
            self.count += 1
            return params, stats
        if spec := self.train_spec(params, path):
            self.count += 1
            own, moments = with_statistics(spec, params, stats)
            fused = fuse_block(
                spec,
                own,
                moments,
                geometry=self.geometry(path),
                epsilon=self.epsilon,
                path=path,
            )
            self.variances += [
                (path_name((*path, norm)), leaf["var"])
                for norm, leaf in unboxed(moments or {}).items()
                if not isinstance(leaf["var"], np.ndarray)  # those `fuse_block` has checked
            ]
            return rebuild(params, fused), None if stats is None else {}
        self.note_near_miss(params, path)

        children = dict(children_of(params))
        fused, remaining = {}, dict(children_of(stats))
        for key, child in children.items():
            before = remaining.pop(key, None)
            if isinstance(params, Mapping) and self.is_auxiliary_head(key, params, path):
                continue
            fused[key], after = self.inside_params(child, before, (*path, key))
            if after is not None and not (isinstance(stats, Mapping) and _emptied(before, after)):
                remaining[key] = after  # in lists also where nothing is left: places must not move
        if stats and not isinstance(stats, Mapping) and all(map(_is_empty, remaining.values())):
            return rebuild(params, fused), ()
        return rebuild(params, fused), rebuild(stats, remaining)

    def note_near_miss(self, node: Tree, path: Path) -> None:
        """Remembers what has most of a block's children, to be named if blocks are missing."""
        if not isinstance(node, Mapping) or self.excluded(path):
            return
        for spec in self.blocks:
            have = node.keys() & (spec.required | spec.optional)
            if len(have) >= 2 and 2 * len(have) > len(spec.required):
                missing = sorted(spec.required - node.keys())
                extra = sorted(str(k) for k in node.keys() - have - spec.keep)
                self.near_misses.append(
                    f"{path_name(path)} is not a {spec.name} block: missing "
                    f"[{', '.join(missing)}], unexpected [{', '.join(extra)}]"
                )
                return

    def check(self, expect: int | None) -> None:
        """Raises for too few or too many blocks, or a variance that cannot be one."""
        if self.stray is None and (self.merged or not self.count):
            self.count += self.deployed_outside
        if not self.count and self.stray is not None:
            raise ValueError(
                f"{path_name(self.stray)} is a block outside any 'params': give the whole "
                "variables, {'params': …, 'batch_stats': …}, not the parameters alone"
            )
        known = ", ".join(spec.name for spec in self.blocks)
        if expect is not None and self.count != expect:
            raise ValueError(
                f"found {plural(self.count, 'block')} of the {expect} that were expected"
                + "".join(f"; {text}" for text in self.near_misses[:3])
                + f"; these blocks were looked for: {known}; give others as "
                "blocks=(*BUILT_IN, spec)"
            )
        if not self.count:
            near = f"; {self.near_misses[0]}" if self.near_misses else ""
            raise ValueError(
                "there is no block to fuse in this tree: expected {'params': …, 'batch_stats': …} "
                f"with mappings that have exactly the children of a block ({known}){near}; for "
                "blocks of your own give blocks=(spec,), or the model to fuse_model"
            )
        self.check_exclude()
        check_variances(self.variances)


def _boxed(fused: dict[str, Any], own: Mapping[str, Any]) -> Tree:
    """A deploy-form kernel and bias in a container and boxes like those of the largest kernel."""
    children = sorted(
        own.values(), key=lambda c: unboxed(c["kernel"]).shape[-4:-2] if "kernel" in c else ()
    )
    like = children[-1]
    vectors = [child[leaf] for leaf in ("bias", "scale") for child in children if leaf in child]
    boxes = {"kernel": like.get("kernel"), "bias": next(iter(vectors), None)}
    return rebuild(like, {leaf: boxed_like(boxes[leaf], fused[leaf]) for leaf in fused})


def check_variances(variances: Sequence[tuple[str, Any]]) -> None:
    """Raises ValueError if a variance, given with its name, is known and cannot be one."""
    # Values are known only outside of traces, and on this process. They are fetched
    # together: one transfer for the whole network, not one per block.
    known_values = [(name, var) for name, var in variances if _is_known(var)]
    fetched = jax.device_get([var for _, var in known_values])
    for (name, _), var in zip(known_values, fetched, strict=True):
        _check_variance(name, var)


def _check_variance(name: str, var: np.ndarray) -> None:
    if not (np.isfinite(var) & (var >= 0)).all():
        raise ValueError(
            f"{name}/var: a running variance is finite and not negative, but this one ranges from "
            f"{float(np.min(var)):g} to {float(np.max(var)):g}; the statistics are damaged or "
            "training diverged"
        )


def _check_range(name: str, fused: Mapping[str, Any]) -> None:
    """Raises ValueError if known float16 values have become infinite."""
    for leaf, array in fused.items():
        if _is_known(array) and not np.isfinite(jax.device_get(array)).all():
            raise ValueError(
                f"{name}/{leaf}: the fused values do not fit float16, which ends at 65504; fuse "
                "in float32, jax.tree.map(lambda x: x.astype('float32'), variables), or bfloat16"
            )


def _is_known(array: Any) -> bool:
    """Whether the values can be read here and now."""
    if isinstance(array, (jax.core.Tracer, jax.ShapeDtypeStruct)):
        return False
    return not isinstance(array, jax.Array) or array.is_fully_addressable


def _emptied(before: Tree, after: Tree) -> bool:
    """Whether nothing is left of what was there."""
    return bool(before) and _is_empty(after)


def _is_empty(node: Tree) -> bool:
    return isinstance(node, (Mapping, list, tuple)) and len(node) == 0
