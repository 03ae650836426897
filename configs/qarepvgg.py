"""QARepVGG on ImageNet, 120 epochs: a0, a1, a2, b0, …, b3g4.

    python train.py --config configs/qarepvgg.py:b0 --workdir runs/qarepvgg_b0

Published top-1: 72.2 % (a0), 74.8 % (b0), and 70.4 % (a0) after quantization to 8 bits; not
measured here.
"""

from repvgg_jax.train.config import qarepvgg_120


def get_config(size: str = "b0"):
    return qarepvgg_120(size)
