"""RepVGG-plus-L2pse on ImageNet: RepVGGplus, 300 epochs.

Trained at 256 pixels, tested at 320, with auxiliary classifiers. Expected top-1: 84.06 % (the
authors' repository); not measured here.

    python train.py --config configs/plus_l2pse.py --workdir runs/plus_l2pse
"""

from repvgg_jax.train.config import plus_300


def get_config():
    return plus_300("plus-L2pse")
