"""RepVGG-A2 on ImageNet: the paper's Table 4, 120 epochs.

Expected top-1: 76.48 % (the paper's Table 4, 224 pixels); not measured here.

    python train.py --config configs/a2.py --workdir runs/a2
"""

from repvgg_jax.train.config import paper_120


def get_config():
    return paper_120("A2")
