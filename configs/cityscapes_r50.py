"""PSPNet on ResNet-50, Cityscapes: 40 epochs of 713x713 crops.

The paper (Table 8): mIoU 77.17 %, pixel accuracy 95.99 %, 10.4 images per second; not measured
here. It trained from weights of ImageNet, such as those of hszhao/semseg:

    python train.py --config configs/cityscapes_r50.py --init_from=resnet50_v2.pth

Cityscapes is in data/cityscapes, as unpacked; --config.data.source=cityscapes:DIRECTORY names
another place. The paper states length, batch, learning rate and decay. Crops, auxiliary loss and
evaluation are those of hszhao/semseg, which trains for 200 epochs with ten times the learning rate
beside the backbone. mmsegmentation trains for 40,000 or 80,000 steps of 8 crops of 769 pixels and
averages logits of windows; config.protocol="mmseg" evaluates so.
"""

from repvgg_jax.train.config import cityscapes


def get_config():
    return cityscapes("ResNet-50")
