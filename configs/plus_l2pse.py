"""RepVGG-plus-L2pse on ImageNet: RepVGGplus, 300 epochs.

Trained at 256 pixels, tested at 320, with auxiliary classifiers. Expected top-1: 84.06 % (the
authors' repository); not measured here.

Hardware: eight accelerators with 32 images each; any number works that divides the batch, and
the learning rate follows --config.train.batch_size. ImageNet is read as TFDS prepared it;
--config.data.source=folder:/data/imagenet or records:/data/imagenet read it otherwise
(docs/data.md).

    python train.py --config configs/plus_l2pse.py --workdir runs/plus_l2pse
"""

from repvgg_jax.train.config import plus_300


def get_config():
    return plus_300("plus-L2pse")
