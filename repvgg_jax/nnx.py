"""`to_nnx`: a RepVGG for people who work with `flax.nnx`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax

from repvgg_jax.model import RepVGG

if TYPE_CHECKING:
    from flax import nnx


def to_nnx(model: RepVGG, variables: Mapping[str, Any]) -> "nnx.Module":
    """The same network as an NNX module that carries its variables.

    Parameters are `nnx.Param`, running statistics `nnx.BatchStat`, both under the names of
    the Linen tree: `module.head["kernel"]`.

    Args:
      model: from `create_model`.
      variables: its variables, of `model.init` or `load_weights`.

    Returns:
      An `nnx.Module`. `module(images)` gives the logits of evaluation; `module(images,
      train=True)` normalizes by the batch and updates the running statistics in place.

    Raises:
      ValueError: variables without `params`.
    """
    from flax import nnx  # imports much, which Linen users do not need

    if not isinstance(variables, Mapping) or "params" not in variables:
        raise ValueError("to_nnx needs a model's variables, {'params': …, 'batch_stats': …}")

    class NNXRepVGG(nnx.bridge.ToNNX):
        def __call__(self, *args: Any, **options: Any) -> Any:
            train = options.get("train", len(args) > 1 and args[1])
            if train:  # Linen needs the names of mutable collections
                options.setdefault("mutable", ["batch_stats"])
            return super().__call__(*args, **options)

    module = NNXRepVGG(model)
    params = jax.tree.map(lambda leaf: nnx.Param(jax.numpy.asarray(leaf)), variables["params"])
    stats = jax.tree.map(
        lambda leaf: nnx.BatchStat(jax.numpy.asarray(leaf)), variables.get("batch_stats", {})
    )
    for name, child in _merged(params, stats).items():
        setattr(module, name, nnx.data(child))
    return module


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Two nests of mappings as one; they share no leaf."""
    shared = {key: _merged(one[key], other[key]) for key in one.keys() & other.keys()}
    return {**one, **other, **shared}
