"""The recipes that the official models were trained by, on ImageNet.

`configs/` names one of these for every model. All of them state lengths in epochs and learning
rates per 256 images, so that another batch, given on the command line, scales both.
"""

from ml_collections import ConfigDict

from repvgg_jax.train.config import default_config


def paper_120(variant: str) -> ConfigDict:
    """Table 4 of the paper: 120 epochs, cosine from 0.1, crops and flips alone (section 4.1).

    Eight GPUs with 32 images each, so batch statistics are those of 32 images. Only the dtype
    is ours: convolutions compute in bfloat16, everything else in float32.
    """
    config = default_config(variant)
    config.model.dtype = "bfloat16"
    config.bn.group_size = 32
    config.data.source = "tfds:imagenet2012"
    config.data.num_classes = 1000
    config.data.train_size = 224
    config.data.workers = 8
    config.augment.flip = 0.5
    config.train.batch_size = 256
    config.train.epochs = 120
    config.optimizer.learning_rate = 0.1
    config.optimizer.weight_decay = 1e-4
    config.report.every_steps = 100
    return config


def paper_200(variant: str) -> ConfigDict:
    """Table 5: 200 epochs, 5 of warm-up, label smoothing, mixup and AutoAugment.

    The paper gives neither the smoothing nor mixup's alpha; 0.1 and 0.2 are what others who
    trained these models took.
    """
    config = paper_120(variant)
    config.train.epochs = 200
    config.train.label_smoothing = 0.1
    config.optimizer.warmup_epochs = 5.0
    config.augment.policy = "autoaugment"
    config.augment.mixup = 0.2
    config.augment.mix_group = 32
    return config


def plus_300(variant: str) -> ConfigDict:
    """RepVGGplus, by the authors' repository: 300 epochs at 256 pixels, tested at 320."""
    config = paper_200(variant)
    config.data.train_size = 256
    config.data.eval_size = 320
    config.data.eval_crop = 1.0
    config.train.epochs = 300
    config.train.auxiliary_weight = 0.1
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 4e-5
    config.augment.policy = "raug15"
    return config
