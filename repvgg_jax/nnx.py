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
    the Linen tree: `module.head["kernel"]`. The state of the module can be fused:

        deployed = to_nnx(model.clone(deploy=True), fuse_params(nnx.state(module)))

    Args:
      model: from `create_model`.
      variables: its variables, of `model.init` or `load_weights`, or an `nnx.State` of such a
        module.

    Returns:
      An `nnx.Module`. `module(images)` gives logits: those of evaluation, until
      `module.train()` makes it normalize by the batch and update the running statistics in
      place; `module.eval()` ends that. `module(images, train=…)` says so for one call.
      `module(images, auxiliary=True)` gives logits and, in training, those of the auxiliary heads
      by name. `module.features(images)` gives feature maps.

    Raises:
      ValueError: variables without `params`.
    """
    from flax import nnx  # imports much, which Linen users do not need

    class NNXRepVGG(nnx.bridge.ToNNX):
        @property
        def use_running_average(self) -> bool:
            return self.to_nnx__running_average

        @use_running_average.setter
        def use_running_average(self, value: bool) -> None:
            self.to_nnx__running_average = value

        def __call__(self, *args: Any, auxiliary: bool = False, **options: Any) -> Any:
            if options.get("method") not in (None, RepVGG.__call__, RepVGG.features, "features"):
                return super().__call__(*args, **options)
            images, *rest = args
            train = options.pop("train", rest[0] if rest else not self.use_running_average)
            if auxiliary:
                return self._with_auxiliary(images, train)
            if train:  # Linen needs the names of mutable collections
                options.setdefault("mutable", ["batch_stats"])
            return super().__call__(images, train=train, **options)

        def _with_auxiliary(self, images: Any, train: bool) -> Any:
            # Not by the bridge, which would put the heads' logits where their parameters are.
            logits, updates = self.to_nnx__module.apply(
                _by_collection(nnx.state(self)),
                images,
                train=train,
                mutable=["batch_stats", "auxiliary"] if train else [],
            )
            nnx.update(self, _variables(updates.get("batch_stats", {}), nnx.BatchStat))
            return logits, dict(updates.get("auxiliary", {}))

    if isinstance(variables, nnx.State):
        variables = _by_collection(variables)
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise ValueError("to_nnx needs a model's variables, {'params': …, 'batch_stats': …}")
    module = NNXRepVGG(model)
    module.use_running_average = True
    params = _variables(variables["params"], nnx.Param)
    stats = _variables(variables.get("batch_stats", {}), nnx.BatchStat)
    for name, child in _merged(params, stats).items():
        setattr(module, name, nnx.data(child))
    return module


def _variables(tree: Any, kind: Any) -> Any:
    """Plain nested dicts with an NNX variable of that kind for every array."""
    if isinstance(tree, Mapping):
        return {key: _variables(child, kind) for key, child in tree.items()}
    return kind(jax.numpy.asarray(tree))


def _by_collection(state: "nnx.State[Any, Any]") -> dict[str, Any]:
    """The state of an NNX module as variables of Linen."""
    from flax import nnx

    kinds = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
    collections = {name: nnx.to_pure_dict(nnx.filter_state(state, k)) for name, k in kinds.items()}
    return {name: tree for name, tree in collections.items() if tree}


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Two nests of mappings as one; they share no leaf."""
    shared = {key: _merged(one[key], other[key]) for key in one.keys() & other.keys()}
    return {**one, **other, **shared}
