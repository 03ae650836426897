"""RepVGG-D2se on ImageNet: the recipe of the paper's Table 5, 200 epochs.

The authors published weights, not the recipe; 200 epochs are in the name of their file. Expected
top-1: 83.55 % at 320 pixels, 81.82 % at 224 (their weights, evaluated by timm and by
mmpretrain); not measured here.

    python train.py --config configs/d2se.py --workdir runs/d2se
"""

from repvgg_jax.train.config import paper_200


def get_config():
    config = paper_200("D2se")
    config.data.eval_size, config.data.eval_crop = 320, 1.0
    return config
