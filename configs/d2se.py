"""RepVGG-D2se on ImageNet: the recipe of the paper's Table 5, 200 epochs.

The authors published weights, not the recipe; the name of their file says 200 epochs. Expected
top-1: 83.55 % at 320 pixels, 81.82 % at 224 (their weights, evaluated by timm and by
mmpretrain); not measured here.

Hardware: eight accelerators with 32 images each; any number works that divides the batch, and
the learning rate follows --config.train.batch_size. ImageNet is read as TFDS prepared it;
--config.data.source=folder:/data/imagenet or records:/data/imagenet read it otherwise
(docs/data.md).

    python train.py --config configs/d2se.py --workdir runs/d2se
"""

from repvgg_jax.train.config import paper_200


def get_config():
    config = paper_200("D2se")
    config.data.eval_size, config.data.eval_crop = 320, 1.0
    return config
