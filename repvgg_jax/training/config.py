"""Every setting of a run, with its default; a recipe in `configs/` changes a few of them."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from repvgg_jax.model import RepVGG, create_model
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
                "train_form": "branches",  # or covariance: the same in fewer passes over memory
                "remat": False,  # recompute activations in the backward pass: less memory
            },
            "bn": {
                "group_size": 0,  # images that share batch statistics; 0: the whole batch
            },
            "data": {
                # digits, fake, tfds:NAME, folder:DIRECTORY or records:DIRECTORY (docs/data.md)
                "source": "digits",
                "directory": "",  # where TFDS prepared tfds:NAME; empty: its own default
                "train_split": "train",  # of tfds:NAME
                "eval_split": "validation",
                "num_classes": 0,  # a check; 0: whatever the data have
                "train_size": 0,  # height and width, pixels; 0: as they are, digits and fake only
                "eval_size": 0,  # 0: as train_size
                "eval_crop": 0.875,  # share of the resized image's short side that is seen
                "crop_scale": (0.08, 1.0),  # of the area, random crop in training
                "crop_ratio": (3 / 4, 4 / 3),  # width / height
                "workers": 0,  # processes that read, for each process of the run; 0: threads
                "threads": 1,  # that read in each of them
                "max_bad": 0,  # images that may be undecodable; one more stops the run
                "mean": (0.485, 0.456, 0.406),  # per channel, pixels on the scale 0 … 1
                "std": (0.229, 0.224, 0.225),
                "augment": "none",  # none or affine
                "affine": {
                    "rotation": 0.0,  # degrees
                    "scale": 0.0,  # relative
                    "shear": 0.0,  # columns per row
                    "shift": 0.0,  # share of the image's size
                },
            },
            "train": {
                "batch_size": 256,  # images of all devices together
                "epochs": 120,
                "label_smoothing": 0.0,
                "auxiliary_weight": 0.1,  # of each auxiliary head's loss (plus-L2pse)
            },
            "optimizer": {
                "learning_rate": 0.1,  # per 256 images; scales linearly with the batch
                "warmup_epochs": 0.0,  # linear, from 0
                "momentum": 0.9,
                "nesterov": False,
                "weight_decay": 1e-4,  # on kernels and on the identity branch's scale
            },
            "eval": {
                "batch_size": 256,
                "every_epochs": 1,
            },
            "checkpoint": {
                "every_epochs": 1,
                "keep": 3,  # the newest ones
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


def differences(old: Any, new: Any, path: str = "config") -> list[str]:
    """What differs between two plain configurations, a line each."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in [*old, *(key for key in new if key not in old)]:
            missing = object()
            a, b = old.get(key, missing), new.get(key, missing)
            if a is missing or b is missing:
                lines.append(f"{path}.{key}: {'added' if a is missing else 'removed'}")
            else:
                lines += differences(a, b, f"{path}.{key}")
        return lines
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]


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
        bn_group_size=config.bn.group_size or None,
        train_form=config.model.train_form,
        remat=config.model.remat,
        dtype=DTYPES[config.model.dtype],
    )


def check(config: ConfigDict, *, devices: int) -> None:
    """Checks the numbers of a configuration against each other and the machine.

    Raises:
      ValueError: the first thing that cannot work, and what would.
    """
    for name, batch in (
        ("train.batch_size", config.train.batch_size),
        ("eval.batch_size", config.eval.batch_size),
    ):
        if batch < 1 or batch % devices:
            below, above = batch // devices * devices, (batch // devices + 1) * devices
            nearest = f"{below} or {above}" if below > 0 else f"{above}"
            raise ValueError(
                f"config.{name}={batch} cannot be split over {devices} devices; "
                f"the nearest that can: {nearest}"
            )
    batch, group = config.train.batch_size, config.bn.group_size
    if group < 0 or (group and batch % group):
        divisors = [n for n in range(1, batch + 1) if batch % n == 0]
        closest = sorted(sorted(divisors, key=lambda n: abs(n - group))[:2])
        raise ValueError(
            f"config.bn.group_size={group} does not divide config.train.batch_size={batch}; "
            f"the nearest that do: {' or '.join(map(str, closest))}"
        )
    least = {
        "train.epochs": (config.train.epochs, 1),
        "eval.every_epochs": (config.eval.every_epochs, 1),
        "checkpoint.every_epochs": (config.checkpoint.every_epochs, 1),
        "checkpoint.keep": (config.checkpoint.keep, 1),
        "report.every_steps": (config.report.every_steps, 1),
        "optimizer.learning_rate": (config.optimizer.learning_rate, 0),
        "optimizer.warmup_epochs": (config.optimizer.warmup_epochs, 0),
        "optimizer.weight_decay": (config.optimizer.weight_decay, 0),
    }
    for name, (value, minimum) in least.items():
        if value < minimum:
            raise ValueError(f"config.{name}={value} must be {minimum} or more")
    if config.optimizer.warmup_epochs >= config.train.epochs:
        raise ValueError(
            f"config.optimizer.warmup_epochs={config.optimizer.warmup_epochs} leaves nothing of "
            f"config.train.epochs={config.train.epochs}"
        )
    if not 0 <= config.train.label_smoothing < 1:
        raise ValueError(
            f"config.train.label_smoothing={config.train.label_smoothing} must be in [0, 1)"
        )


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
