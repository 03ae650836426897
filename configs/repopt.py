"""RepOpt-VGG: b1, b2, l1 or l2 on ImageNet, 120 epochs; b1_search … on CIFAR-100 before that.

The scales of the optimizer come from the search, or from the authors' file:

    python train.py --config configs/repopt.py:b1_search --workdir runs/repopt_b1_search
    python train.py --config configs/repopt.py:b1 --config.optimizer.scales=runs/repopt_b1_search

Published top-1: 78.62 % (b1), 79.68 % (b2), 79.82 % (l1), 80.47 % (l2); not measured here.
"""

from repvgg_jax.train.config import repopt_120, repopt_search_240


def get_config(size: str = "b1"):
    name, _, search = size.partition("_")
    return repopt_search_240(name) if search == "search" else repopt_120(size)
