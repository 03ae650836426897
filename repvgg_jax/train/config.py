"""The configuration that recipes in `configs/` start from, and the recipes of the papers.

Recipes state lengths in epochs and learning rates per 256 images, so that another batch size,
given on the command line, scales both. Those of the papers assume eight accelerators with 32
images each; any number works that divides the batch. They read ImageNet as TFDS prepared it;
`--config.data.source=folder:/data/imagenet` or `records:/data/imagenet` read it otherwise
(docs/data.md).
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict, FieldReference

from repvgg_jax.settings import Section
from repvgg_jax.train.settings import Settings
from repvgg_jax.variants import Variant, get_variant


def default_config(variant: str | Variant = "A0") -> ConfigDict:
    """A complete, locked configuration; `repvgg_jax.train.settings` documents every setting.

    Args:
      variant: an official name, or a `Variant` of your own.

    Raises:
      ValueError: an unknown name.
    """
    variant = get_variant(variant) if isinstance(variant, str) else variant
    settings = Settings()
    model = dataclasses.replace(settings.model, variant=variant)
    return as_config(dataclasses.replace(settings, model=model))


def as_config(section: Section) -> ConfigDict:
    """Settings as the configuration that they are read from."""
    plain: dict[str, Any] = section.plain()
    for field in dataclasses.fields(section):  # type: ignore[arg-type]
        value = getattr(section, field.name)
        if isinstance(value, Section):
            plain[field.name] = as_config(value)
        elif field.metadata["any_type"]:
            plain[field.name] = FieldReference(plain[field.name], field_type=object)
    return ConfigDict(plain)


def paper_120(variant: str) -> ConfigDict:
    """Table 4 of the paper: 120 epochs, cosine from 0.1, only crops and flips (section 4.1).

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
    trained these models used.
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
