"""Every setting of a run, with its default, its meaning and its limits.

`Settings.from_config` turns the `ConfigDict` that recipes and the command line fill into frozen
dataclasses, checked once. Rooms receive their own section. The settings of the data and of
augmentation are in `repvgg_jax.data.settings`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from repvgg_jax.data.settings import AugmentSettings, DataSettings
from repvgg_jax.quantization.settings import TARGETS
from repvgg_jax.reparam.decay import penalized
from repvgg_jax.segmentation.inference import PROTOCOLS
from repvgg_jax.segmentation.resnet import RESNETS, ResNetVariant
from repvgg_jax.settings import Section, as_json, setting
from repvgg_jax.text import did_you_mean, first_few
from repvgg_jax.typed import typed
from repvgg_jax.variants import ALL, Variant, get_variant

FEWER_COPIES = "xla_tpu_msa_inefficient_use_to_copy_ratio=3"
"""On TPUs, copies into fast memory only where they save traffic; see `docs/covariance.md`."""

_SEEDS = 2**32  # Grain takes no others, and jax would truncate them


def _parse_variant(name: str, value: Any) -> Variant | ResNetVariant:
    if isinstance(value, (Variant, ResNetVariant)):
        return value
    if isinstance(value, str):
        return RESNETS[value] if value in RESNETS else get_variant(value)
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}={value!r} must be the name of a variant or its fields")
    fields = [field.name for field in dataclasses.fields(Variant)]
    if unknown := [key for key in value if key not in fields]:
        raise ValueError(
            f"unknown setting {first_few(f'{name}.{key}' for key in unknown)}; "
            f"{did_you_mean(unknown[0], fields)}{name} has: {', '.join(fields)}"
        )
    return typed(Variant, value, name)


def _plain_variant(variant: Variant | ResNetVariant) -> str | dict[str, Any]:
    if isinstance(variant, ResNetVariant) or ALL.get(variant.name) == variant:
        return variant.name
    return variant.as_dict()


@dataclasses.dataclass(frozen=True)
class ModelSettings(Section, path="config.model"):
    """The network."""

    variant: Variant | ResNetVariant = setting(  # noqa: RUF009
        ALL["A0"],
        "an official name or the fields of a Variant; of a segmenter ResNet-50 and -101, too",
        parse=_parse_variant,
        plain=_plain_variant,
        any_type=True,
    )
    dtype: str = setting("float32", "of the convolutions", choices=("float32", "bfloat16"))
    train_form: str = setting(
        "auto",
        "training pass of a block (docs/covariance.md); auto: the platform's best",
        choices=("auto", "branches", "covariance", "covariance_pallas"),
    )
    remat: bool = setting(False, "recompute activations in the backward pass: less memory")
    remat_policy: str = setting(
        "nothing",
        "what remat keeps of a block; convolutions: their outputs, which cost most to recompute",
        choices=("nothing", "convolutions"),
    )

    def check(self) -> None:
        """Checks that the policy has an effect."""
        if self.remat_policy != "nothing" and not self.remat:
            raise ValueError(
                f"config.model.remat_policy={self.remat_policy} has an effect only with "
                "config.model.remat=True"
            )


@dataclasses.dataclass(frozen=True)
class SegmentationSettings(Section, path="config.segmentation"):
    """What a segmenter adds to its backbone, as in `repvgg_jax.create_segmenter`."""

    fast: bool = setting(False, "dilate the last layers only (paper, Table 8); RepVGG alone")
    output_stride: int = setting(8, "pixels of an image per pixel of the last map", least=1)
    bins: tuple[int, ...] = setting((1, 2, 3, 6), "windows of the pyramid's poolings, per axis")
    width: int = setting(512, "channels of the decoder", least=1)
    auxiliary_width: int = setting(256, "channels of the auxiliary head; 0: none", least=0)
    dropout: float = setting(0.1, "fraction of channels that training drops", least=0, below=1)


def _parse_group_size(name: str, value: Any) -> int | None:
    if value == "global":
        return None
    if type(value) is not int or value < 1:
        raise ValueError(
            f'{name}={value!r}; give a number of images, or "global" for the whole batch'
        )
    return value


def _check_names(setting: str, names: tuple[Any, ...]) -> None:
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError(
            f'{setting}={names!r} must hold names of blocks or stages, e.g. ("stem", "stage1")'
        )


@dataclasses.dataclass(frozen=True)
class NormSettings(Section, path="config.bn"):
    """Batch normalization."""

    group_size: int | None = setting(
        None,
        'images that share batch statistics, on any number of devices (the paper: 32), or "global"'
        " for the whole batch",
        parse=_parse_group_size,
        plain=lambda size: "global" if size is None else size,
        any_type=True,
    )
    freeze_statistics: tuple[str, ...] = setting(
        (),
        "blocks that normalize by their running statistics in training, too, and keep them, by "
        'name or stage as in config.train.freeze, or ("all",)',
    )

    def check(self) -> None:
        """Checks the form of the names."""
        _check_names("config.bn.freeze_statistics", self.freeze_statistics)


@dataclasses.dataclass(frozen=True)
class TrainSettings(Section, path="config.train"):
    """The batch, the length and the loss."""

    batch_size: int = setting(256, "images per step, of all devices together")
    epochs: int = setting(120, "length of the run", least=1)
    accumulate: int = setting(1, "microbatches per step", least=1)
    step_offset: int = setting(
        0, "batches by which the position in the data is ahead of the step; --extend sets it"
    )
    label_smoothing: float = setting(
        0.0, "fraction of the target that goes to all classes evenly", least=0, below=1
    )
    shard_optimizer: bool = setting(False, "shard momentum and EMA over the devices (ZeRO stage 1)")
    auxiliary_weight: float = setting(
        0.1, "of each auxiliary head's loss (plus-L2pse; segmenters use 0.4)", least=0
    )
    class_weights: str = setting(
        "none",
        "of the loss; balanced: each class counts as much as any other, however rare it is",
        choices=("none", "balanced"),
    )
    freeze: tuple[str, ...] = setting(
        (),
        'blocks that stay as they are, by name or stage, e.g. ("stem", "stage1", "stage2_block0")',
    )
    compiler_options: tuple[str, ...] = setting(
        (), 'XLA options of the step, ("NAME=VALUE", …); docs/covariance.md has one for TPUs'
    )

    def check(self) -> None:
        """Checks the form of the compiler options and of the names to freeze."""
        _check_names("config.train.freeze", self.freeze)
        if not all(isinstance(text, str) and "=" in text for text in self.compiler_options):
            raise ValueError(
                f"config.train.compiler_options={self.compiler_options!r} must hold strings "
                f"NAME=VALUE, e.g. ({FEWER_COPIES!r},)"
            )

    @property
    def xla_options(self) -> dict[str, str]:
        """`compiler_options` as `jax.jit` takes them."""
        options = dict(text.split("=", maxsplit=1) for text in self.compiler_options)
        # In options of CPUs and GPUs XLA knows no other spelling of booleans; libtpu knows several.
        spelled = {"true": "True", "false": "False"}
        return {
            name: spelled.get(value, value) if name.startswith(("xla_cpu", "xla_gpu")) else value
            for name, value in options.items()
        }


@dataclasses.dataclass(frozen=True)
class OptimizerSettings(Section, path="config.optimizer"):
    """The optimizer and its learning rate."""

    name: str = setting("sgd", "the optimizer", choices=("sgd", "adamw"))
    learning_rate: float = setting(
        0.1, "peak, per 256 images; scales linearly with the batch", least=0
    )
    schedule: str = setting(
        "cosine",
        "after warm-up; cosine, linear and poly end at 0",
        choices=("cosine", "linear", "poly", "step", "constant"),
    )
    power: float = setting(0.9, "poly: exponent of the share of steps that are left", above=0)
    step_epochs: float = setting(30.0, "step: epochs between two reductions", least=1e-3)
    step_factor: float = setting(0.1, "step: factor of a reduction", above=0)
    warmup_epochs: float = setting(0.0, "length of the linear warm-up from 0", least=0)
    momentum: float = setting(0.9, "sgd", least=0, below=1)
    nesterov: bool = setting(False, "sgd")
    b1: float = setting(0.9, "adamw", least=0, below=1)
    b2: float = setting(0.999, "adamw", least=0, below=1)
    epsilon: float = setting(1e-8, "adamw", above=0)
    weight_decay: float = setting(1e-4, "of kernels and of the identity branch's scale", least=0)
    equivalent_l2: bool = setting(False, "decay the equivalent kernel, not its two branches")
    head_factor: float = setting(
        1.0,
        "learning rate of the classifiers over that of everything else; of a segmenter, of all "
        "but the backbone",
        least=0,
    )
    clip_norm: float = setting(0.0, "largest norm of the gradient; 0: any", least=0)
    scales: str = setting(
        "",
        "RepOptimizer for repopt_b1 and others: where its scales are from, a run of a network such "
        "as repopt_b1_search, or the authors' file; empty: the gradients as they are",
    )

    def check(self) -> None:
        """Checks that nothing would make a RepOptimizer train another way than its branches."""
        if self.scales and self.clip_norm:
            raise ValueError(
                f"config.optimizer.clip_norm={self.clip_norm}: clipped gradients of one kernel are "
                "not those of its branches; with config.optimizer.scales leave it at 0"
            )


@dataclasses.dataclass(frozen=True)
class QuantizeSettings(Section, path="config.quantize"):
    """Quantization-aware training, from weights that `init_from` names; docs/quantization.md."""

    qat: bool = setting(False, "train through the integers of the deploy form")
    observe: float = setting(
        0.5, "share of the steps after which ranges of activations stay", above=0, most=1
    )
    range_decay: float = setting(
        0.99, "share of the old ranges that a step keeps", least=0, below=1
    )
    statistics: str = setting(
        "frozen",
        "running statistics of batch normalization: frozen, or running, which follow the images",
        choices=("frozen", "running"),
    )
    target: str = setting("vnni", "hardware whose integers are simulated", choices=tuple(TARGETS))
    float_layers: tuple[str, ...] = setting(
        (), 'layers that stay in float, by name or pattern, e.g. ("stem", "head")'
    )


@dataclasses.dataclass(frozen=True)
class EmaSettings(Section, path="config.ema"):
    """The exponential moving average that is evaluated and converted."""

    decay: float = setting(0.0, "per step; 0: no average", least=0, below=1)


@dataclasses.dataclass(frozen=True)
class EvalSettings(Section, path="config.eval"):
    """Evaluation."""

    batch_size: int = setting(256, "images, of all devices together")
    every_epochs: int = setting(1, "epochs between two evaluations", least=1)


@dataclasses.dataclass(frozen=True)
class CheckpointSettings(Section, path="config.checkpoint"):
    """Checkpoints."""

    every_epochs: int = setting(1, "epochs between two checkpoints", least=1)
    keep: int = setting(3, "newest checkpoints to keep; that of the best evaluation stays", least=1)


@dataclasses.dataclass(frozen=True)
class ReportSettings(Section, path="config.report"):
    """Reports."""

    every_steps: int = setting(50, "steps between two rows", least=1)


@dataclasses.dataclass(frozen=True)
class Settings(Section, path="config"):
    """All settings of a run."""

    seed: int = setting(
        0, "of initial weights, data order and augmentation", least=0, most=_SEEDS - 1
    )
    init_from: str = setting(
        "",
        "weights to start from: a run's workdir, a weights file, a hub name or a deploy directory",
    )
    init_entry: str = setting("", "of a weights file that holds several state dicts, e.g. ema")
    task: str = setting(
        "classification",
        "a class per image, or per pixel (docs/segmentation.md)",
        choices=("classification", "segmentation"),
    )
    protocol: str = setting(
        "whole",
        "evaluation of segmentation: images in one pass, or the windows of semseg or mmseg",
        choices=tuple(PROTOCOLS),
    )
    model: ModelSettings = ModelSettings()
    segmentation: SegmentationSettings = SegmentationSettings()
    bn: NormSettings = NormSettings()
    data: DataSettings = DataSettings()  # noqa: RUF009
    augment: AugmentSettings = AugmentSettings()  # noqa: RUF009
    train: TrainSettings = TrainSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    quantize: QuantizeSettings = QuantizeSettings()
    ema: EmaSettings = EmaSettings()
    eval: EvalSettings = EvalSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    report: ReportSettings = ReportSettings()

    @classmethod
    def from_config(cls, config: "ConfigDict | Settings") -> "Settings":
        """The settings that a configuration holds; settings that it lacks take their defaults.

        Args:
          config: from `default_config`, as a recipe and the command line change it. Settings
            are returned as they are.

        Raises:
          ValueError: the first setting that is unknown or cannot work, and what would.
        """
        if isinstance(config, Settings):
            return config
        return cls.from_mapping(config.to_dict())

    def check(self) -> None:
        """Checks how sections relate to each other."""
        if self.optimizer.warmup_epochs >= self.train.epochs:
            raise ValueError(
                f"config.optimizer.warmup_epochs={self.optimizer.warmup_epochs} must be less than "
                f"config.train.epochs={self.train.epochs}"
            )
        if self.train.class_weights == self.data.sampling == "balanced":
            raise ValueError(
                "config.train.class_weights and config.data.sampling are both balanced, which "
                "favors rare classes twice; give one of them"
            )
        if self.quantize.qat and self.bn.freeze_statistics:
            raise ValueError(
                "config.bn.freeze_statistics is not for config.quantize.qat, where "
                "config.quantize.statistics says what becomes of them; leave it off"
            )
        if self.quantize.qat and self.task == "segmentation":
            raise ValueError(
                'config.quantize.qat is for config.task="classification"; quantize a segmenter '
                "after its training"
            )
        variant = self.model.variant
        if (
            self.optimizer.equivalent_l2
            and isinstance(variant, Variant)
            and not any(penalized(block) for block in variant.blocks)
        ):
            raise ValueError(
                f"config.optimizer.equivalent_l2 has no effect on {variant.name}: none of its "
                "blocks adds up convolutions that have a norm each; leave it off"
            )
        plain = isinstance(variant, Variant) and variant.block == "repopt"
        if self.optimizer.scales and not (plain and self.task == "classification"):
            raise ValueError(
                f"config.optimizer.scales is for classifiers such as repopt_b1, but {variant.name} "
                "is not trained by a RepOptimizer; leave it empty"
            )
        if self.task == "segmentation":
            self._check_segmentation()
        elif isinstance(self.model.variant, ResNetVariant):
            raise ValueError(
                f"config.model.variant={self.model.variant.name} is a backbone of segmenters, "
                'config.task="segmentation"; classifiers are RepVGGs, e.g. A0'
            )

    def _check_segmentation(self) -> None:
        """Checks that nothing is asked for that would leave labels behind, or has no meaning."""
        augment, train = self.augment, self.train
        moved = {
            "config.augment.flip": augment.flip,
            "config.augment.policy": augment.policy != "none",
            "config.augment.affine": any(augment.affine.plain().values()),
            "config.augment.erase.probability": augment.erase.probability,
            "config.augment.mixup": augment.mixup,
            "config.augment.cutmix": augment.cutmix,
        }
        if found := [name for name, value in moved.items() if value]:
            raise ValueError(
                f"{found[0]} changes images without the labels of their pixels; for "
                'config.task="segmentation" leave it off, and use config.data.masks and '
                "config.augment.jitter"
            )
        without = {
            "config.train.label_smoothing": train.label_smoothing,
            "config.train.class_weights": train.class_weights != "none",
            "config.data.holdout": self.data.holdout,
            "config.data.sampling": self.data.sampling != "uniform",
        }
        if found := [name for name, value in without.items() if value]:
            raise ValueError(f'{found[0]} is for config.task="classification"; leave it off')

    def as_json(self) -> dict[str, Any]:
        """The settings as JSON, which `from_mapping` takes back."""
        return as_json(self.plain())

    def as_saved(self) -> dict[str, Any]:
        """The content of `config.json`: `as_json`, and which block of which package it has.

        Without that, another version of the package would go unnoticed.
        """
        found, variant = self.as_json(), self.model.variant
        if isinstance(variant, Variant) and isinstance(found["model"]["variant"], dict):
            found["model"]["variant"] = as_json(variant.as_saved("train"))
        return found

    @property
    def statistics_group(self) -> int:
        """Images that share batch statistics, as a number: `bn.group_size` or the batch size."""
        return self.bn.group_size or self.train.batch_size

    @property
    def mix_group(self) -> int:
        """Images that are mixed among themselves; 0 if all of a batch or none are."""
        augment = self.augment
        return augment.mix_group if augment.mixup or augment.cutmix else 0
