"""Starting a segmenter from a classifier: its backbone takes the weights, the rest is new."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from repvgg_jax.text import first_few, plural
from repvgg_jax.weights import Weights, merge_weights


@dataclasses.dataclass(frozen=True)
class Started:
    """Variables of a segmenter to start training from, and where they are from.

    Attributes:
      variables: `{"params": …, "batch_stats": …}` of the segmenter.
      taken: modules whose weights were loaded, e.g. `backbone/stage3_block0`.
      replaced: modules that stay freshly initialized: pyramid, decoder and heads.
      unfused: whether the classifier was in deploy form and its blocks were split into branches.
      source: a description of the classifier.
    """

    variables: dict[str, Any]
    taken: tuple[str, ...]
    replaced: tuple[str, ...]
    unfused: bool
    source: str

    def __str__(self) -> str:
        branches = "; deploy form split into three branches" if self.unfused else ""
        ends = f"{self.taken[0]} … {self.taken[-1]}"
        return (
            f"starting from {self.source}: took {plural(len(self.taken), 'block')} ({ends})"
            f"{branches}; freshly initialized: {first_few(self.replaced, 10)}"
        )


def start_from_classifier(loaded: Weights, fresh: Mapping[str, Any]) -> Started:
    """Replaces a freshly initialized backbone by that of a classifier.

    Dilation changes neither names nor shapes, and blocks have an identity branch where the
    classifier's have one, so every weight but the classifier's head is taken.

    Args:
      loaded: a classifier of the same variant and epsilon, from `load_weights` or
        `load_pretrained`; the deploy form is unfused.
      fresh: `create_segmenter(…).init(…)`.

    Raises:
      ValueError: `fresh` is no segmenter in training form, or of another backbone; the message
        lists differences.
    """
    collections = ("params", "batch_stats")
    if not all("backbone" in fresh.get(collection, {}) for collection in collections):
        raise ValueError(
            "a segmenter starts in training form, but these variables have no backbone with "
            "batch_stats; build it with create_segmenter(…, deploy=False)"
        )
    merged = merge_weights(loaded, {name: fresh[name]["backbone"] for name in collections})
    variables = {
        **fresh,
        **{name: {**fresh[name], "backbone": merged.variables[name]} for name in collections},
    }
    return Started(
        variables=variables,
        taken=tuple(f"backbone/{name}" for name in merged.variables["params"]),
        replaced=tuple(name for name in fresh["params"] if name != "backbone"),
        unfused=merged.unfused,
        source=merged.source,
    )
