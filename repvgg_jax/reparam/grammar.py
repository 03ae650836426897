"""What a RepVGG block looks like in a tree of parameters, and how to say what is wrong.

A block is a mapping with one child per piece of its branches (see `repvgg_jax.block`);
running statistics live in a parallel tree under the same names.
"""

from collections.abc import Mapping
from typing import Any

from repvgg_jax.reparam.algebra import Affine, Array, identity_kernel, normalise

Tree = Any
Path = tuple[Any, ...]

BRANCHES: tuple[tuple[str, ...], ...] = (
    ("conv3x3", "bn3x3"),
    ("conv1x1", "bn1x1"),
    ("bn_identity",),
)
"""The sum of branches; a chain without a convolution starts from the identity."""

FUSED = "reparam"
"""The child that replaces all branches in deploy form: `kernel` and `bias`."""

KEPT = frozenset({"se"})
"""Children of a block that both forms have."""

PIECES = frozenset(piece for chain in BRANCHES for piece in chain)
NORMS = frozenset(chain[-1] for chain in BRANCHES)
OPTIONAL = frozenset({"bn_identity"})


def is_train_block(node: Tree) -> bool:
    """Whether this is meant as a three-branch block, whole or damaged."""
    if not isinstance(node, Mapping):
        return False
    pieces = PIECES & node.keys()
    return len(pieces) >= 2 and not pieces.isdisjoint(NORMS)


def is_deploy_block(node: Tree, path: Path = ()) -> bool:
    """Whether this is a fused block.

    Raises:
      ValueError: it is half fused.
    """
    if not isinstance(node, Mapping) or FUSED not in node:
        return False
    if mixed := PIECES & node.keys():
        raise ValueError(
            f"{name(path)} holds both {FUSED} and {', '.join(sorted(mixed))}: a block is in "
            "training form or in deploy form; remove one of the two"
        )
    return True


def is_auxiliary_head(key: Any, node: Tree) -> bool:
    """Whether this is an auxiliary classifier, which exists in training only."""
    return (
        str(key).startswith("aux_")
        and isinstance(node, Mapping)
        and node.keys() == {"conv", "bn", "logits"}
    )


def branches(params: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The chains that this block has."""
    return [chain for chain in BRANCHES if chain[-1] in params]


def branch(
    chain: tuple[str, ...],
    params: Mapping[str, Any],
    stats: Mapping[str, Any],
    epsilon: float,
) -> Affine:
    """One branch of a block as a single map."""
    *conv, norm = chain
    first_kernel = params[BRANCHES[0][0]]["kernel"]
    if conv:
        kernel: Array = params[conv[0]]["kernel"]
    else:
        *_, in_per_group, channels = first_kernel.shape
        kernel = identity_kernel(channels, in_per_group, first_kernel.dtype)
    return normalise(kernel, {**params[norm], **stats[norm]}, epsilon)


def check_train_block(params: Mapping[str, Any], stats: Any, path: Path) -> None:
    """Checks a three-branch block, every leaf by name and shape.

    Raises:
      ValueError: with the block's path and the first thing that is wrong.
    """
    where = name(path)
    if not stats:
        raise ValueError(
            f"{where} has no running statistics: 'batch_stats' is needed beside 'params'; "
            "model.init gives both, and training updates both"
        )
    norms = NORMS & params.keys()
    absent = sorted(PIECES - OPTIONAL - params.keys())
    absent += [f"{norm} in batch_stats" for norm in sorted(norms - stats.keys())]
    extra = sorted(params.keys() - PIECES - KEPT)
    extra += [f"{norm} in batch_stats" for norm in sorted(stats.keys() - norms)]
    if absent or extra:
        raise ValueError(
            f"{where} is not a whole RepVGG block: missing [{', '.join(absent)}], "
            f"unexpected [{', '.join(extra)}]"
        )
    shape: tuple[int, ...] = getattr(params["conv3x3"].get("kernel"), "shape", ())
    if len(shape) < 4 or shape[-4:-2] != (3, 3):
        raise ValueError(f"{where}/conv3x3/kernel: shape {shape}, expected (…, 3, 3, in, out)")
    *lead, _, _, in_per_group, channels = shape
    expected: dict[str, dict[str, tuple[int, ...]]] = {
        "conv3x3": {"kernel": shape},
        "conv1x1": {"kernel": (*lead, 1, 1, in_per_group, channels)},
    }
    for norm in sorted(norms):
        expected[norm] = dict.fromkeys(("scale", "bias", "mean", "var"), (*lead, channels))
    for piece, leaves in expected.items():
        check_leaves({**params[piece], **stats.get(piece, {})}, leaves, f"{where}/{piece}")
    if "bn_identity" in params and channels % in_per_group:
        raise ValueError(
            f"{where}: an identity branch needs as many channels in as out, but {in_per_group} "
            f"channels a group do not divide {channels}"
        )


def check_leaves(found: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> None:
    """Raises ValueError unless `found` has the expected leaf names and shapes."""
    if found.keys() != expected.keys():
        raise ValueError(
            f"{where} holds [{', '.join(sorted(found))}], expected [{', '.join(sorted(expected))}]"
        )
    for leaf, shape in expected.items():
        if (have := getattr(found[leaf], "shape", None)) != shape:
            raise ValueError(f"{where}/{leaf}: shape {have}, expected {shape}")


def name(path: Path) -> str:
    """A path as people write it."""
    return "/".join(str(part) for part in path) or "the tree"


def summary(node: Tree) -> str:
    """What a tree looks like from above, for messages."""
    if not isinstance(node, Mapping):
        return f"a {type(node).__name__}"
    keys = [str(key) for key in node]
    return f"a mapping with [{', '.join(keys[:6])}{', …' if len(keys) > 6 else ''}]"
