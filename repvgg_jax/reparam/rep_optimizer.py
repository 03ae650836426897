"""Re-parameterization of the optimizer instead of the network (RepOptimizers, ICLR 2023).

Training the kernels of several branches, each behind a constant scale, is training their sum
with another gradient: if K = s3 K3 + pad(s1 K1), one step of SGD on K3 and K1 changes K by the
gradient of K times s3^2 + pad(s1^2). So a plain network with that multiplier on its gradients
trains exactly as the branched one does, and needs no conversion. The scales come from training
the branched network with trainable scales on a small task:

    found = extract_scales(repopt_search(), searched["params"])
    params = rep_init(repopt_search(), found, params, key)
    optimizer = rep_optimizer(repopt_search(), found, optax.sgd(0.1, momentum=0.9))
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from repvgg_jax.reparam.algebra import Affine, affine, dilated, identity_kernel, parallel
from repvgg_jax.reparam.blocks import BlockSpec
from repvgg_jax.reparam.containers import Tree, boxed_like, children_of, rebuild, unboxed
from repvgg_jax.reparam.family import REPOPT
from repvgg_jax.reparam.linear import Geometry, leaves, names, present, walk
from repvgg_jax.reparam.terms import Chain, Conv, Identity, Linear, Norm, Scale, Sum
from repvgg_jax.reparam.tree import Path, matching_block, path_name
from repvgg_jax.text import first_few

if TYPE_CHECKING:
    import optax

Scales = Any
"""A tree of parameters with nothing but the scales of its blocks, as `extract_scales` gives it."""


def extract_scales(spec: BlockSpec, params: Tree) -> Scales:
    """The scales of every block of a network trained to find them.

    Args:
      spec: its block, e.g. `repopt_search()`; initial values make no difference.
      params: its parameters.

    Returns:
      A tree of the same mappings with the scales alone, for `rep_optimizer` and `rep_init`.

    Raises:
      ValueError: no such block in the tree.
    """
    wanted = {term.name for term in walk(spec.train) if isinstance(term, Scale) and term.name}

    def extract(node: Tree) -> Tree:
        if matching_block(node, (spec,)):
            return {name: dict(node[name]) for name in sorted(wanted & node.keys())}
        found = {key: extract(child) for key, child in children_of(node)}
        return {key: child for key, child in found.items() if child}

    scales = extract(params)
    if not scales:
        raise ValueError(f"there is no {spec.name} block in these parameters to take scales from")
    return scales


def rep_optimizer(
    spec: BlockSpec,
    scales: Scales,
    optimizer: "optax.GradientTransformation | None" = None,
    *,
    rule: Literal["sgd", "adamw"] = "sgd",
    target: BlockSpec = REPOPT,
) -> "optax.GradientTransformation":
    """Trains plain blocks as if they had the branches of `spec`, with constant scales.

    Weight decay and momentum belong behind the multiplication of the gradients, that is into
    `optimizer`. There, every kernel decays as the branches would. A scale of the input itself, as
    in the identity branch, counts as trained; an `Identity` is constant.

    Args:
      spec: the branches: a sum of convolutions, each behind scales, and a norm behind the sum.
      scales: of every block, from `extract_scales`.
      optimizer: what follows. For "sgd" anything linear in the gradients, e.g.
        `optax.chain(optax.add_decayed_weights(4e-5), optax.sgd(0.1, momentum=0.9))`. For "adamw"
        the direction alone, `optax.scale_by_adam()`: add decoupled weight decay and the learning
        rate behind the result.
      rule: "sgd" multiplies gradients by squares of scales; "adamw" gradients and directions by
        the scales, as the authors do.
      target: the block that trains.

    Returns:
      A gradient transformation for the parameters of the network of `target` blocks; other
      parameters keep their gradients. Boxes such as `flax.linen.Partitioned` are kept.

    Raises:
      ValueError: `optimizer` clips gradients, which would differ between the two networks; or
        `spec` is of another kind. When it is initialized: scales of another network, or that
        are not finite.
    """
    import optax

    if rule not in ("sgd", "adamw"):
        raise ValueError(f"rule={rule!r} must be 'sgd' or 'adamw'")
    if optimizer is not None and not isinstance(optimizer, optax.GradientTransformation):
        raise ValueError(
            f"rep_optimizer takes an optax.GradientTransformation, got {optimizer!r:.60}; of "
            "optax.MultiSteps give .gradient_transformation()"
        )
    clipping = None if optimizer is None else _clipping(optimizer)
    if optimizer is not None and clipping is None and rule == "sgd" and not _is_linear(optimizer):
        clipping = "an optimizer that is not linear in the gradients"
    if clipping:
        raise ValueError(
            f"rep_optimizer with {clipping}: clipped gradients of one kernel are not those of its "
            "branches, so the network would train in another way; leave the clipping out"
        )
    _check_spec(spec)
    power = 2 if rule == "sgd" else 1

    def init(params: Tree) -> optax.EmptyState:
        for _ in _pairs(params, scales, spec, target):  # checks all of them
            pass
        return optax.EmptyState()

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        found = {
            path: _multiplier(spec, own, kernel, power)
            for path, kernel, own in _pairs(updates, scales, spec, target)
        }
        conv = _kernel_name(target)

        def multiply(node: Tree, path: Path) -> Tree:
            if path in found:
                kernel = unboxed(node[conv]["kernel"])
                scaled = kernel * jnp.asarray(found[path], kernel.dtype)
                return _with_kernel(node, conv, scaled)
            children = {key: multiply(child, (*path, key)) for key, child in children_of(node)}
            return rebuild(node, children) if children else node

        return multiply(updates, ()), state

    multiplied = optax.GradientTransformation(init, update)
    if optimizer is None:
        return multiplied
    return optax.chain(multiplied, optimizer, *([multiplied] if rule == "adamw" else []))


def rep_init(
    spec: BlockSpec,
    scales: Scales,
    params: Tree,
    key: jax.Array,
    *,
    target: BlockSpec = REPOPT,
) -> Tree:
    """Initial parameters of the plain network: kernels as the branches would give them.

    The kernel that is there stands for that of the largest branch; those of the others are drawn
    anew from PyTorch's default distribution, and all are multiplied by the scales and added.

    Args:
      spec: as in `rep_optimizer`.
      scales: as in `rep_optimizer`.
      params: freshly initialized parameters of the network of `target` blocks.
      key: of the kernels that are drawn.
      target: as in `rep_optimizer`.

    Returns:
      The parameters with other kernels; boxes are kept.

    Raises:
      ValueError: scales of another network.
    """
    _check_spec(spec)
    pairs = list(_pairs(params, scales, spec, target))
    # Sorted by name, because `jax.jit` reorders the keys of mappings.
    order = sorted((path for path, *_ in pairs), key=path_name)
    keys = dict(zip(order, jax.random.split(key, len(pairs)), strict=True))
    found = {path: _initial(spec, own, kernel, keys[path]) for path, kernel, own in pairs}
    conv = _kernel_name(target)

    def replace(node: Tree, path: Path) -> Tree:
        if path in found:
            return _with_kernel(node, conv, found[path])
        children = {key: replace(child, (*path, key)) for key, child in children_of(node)}
        return rebuild(node, children) if children else node

    return replace(params, ())


def _inner(spec: BlockSpec, same_shape: bool) -> Linear:
    """The sum of the branches, without the norm behind it."""
    term = present(spec.train, same_shape)
    if isinstance(term, Chain) and len(term.terms) == 2 and isinstance(term.terms[1], Norm):
        term = term.terms[0]
    assert term is not None, "checked by _check_spec"
    return term


def _check_spec(spec: BlockSpec) -> None:
    inner = _inner(spec, same_shape=True)
    for branch in inner.terms if isinstance(inner, Sum) else (inner,):
        parts = branch.terms if isinstance(branch, Chain) else (branch,)
        first, *scales = parts
        plain = isinstance(first, Conv) and not first.bias and not first.unit
        if not (plain or isinstance(first, (Scale, Identity))) or not all(
            isinstance(part, Scale) and not part.bias for part in scales
        ):
            raise ValueError(
                f"rep_optimizer: {branch} of block {spec.name} is not a convolution or the input "
                "behind constant scales; norms belong behind the sum"
            )


def _kernel_name(target: BlockSpec) -> str:
    return next(term.name for term in walk(target.train) if isinstance(term, Conv))


def _with_kernel(block: Mapping[str, Any], conv: str, kernel: Any) -> Tree:
    """A block with another kernel, in a box like that of the old one."""
    boxed = boxed_like(block[conv]["kernel"], kernel)
    return {**block, conv: {**block[conv], "kernel": boxed}}


def _pairs(
    params: Tree, scales: Scales, spec: BlockSpec, target: BlockSpec
) -> Iterator[tuple[Path, Any, Mapping[str, Any]]]:
    """Every block's path, kernel and scales, without boxes.

    Raises:
      ValueError: the scales are not those of this network.
    """
    conv = _kernel_name(target)
    blocks: dict[Path, Any] = {}

    def find(node: Tree, path: Path) -> None:
        if matching_block(node, (target,)):
            blocks[path] = unboxed(node[conv]["kernel"])
            return
        for key, child in children_of(node):
            find(child, (*path, key))

    find(params, ())
    given: dict[Path, Mapping[str, Any]] = {}
    known = names(spec.train)

    def collect(node: Tree, path: Path) -> None:
        if isinstance(node, Mapping) and node.keys() & known:
            given[path] = unboxed(node)
            return
        for key, child in children_of(node):
            collect(child, (*path, key))

    collect(scales, ())
    if blocks.keys() != given.keys():
        absent = [path_name(path) for path in blocks if path not in given]
        extra = [path_name(path) for path in given if path not in blocks]
        raise ValueError(
            f"scales of another network: {len(given)} blocks have scales and the network has "
            f"{len(blocks)}; no scales for [{first_few(absent)}], no block for [{first_few(extra)}]"
        )
    for path, kernel in blocks.items():
        geometry = _geometry(spec, given[path], kernel)
        expected = {
            leaf.name: leaf.shape
            for leaf in leaves(_inner(spec, geometry.has_same_shape), geometry)
            if leaf.leaf == "scale"
        }
        found: dict[str, Any] = {
            name: child.get("scale") if isinstance(child, Mapping) else None
            for name, child in given[path].items()
        }
        shapes = {name: np.shape(scale) for name, scale in found.items()}
        per_group, features = kernel.shape[-2:]
        if shapes != expected or (geometry.has_same_shape and features % per_group):
            raise ValueError(
                f"scales of another network: {path_name(path)} has {shapes}, expected {expected} "
                f"for a kernel of {per_group} -> {features} channels"
            )
        for name, scale in found.items():
            if not jnp.issubdtype(scale.dtype, jnp.floating) or not np.isfinite(scale).all():
                raise ValueError(
                    f"scales of {path_name(path)}: {name} must hold finite numbers, has "
                    f"{scale.dtype} {first_few(map(str, np.unique(scale)), 3)}"
                )
        yield path, kernel, given[path]


def _geometry(spec: BlockSpec, scales: Mapping[str, Any], kernel: Any) -> Geometry:
    """Shapes of a block with that kernel and these scales."""
    per_group, features = kernel.shape[-2:]
    optional = names(spec.train, optional=True)
    if optional and optional <= scales.keys():
        groups = features // per_group
        return Geometry(features, features, groups=groups, same_shape=True)
    return Geometry(per_group, features, same_shape=False)


def _multiplier(spec: BlockSpec, scales: Mapping[str, Any], kernel: Any, power: int) -> np.ndarray:
    """What the gradient of a kernel is multiplied by, in the kernel's shape."""
    geometry = _geometry(spec, scales, kernel)
    per_group, features = kernel.shape[-2:]
    inner = _inner(spec, geometry.has_same_shape)
    maps = []
    for branch in inner.terms if isinstance(inner, Sum) else (inner,):
        first, *rest = branch.terms if isinstance(branch, Chain) else (branch,)
        if isinstance(first, Conv):
            taps = np.ones((*first.kernel_size, per_group, features))
            own = dilated(taps, first.dilation)
        else:
            # A scale of the input is trained itself, a constant input has no gradient.
            own = identity_kernel(features, per_group, np.float64)
            own = own * (abs(first.factor) ** power if isinstance(first, Scale) else 0)
        for scale in rest:
            assert isinstance(scale, Scale), "checked by _check_spec"
            value = np.asarray(scales[scale.name]["scale"], np.float64) if scale.name else 1.0
            own = own * np.abs(value * scale.factor) ** power
        maps.append(Affine(own, np.zeros(features)))
    total = parallel(maps).kernel
    if total.shape != tuple(kernel.shape):
        raise ValueError(f"a kernel of {kernel.shape} cannot have the branches of {spec.name}")
    return np.asarray(total)


def _initial(spec: BlockSpec, scales: Mapping[str, Any], kernel: Any, key: jax.Array) -> Any:
    geometry = _geometry(spec, scales, kernel)
    inner = _inner(spec, geometry.has_same_shape)
    params: dict[str, Any] = {name: dict(child) for name, child in scales.items()}
    free = True
    for leaf in leaves(inner, geometry):
        if leaf.leaf != "kernel":
            continue
        if free and leaf.shape == tuple(kernel.shape):
            params[leaf.name] = {"kernel": kernel}
            free = False
            continue
        key, own = jax.random.split(key)
        bound = float(np.prod(leaf.shape[:-1])) ** -0.5
        drawn = jax.random.uniform(own, leaf.shape, kernel.dtype, -bound, bound)
        params[leaf.name] = {"kernel": drawn}
    return affine(inner, geometry, params, {}).kernel.astype(kernel.dtype)


def _clipping(optimizer: Any) -> str | None:
    """The name of a transformation inside an optimizer that clips gradients.

    Optax keeps what a transformation consists of in closures.
    """
    seen: set[int] = set()

    def search(value: Any) -> str | None:
        if id(value) in seen:
            return None
        seen.add(id(value))
        if getattr(value, "__module__", None) == "optax.transforms._clipping":
            return str(value.__qualname__).partition(".")[0]
        inside: list[Any] = []
        if isinstance(value, (tuple, list)):
            inside = list(value)
        elif isinstance(value, Mapping):
            inside = list(value.values())
        elif callable(value):
            inside = [getattr(value, "func", None), *getattr(value, "args", ())]
            inside += [getattr(value, "__wrapped__", None)]
            for cell in getattr(value, "__closure__", None) or ():
                try:
                    inside.append(cell.cell_contents)
                except ValueError:  # not filled yet
                    continue
        return next((found for part in inside if (found := search(part))), None)

    return search(tuple(optimizer))


def _is_linear(optimizer: Any) -> bool:
    """Whether the first update is proportional to the gradient; True if it cannot be tried."""
    params = {"w": jnp.zeros((2, 2))}
    try:
        with jax.ensure_compile_time_eval():
            small, large = (
                optimizer.update({"w": jnp.full((2, 2), size)}, optimizer.init(params), params)[0][
                    "w"
                ]
                for size in (1.0, 1e6)
            )
            return bool(jnp.allclose(1e6 * small, large, rtol=1e-3))
    except Exception:  # an optimizer made for one tree of parameters
        return True
