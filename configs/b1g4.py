"""RepVGG-B1g4 on ImageNet: the paper's Table 4, 120 epochs.

Expected top-1: 77.58 % (the paper's Table 4, 224 pixels); not measured here.

    python train.py --config configs/b1g4.py --workdir runs/b1g4
"""

from repvgg_jax.train.config import paper_120


def get_config():
    return paper_120("B1g4")
