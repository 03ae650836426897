"""RepVGG-B3g4 on ImageNet: the paper's Table 5, 200 epochs.

Expected top-1: 80.21 % (the paper's Table 5, 224 pixels); not measured here.

Hardware: eight accelerators with 32 images each; any number works that divides the batch, and
the learning rate follows --config.train.batch_size. ImageNet is read as TFDS prepared it;
--config.data.source=folder:/data/imagenet or records:/data/imagenet read it otherwise
(docs/data.md).

    python train.py --config configs/b3g4.py --workdir runs/b3g4
"""

from repvgg_jax.train.config import paper_200


def get_config():
    return paper_200("B3g4")
