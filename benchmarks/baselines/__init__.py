"""The networks that the paper compares RepVGG with, as data, and the frameworks that run them."""

from baselines.network import Network, cost, evaluate, from_variant, random_params, unconverted
from baselines.zoo import BASELINES, resnet

__all__ = [
    "BASELINES",
    "Network",
    "cost",
    "evaluate",
    "from_variant",
    "random_params",
    "resnet",
    "unconverted",
]
