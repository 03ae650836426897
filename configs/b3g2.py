"""RepVGG-B3g2 on ImageNet: the recipe of the paper's Table 5, 200 epochs.

No accuracy was ever published for this model, and none was measured here.

Hardware: eight accelerators with 32 images each; any number works that divides the batch, and
the learning rate follows --config.train.batch_size. ImageNet is read as TFDS prepared it;
--config.data.source=folder:/data/imagenet or records:/data/imagenet read it otherwise
(docs/data.md).

    python train.py --config configs/b3g2.py --workdir runs/b3g2
"""

from repvgg_jax.train.config import paper_200


def get_config():
    return paper_200("B3g2")
