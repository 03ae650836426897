"""RepVGG-B2g2 on ImageNet: the recipe of the paper's Table 4, 120 epochs.

No accuracy was ever published for this model, and none was measured here.

Hardware: eight accelerators with 32 images each; any number works that divides the batch, and
the learning rate follows --config.train.batch_size. ImageNet is read as TFDS prepared it;
--config.data.source=folder:/data/imagenet or records:/data/imagenet read it otherwise
(docs/data.md).

    python train.py --config configs/b2g2.py --workdir runs/b2g2
"""

from repvgg_jax.train.config import paper_120


def get_config():
    return paper_120("B2g2")
