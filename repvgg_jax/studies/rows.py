"""The rows of RepVGG's Tables 6 and 7, and how each is trained on small data."""

import dataclasses
import types
from collections.abc import Mapping

from ml_collections import ConfigDict

from repvgg_jax.text import did_you_mean
from repvgg_jax.train.config import default_config
from repvgg_jax.variants import Variant


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the tables.

    Attributes:
      title: as the paper calls it.
      table: 6, 7 or 0 for one beside Table 7.
      paper: ImageNet top-1 of RepVGG-B0 with this change, in percent; None if not printed.
      block: a name in `repvgg_jax.architecture.networks.BLOCKS`.
      residual: whether a block is two convolutions, so that there are half as many.
      reference: the row that it is compared with.
    """

    title: str
    table: int
    paper: float | None
    block: str
    residual: bool = False
    reference: str = "both"


ROWS: Mapping[str, Row] = types.MappingProxyType(
    {
        "both": Row("identity and 1x1 (RepVGG)", 6, 75.14, "repvgg"),
        "identity": Row("identity only", 6, 74.79, "no_1x1"),
        "one": Row("1x1 only", 6, 73.15, "no_identity"),
        "neither": Row("neither (plain)", 6, 72.39, "no_branches"),
        "identity_without_bn": Row("identity without BN", 7, 74.18, "identity_without_bn"),
        "post_addition_bn": Row("post-addition BN", 7, 73.52, "post_addition_bn"),
        "relu_in_branches": Row("ReLU in branches", 7, 75.69, "relu_in_branches"),
        "diracnet": Row("DiracNet", 7, 73.97, "diracnet"),
        "trivial": Row("trivial re-parameterization", 7, 73.51, "trivial"),
        "acb": Row("ACB", 7, 73.58, "acb"),
        "residual": Row("residual reorganization", 7, 74.56, "residual", residual=True),
        "residual_repvgg": Row(
            "ResNet with RepVGG blocks",
            0,
            None,
            "residual_repvgg",
            residual=True,
            reference="residual",
        ),
    }
)
"""By name. The paper's last one is ResNet-50: 76.34 % with RepVGG blocks, 76.31 % without.

Here it is the row above it, a ResNet of basic blocks, with both convolutions of every block made of
RepVGG's branches.
"""

_DEPTHS, _CHANNELS = (2, 6, 6), (8, 16, 32)


def row(name: str) -> Row:
    """The row of that name.

    Raises:
      ValueError: there is none.
    """
    if name not in ROWS:
        raise ValueError(
            f"unknown row {name!r}; {did_you_mean(name, ROWS)}there are {', '.join(ROWS)}"
        )
    return ROWS[name]


def network(name: str, block: str, *, residual: bool = False) -> Variant:
    """The network of 15 convolutions that the studies train, on images of 32x32 pixels.

    Args:
      name: of the variant.
      block: a name in `repvgg_jax.architecture.networks.BLOCKS`.
      residual: whether a block is two convolutions.
    """
    depths = tuple(depth // 2 for depth in _DEPTHS) if residual else _DEPTHS
    return Variant(
        name, depths, _CHANNELS, stem_channels=_CHANNELS[0], strides=(1, 2, 2), block=block
    )


def recipe(name: str) -> ConfigDict:
    """The recipe of a row: the same for all but the block.

    Raises:
      ValueError: no such row.
    """
    found = row(name)
    return small_recipe(network(f"ablation-{name}", found.block, residual=found.residual))


def small_recipe(variant: Variant) -> ConfigDict:
    """How the studies train a network: SGD on digits before photographs, without augmentation."""
    config = default_config(variant)
    config.model.train_form = "branches"
    config.data.source = "clutter"
    config.data.mean, config.data.std = (0.46, 0.44, 0.41), (0.29, 0.25, 0.26)
    config.train.batch_size = 64
    config.train.epochs = 6
    config.optimizer.learning_rate = 0.4  # 0.1 at this batch
    config.optimizer.warmup_epochs = 1.0
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 1e-4
    config.eval.batch_size = 400  # of 2000 images, on up to 8 devices
    config.eval.every_epochs = 6
    config.checkpoint.every_epochs = 6
    config.report.every_steps = 125
    return config
