"""PSPNet on RepVGG-B1g2-fast, Cityscapes: 40 epochs of 713x713 crops.

The paper (Table 8): mIoU 78.88 %, pixel accuracy 96.19 %, 10.9 images per second; not measured
here. It trained from weights of ImageNet, such as those of the authors:

    python train.py --config configs/cityscapes_b1g2_fast.py --init_from=RepVGG-B1g2-train.pth

Cityscapes is in data/cityscapes, as unpacked; --config.data.source=cityscapes:DIRECTORY names
another place. The paper states length, batch, learning rate and decay. Crops, auxiliary loss and
evaluation are those of hszhao/semseg, which trains for 200 epochs with ten times the learning rate
beside the backbone. mmsegmentation trains for 40,000 or 80,000 steps of 8 crops of 769 pixels and
averages logits of windows; config.protocol="mmseg" evaluates so.
"""

from repvgg_jax.train.config import cityscapes


def get_config():
    return cityscapes("B1g2", fast=True)
