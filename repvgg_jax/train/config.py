"""Every setting of a run, with its default; a recipe in `configs/` changes a few of them."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict, FieldReference

from repvgg_jax.model import RepVGG, create_model
from repvgg_jax.train.division import Division
from repvgg_jax.train.limits import check_limits
from repvgg_jax.variants import Variant, get_variant

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def default_config(variant: str | Variant = "A0") -> ConfigDict:
    """A complete configuration.

    Args:
      variant: the network, an official name or a `Variant` of your own.
    """
    return ConfigDict(
        {
            "seed": 0,  # of initial weights, data order and augmentation
            "init_from": "",  # weights to start from: a file, a hub name or another workdir
            "model": {
                "variant": (
                    dataclasses.asdict(variant) if isinstance(variant, Variant) else variant
                ),
                "dtype": "float32",  # of the convolutions: float32 or bfloat16
                "train_form": "branches",  # or covariance (docs/covariance.md)
                "remat": False,  # recompute activations in the backward pass: less memory
            },
            "bn": {
                # Images that share batch statistics, on any number of devices (the paper's
                # is 32), or "global" for the whole batch.
                "group_size": FieldReference("global", field_type=object),
            },
            "data": {
                # digits, fake, tfds:NAME, folder:DIRECTORY or records:DIRECTORY (docs/data.md)
                "source": "digits",
                "directory": "",  # where TFDS prepared tfds:NAME; empty: its own default
                "train_split": "train",  # of tfds:NAME
                "eval_split": "validation",
                "num_classes": 0,  # a check; 0: whatever the data have
                "train_size": 0,  # height and width, pixels; 0: as they are, digits and fake only
                "sizes": (),  # (epoch, train size) from which it changes: ((0, 128), (60, 224))
                "eval_size": 0,  # 0: as train_size
                "eval_crop": 0.875,  # share of the resized image's short side that is seen
                "crop_scale": (0.08, 1.0),  # of the area, random crop in training
                "crop_ratio": (3 / 4, 4 / 3),  # width / height
                "workers": 0,  # processes that read, for each process of the run; 0: threads
                "threads": 1,  # that read in each of them
                "max_bad": 0,  # images that may be undecodable; one more stops the run
                "mean": (0.485, 0.456, 0.406),  # per channel, pixels on the scale 0 … 1
                "std": (0.229, 0.224, 0.225),
            },
            "augment": {  # on the device; docs/augmentation.md
                "flip": 0.0,  # probability of a mirror image
                "policy": "none",  # none, autoaugment, randaugment or raug15
                "resampling": "bilinear",  # of autoaugment and randaugment; or bicubic, random
                "randaugment": {  # timm's rand-m9-mstd0.5-inc1
                    "ops": 2,  # an image
                    "magnitude": 9.0,  # mean level, 0 … 10
                    "deviation": 0.5,  # of the level
                    "increasing": True,  # a higher level always changes more
                    "probability": 0.5,  # of each operation
                },
                "jitter": {  # factors within 1 ± these
                    "brightness": 0.0,
                    "contrast": 0.0,
                    "saturation": 0.0,
                    "hue": 0.0,  # share of the colour circle, 0 … 0.5
                },
                "affine": {
                    "rotation": 0.0,  # degrees
                    "scale": 0.0,  # relative
                    "shear": 0.0,  # columns per row
                    "shift": 0.0,  # share of the image's size
                },
                "erase": {
                    "probability": 0.0,
                    "mode": "pixel",  # normal noise; or colour, zero
                    "least_area": 0.02,  # share of the image
                    "most_area": 1 / 3,
                    "least_aspect": 0.3,  # height over width; the most is one over this
                },
                "mixup": 0.0,  # alpha; 0: off. With both, a coin decides
                "cutmix": 0.0,  # alpha; 0: off
                "mix_group": 0,  # images that are mixed among themselves; 0: the whole batch
            },
            "train": {
                "batch_size": 256,  # images of all devices together
                "epochs": 120,
                "accumulate": 1,  # pieces of a batch that go through the network one by one
                "label_smoothing": 0.0,
                "shard_optimizer": False,  # each device keeps a share of momentum and EMA (ZeRO-1)
                "auxiliary_weight": 0.1,  # of each auxiliary head's loss (plus-L2pse)
                # Of XLA, for the step: ("NAME=VALUE", …); docs/covariance.md has one for TPUs.
                "compiler_options": (),
            },
            "optimizer": {
                "name": "sgd",  # or adamw
                "learning_rate": 0.1,  # per 256 images; scales linearly with the batch
                "schedule": "cosine",  # cosine or linear to 0, step, constant
                "step_epochs": 30.0,  # of the step schedule: so often …
                "step_factor": 0.1,  # … the rate is multiplied by this
                "warmup_epochs": 0.0,  # linear, from 0
                "momentum": 0.9,  # of sgd
                "nesterov": False,  # of sgd
                "b1": 0.9,  # of adamw
                "b2": 0.999,  # of adamw
                "epsilon": 1e-8,  # of adamw
                "weight_decay": 1e-4,  # on kernels and on the identity branch's scale
                "equivalent_l2": False,  # decay the equivalent kernel, not its two branches
                "clip_norm": 0.0,  # largest norm of a step's gradient; 0: any
            },
            "ema": {
                "decay": 0.0,  # a step, of the averaged network that is evaluated; 0: none
            },
            "eval": {
                "batch_size": 256,
                "every_epochs": 1,
            },
            "checkpoint": {
                "every_epochs": 1,
                "keep": 3,  # the newest ones; that of the best evaluation stays anyway
            },
            "report": {
                "every_steps": 50,
            },
        }
    )


def plain(config: ConfigDict) -> dict[str, Any]:
    """The configuration as JSON knows it: tuples are lists."""

    def convert(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: convert(item) for key, item in value.items()}
        return [convert(item) for item in value] if isinstance(value, (list, tuple)) else value

    return convert(config.to_dict())


def from_plain(content: Any) -> ConfigDict:
    """The configuration that `plain` wrote down.

    Raises:
      ValueError: settings are missing or unknown.
    """
    known, found = _settings(plain(default_config())), _settings(content)
    if known != found:
        raise ValueError(
            f"not a configuration of this version: missing [{', '.join(sorted(known - found))}], "
            f"unknown [{', '.join(sorted(found - known))}]"
        )
    return ConfigDict(content)


def _settings(content: Any, path: str = "config") -> set[str]:
    """Names of all settings; a variant that is spelt out is one."""
    if not isinstance(content, dict) or path == "config.model.variant":
        return {path}
    return {name for key, item in content.items() for name in _settings(item, f"{path}.{key}")}


def variant_of(config: ConfigDict) -> Variant:
    """The architecture that a configuration names or spells out.

    Raises:
      ValueError: unknown variant, or one that cannot be.
    """
    variant = config.model.variant
    if isinstance(variant, str):
        return get_variant(variant)
    return Variant(**{key: _frozen(value) for key, value in plain(variant).items()})


def model_of(config: ConfigDict, num_classes: int) -> RepVGG:
    """The network that a configuration describes, in training form.

    Raises:
      ValueError: unknown variant or dtype.
    """
    if config.model.dtype not in DTYPES:
        raise ValueError(
            f"config.model.dtype={config.model.dtype!r}; there are: {', '.join(DTYPES)}"
        )
    return create_model(
        variant_of(config),
        num_classes=num_classes,
        bn_group_size=bn_group_size(config),
        train_form=config.model.train_form,
        remat=config.model.remat,
        dtype=DTYPES[config.model.dtype],
    )


def bn_group_size(config: ConfigDict) -> int | None:
    """Images that share batch statistics; None for the whole batch.

    Raises:
      ValueError: neither a number of images nor "global".
    """
    size = config.bn.group_size
    if size == "global":
        return None
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(
            f'config.bn.group_size={size!r}; give a number of images, or "global" for the '
            "whole batch"
        )
    return size


def check(config: ConfigDict, *, devices: int, processes: int = 1) -> None:
    """Checks the numbers of a configuration against each other and the machine.

    Args:
      config: to check.
      devices: of all processes together.
      processes: how many there are.

    Raises:
      ValueError: the first thing that cannot work, and what would.
    """
    check_limits(config)
    of = f" ({processes} processes of {devices // processes})" if processes > 1 else ""
    division = _division(config, devices)
    batch, pieces = config.train.batch_size, config.train.accumulate
    if pieces > 1 and division.group is None:
        example = division.nearest_group(batch, 32) or "32"
        raise ValueError(
            f'config.bn.group_size="global" and config.train.accumulate={pieces} exclude each '
            f"other: no piece sees the whole batch; give a group size that divides "
            f"{batch // pieces}, for example {example}"
        )
    division.require("train.batch_size", batch, of=of)
    Division(devices).require("eval.batch_size", config.eval.batch_size, of=of)


def _division(config: ConfigDict, devices: int) -> Division:
    """What has to divide the batch of a step."""
    augment = config.augment
    return Division(
        devices,
        group=bn_group_size(config),
        pieces=config.train.accumulate,
        mix_group=augment.mix_group if augment.mixup or augment.cutmix else 0,
    )


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
