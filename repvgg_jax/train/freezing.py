"""What of a network stays as it is in training: whole blocks, or their running statistics."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from flax import linen as nn

from repvgg_jax.block import ReparamBlock
from repvgg_jax.layers import BatchNorm
from repvgg_jax.model import RepVGG
from repvgg_jax.segmentation.network import Segmenter
from repvgg_jax.text import did_you_mean

EVERY = "all"
"""Given alone in `config.bn.freeze_statistics`, stands for every block and head."""


@dataclasses.dataclass(frozen=True)
class Frozen:
    """What stays as it is, by names of blocks and heads.

    Attributes:
      blocks: names of those that keep parameters and running statistics, and compute as in
        evaluation.
      statistics: names of those that keep running statistics, and normalize by them; `(EVERY,)`
        for all.
    """

    blocks: tuple[str, ...] = ()
    statistics: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, model: RepVGG | Segmenter, blocks: Sequence[str], statistics: Sequence[str]
    ) -> "Frozen":
        """What `config.train.freeze` and `config.bn.freeze_statistics` stand for.

        Raises:
          ValueError: a name that stands for nothing, or all blocks and the classifier to freeze.
        """
        setting = "config.train.freeze"
        found = _names(model, blocks, setting)
        if found and isinstance(model, RepVGG) and set(found) == set(_known(model)):
            raise ValueError(f"{setting}={tuple(blocks)} leaves nothing to train")
        if tuple(statistics) == (EVERY,):
            return cls(found, (EVERY,))
        return cls(found, _names(model, statistics, "config.bn.freeze_statistics"))

    def keep(self, new: Any, old: Any) -> Any:
        """Parameters with those that are frozen from `old`, exactly: averaging would round."""
        return _keep(self.blocks, new, old)

    def keep_statistics(self, new: Any, old: Any) -> Any:
        """Running statistics with those that are frozen from `old`, exactly."""
        return old if EVERY in self.statistics else _keep(self.blocks + self.statistics, new, old)

    def computing(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which what is frozen computes as in evaluation."""
        if not self.blocks and not self.statistics:
            return contextlib.nullcontext()

        def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module = context.module
            if context.method_name == "__call__" and self._is_still(module):
                if "train" in kwargs:
                    kwargs = {**kwargs, "train": False}
                elif len(args) > 1 and isinstance(args[1], bool):
                    args = (args[0], False, *args[2:])
            return call(*args, **kwargs)

        return nn.intercept_methods(intercept)

    def _is_still(self, module: nn.Module) -> bool:
        if not module.path:
            return False
        if module.path[0] in self.blocks:
            return True
        # Of statistics alone: heads also drop channels in training, and go on doing so.
        normalizes = isinstance(module, (ReparamBlock, BatchNorm))
        return normalizes and (EVERY in self.statistics or module.path[0] in self.statistics)


def _keep(names: Sequence[str], new: Mapping[str, Any], old: Mapping[str, Any]) -> Any:
    if not names:
        return new
    return {name: old[name] if name in names else leaf for name, leaf in new.items()}


def _known(model: RepVGG) -> list[str]:
    names = [layer.name for layer in model.layers]
    return [*names, *(f"aux_{block}" for block in model.variant.auxiliary), "head"]


def _names(model: RepVGG | Segmenter, given: Sequence[str], setting: str) -> tuple[str, ...]:
    """The blocks and heads that names of blocks, or of stages, stand for."""
    if not given:
        return ()
    if isinstance(model, Segmenter):
        if tuple(given) != ("backbone",):
            raise ValueError(
                f'{setting}={tuple(given)}: of a segmenter, ("backbone",) can be frozen'
            )
        return ("backbone",)
    names, found = _known(model), dict[str, None]()
    for name in given:
        meant = [known for known in names if known == name or known.startswith(f"{name}_")]
        if not meant:
            stages = dict.fromkeys(layer.stage for layer in model.layers)
            raise ValueError(
                f"{setting}: {did_you_mean(name, names)}{name!r} names no block of "
                f"{model.variant.name}; there are {', '.join(stages)}, their blocks, e.g. "
                f"{names[1]}, and head"
            )
        found |= dict.fromkeys(meant)
    return tuple(found)
