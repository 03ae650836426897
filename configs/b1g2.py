"""RepVGG-B1g2 on ImageNet: the paper's Table 4, 120 epochs.

Expected top-1: 77.78 % (the paper's Table 4, 224 pixels); not measured here.

Hardware: eight accelerators with 32 images each; any number works that divides the batch, and
the learning rate follows --config.train.batch_size. ImageNet is read as TFDS prepared it;
--config.data.source=folder:/data/imagenet or records:/data/imagenet read it otherwise
(docs/data.md).

    python train.py --config configs/b1g2.py --workdir runs/b1g2
"""

from repvgg_jax.train.config import paper_120


def get_config():
    return paper_120("B1g2")
