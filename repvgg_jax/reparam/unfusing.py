"""`unfuse_params`: one convolution becomes three trainable branches again."""

from collections.abc import Mapping
from typing import Any

from repvgg_jax.reparam import algebra, grammar
from repvgg_jax.reparam.grammar import Path, Tree


def unfuse_params(deployed: Tree, *, like: Tree, epsilon: float = algebra.EPSILON) -> Tree:
    """Turns a deploy tree into a trainable three-branch tree that computes the same function.

    One kernel can be split over three branches in many ways. Here the 1x1 and the identity
    branch are those of `like`, and the 3x3 branch takes the rest, with its batch normalisation
    scaled to multiply by one: always solvable, never a division by a small scale.
    `fuse_params` of the result is `deployed` up to rounding.

    The functions are the same in evaluation, that is with running statistics, which are
    `like`'s. Training normalises by the statistics of its batches instead, so the first steps
    after this move; start with a warm-up.

    Args:
      deployed: the variables of a deploy-form network.
      like: the variables of the same network in training form, of a fresh `init`, say.
        Auxiliary heads, which a deploy tree lacks, come from here.
      epsilon: batch normalisation's.

    Returns:
      `{"params": …, "batch_stats": …}` with the names and shapes of `like`.

    Raises:
      ValueError: the two trees are not two forms of one network; the message names the
        first difference.
    """
    for what, tree in (("deployed", deployed), ("like", like)):
        if not isinstance(tree, Mapping) or not isinstance(tree.get("params"), Mapping):
            raise ValueError(
                f"unfuse_params: `{what}` must be variables, {{'params': …}}, "
                f"not {grammar.summary(tree)}"
            )
    unfusing = _Unfusing(epsilon)
    params = unfusing.node(like["params"], like.get("batch_stats"), deployed["params"], ())
    if not unfusing.blocks:
        raise ValueError(
            "unfuse_params: `like` holds no three-branch RepVGG block; give the variables of "
            "the training form, create_model(…).init(…)"
        )
    stats = _merge(like.get("batch_stats", {}), deployed.get("batch_stats", {}))
    return {**deployed, "params": params, "batch_stats": stats}


class _Unfusing:
    """One walk over two trees."""

    def __init__(self, epsilon: float):
        self.epsilon = epsilon
        self.blocks = 0

    def node(self, like: Tree, stats: Tree, deployed: Tree, path: Path) -> Tree:
        where = grammar.name(path)
        if grammar.is_train_block(like):
            self.blocks += 1
            grammar.check_train_block(like, stats, path)
            if not grammar.is_deploy_block(deployed, path):
                raise ValueError(
                    f"{where}: expected a deploy-form block with {grammar.FUSED} in `deployed`, "
                    f"found {grammar.summary(deployed)}"
                )
            return self.block(like, stats, deployed, where)
        if not isinstance(like, Mapping):
            grammar.check_leaves({where: deployed}, {where: like.shape}, "`deployed`")
            return deployed
        absent = [
            k for k in like if k not in deployed and not grammar.is_auxiliary_head(k, like[k])
        ]
        extra = [k for k in deployed if k not in like]
        if absent or extra:
            raise ValueError(
                f"{where}: `deployed` lacks [{', '.join(absent)}] of `like` "
                f"and has [{', '.join(extra)}] beyond it"
            )
        return {
            key: self.node(child, (stats or {}).get(key), deployed[key], (*path, key))
            if key in deployed
            else child
            for key, child in like.items()
        }

    def block(
        self, like: Mapping[str, Any], stats: Mapping[str, Any], deployed: Mapping, where: str
    ) -> dict[str, Any]:
        shape, dtype = like["conv3x3"]["kernel"].shape, like["conv3x3"]["kernel"].dtype
        target = deployed[grammar.FUSED]
        grammar.check_leaves(
            target, {"kernel": shape, "bias": (*shape[:-4], shape[-1])}, f"{where}/{grammar.FUSED}"
        )
        pieces = {key: child for key, child in like.items() if key in grammar.PIECES}
        pieces, stats, target = algebra.upcast((pieces, dict(stats), dict(target)))
        kernel, bias = target["kernel"], target["bias"]
        for chain in grammar.branches(pieces)[1:]:
            others = grammar.branch(chain, pieces, stats, self.epsilon)
            kernel = algebra.add_at_centre(kernel, -others.kernel)
            bias = bias - others.bias
        mean, var = stats["bn3x3"]["mean"], stats["bn3x3"]["var"]
        scale = algebra.namespace(var).sqrt(var + self.epsilon)
        return {
            **like,
            "conv3x3": {"kernel": kernel.astype(dtype)},
            "bn3x3": {"scale": scale.astype(dtype), "bias": (bias + mean).astype(dtype)},
            **{key: deployed[key] for key in deployed if key in grammar.KEPT},
        }


def _merge(like: Tree, deployed: Tree) -> Tree:
    """`like`'s statistics, but those that the deploy tree still has are its own."""
    if not isinstance(like, Mapping):
        return deployed
    return {
        key: _merge(child, deployed[key]) if key in deployed else child
        for key, child in like.items()
    }
