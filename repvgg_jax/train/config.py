"""Configurations: the default one, the recipes of the papers, and what `--config` names.

Recipes state lengths in epochs and learning rates per 256 images, so that another batch size,
given on the command line, scales both. Those of the papers assume eight accelerators with 32
images each; any number works that divides the batch. They read ImageNet as TFDS prepared it;
`--config.data.source=folder:/data/imagenet` or `records:/data/imagenet` read it otherwise
(docs/data.md).
"""

import dataclasses
import importlib.machinery
import importlib.util
import pathlib
import sys
import traceback
import types
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, FieldReference

from repvgg_jax import cli
from repvgg_jax.segmentation.resnet import RESNETS, ResNetVariant
from repvgg_jax.settings import Section
from repvgg_jax.text import did_you_mean, one_line
from repvgg_jax.train.settings import Settings
from repvgg_jax.variants import Variant, get_variant

_PACKAGE = str(pathlib.Path(__file__).parents[1])  # as tracebacks name it


def default_config(variant: str | Variant | ResNetVariant = "A0") -> ConfigDict:
    """A complete, locked configuration; `repvgg_jax.train.settings` documents every setting.

    Args:
      variant: a name in `VARIANTS` or `FAMILY`, `ResNet-50` or `ResNet-101` for a segmenter, or a
        `Variant` of your own.

    Raises:
      ValueError: an unknown name.
    """
    if isinstance(variant, str):
        variant = RESNETS[variant] if variant in RESNETS else get_variant(variant)
    settings = Settings()
    model = dataclasses.replace(settings.model, variant=variant)
    task = "segmentation" if isinstance(variant, ResNetVariant) else settings.task
    return as_config(dataclasses.replace(settings, model=model, task=task))


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


def mobileone_300(size: str) -> ConfigDict:
    """MobileOne, section 4 of the paper; the authors published no training code.

    From the paper: 300 epochs of SGD with a batch of 256 on 8 GPUs, cosine from 0.1, weight decay
    1e-4, label smoothing 0.1, averages with 0.9995; crops and flips, and AutoAugment for S2 to S4.
    What differs: the authors let the decay fall to 1e-5 along the same cosine, and images and the
    strength of AutoAugment grow in training. mmpretrain's reading of the former is
    `config.data.sizes=((0, 160), (37, 192), (112, 224))`. Convolutions compute in bfloat16.
    """
    config = paper_120(f"mobileone_{size}")
    config.train.epochs = 300
    config.train.label_smoothing = 0.1
    config.ema.decay = 0.9995
    if size not in ("s0", "s1"):
        config.augment.policy = "autoaugment"
    return config


def qarepvgg_120(size: str) -> ConfigDict:
    """QARepVGG, by the authors' script and log of B0, `train_QAV2_B0.sh` and `B0_log.txt`.

    120 epochs, weight decay 4e-5, no label smoothing, eight GPUs with 128 images each; the log's
    learning rate of 0.4 is 0.1 per 256 images. What differs: theirs ends at 1e-5, ours at 0.
    """
    config = paper_120(f"qarepvgg_{size}")
    config.train.batch_size = 1024
    config.bn.group_size = 128
    config.optimizer.weight_decay = 4e-5
    return config


def repopt_120(size: str) -> ConfigDict:
    """RepOpt-VGG, by the command in the authors' README and their code.

    120 epochs, 5 of warm-up, a batch of 256 on 8 GPUs, cosine from 0.1, Nesterov's momentum, weight
    decay 4e-5, label smoothing 0.1, and the policy `raug15`. Only the dtype, bfloat16, is ours.
    `config.optimizer.scales` has no default: it names a run of `repopt_search_240`, or the
    authors' file for this network.
    """
    config = paper_120(f"repopt_{size}")
    config.train.label_smoothing = 0.1
    config.optimizer.warmup_epochs = 5.0
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 4e-5
    config.augment.policy = "raug15"
    return config


def repopt_search_240(size: str) -> ConfigDict:
    """The search for the scales of RepOpt-VGG, by the command in the authors' README.

    The branched network, whose scales train: 240 epochs of CIFAR-100, 10 of warm-up, otherwise as
    `repopt_120` without the policy. Gradients are clipped at 5, which is refused where the scales
    are used. (`readme_reproduce_experiments.txt` there has 5 epochs of warm-up on one GPU, without
    label smoothing and clipping.) What differs: the authors pad images by 4 pixels and crop 32.
    """
    config = repopt_120(f"{size}_search")
    config.data.source = "tfds:cifar100"
    config.data.eval_split = "test"
    config.data.num_classes = 100
    config.data.train_size = 32
    config.data.eval_crop = 1.0
    config.data.crop_scale = (0.25, 1.0)
    config.data.mean, config.data.std = (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)
    config.augment.policy = "none"
    config.train.epochs = 240
    config.optimizer.warmup_epochs = 10.0
    config.optimizer.clip_norm = 5.0
    return config


def cityscapes(variant: str, *, fast: bool = False) -> ConfigDict:
    """Table 8: PSPNet on Cityscapes, 40 epochs of 713x713 crops (section 4.3).

    From the paper: SGD, learning rate 0.01 that falls with the power 0.9 of the steps left,
    weight decay 1e-4, a batch of 16, 40 epochs. From the authors' example, which is based on
    hszhao/semseg: crops of 713 pixels and how they are made, an auxiliary loss of 0.4, batch
    statistics of all 16 images, and the evaluation. Three things differ from semseg on purpose,
    as elsewhere here: biases and scales of norms do not decay, the last incomplete batch of an
    epoch is left out, and pixels stay uint8 until they are normalized. semseg also trains all but
    the backbone ten times faster, which the paper does not say; `config.optimizer.head_factor=10.0`
    does. mmsegmentation's protocol is another: crops of 769 pixels and steps, not epochs;
    `config.protocol="mmseg"` evaluates as it does.
    """
    config = default_config(variant)
    config.task = "segmentation"
    config.protocol = "semseg"
    config.segmentation.fast = fast
    config.model.dtype = "bfloat16"
    config.data.source = "cityscapes:data/cityscapes"
    config.data.num_classes = 19
    config.data.train_size = 713
    config.data.eval_size = (1024, 2048)
    config.data.workers = 8
    config.train.batch_size = 16
    config.train.epochs = 40
    config.train.auxiliary_weight = 0.4
    config.optimizer.learning_rate = 0.16  # 0.01 at a batch of 16
    config.optimizer.schedule = "poly"
    config.optimizer.weight_decay = 1e-4
    config.eval.batch_size = 8
    config.eval.every_epochs = 10
    return config


class RecipeError(flags.Error):
    """A recipe that cannot be read; the message is one line. No ValueError: absl rewords those."""


class RecipeParser(flags.ArgumentParser):
    """Parser of `--config`: `FILE.py`, a recipe's name, either with `:ARGUMENT`, or a run."""

    syntactic_help = "a recipe or a run directory"

    def parse(self, argument: str) -> ConfigDict:
        """The locked configuration.

        Raises:
          RecipeError: no such file, an error in it, or no configuration from it.
          ModuleNotFoundError: this package lacks a library of an extra.
        """
        if is_run(argument):
            return _of_run(argument)
        file, *rest = argument.split(":", maxsplit=1)
        if (found := find_recipe(file)) is None:
            raise RecipeError(_missing(file))
        file = str(found)
        try:
            config = _load(file).get_config(*rest)
        except Exception as error:  # whatever the code of a user raises
            if isinstance(error, ModuleNotFoundError) and _is_of_an_extra(error):
                raise
            raise RecipeError(_describe(error, file)) from error
        if not isinstance(config, ConfigDict):
            raise RecipeError(
                f"{file}: get_config() must return a ConfigDict, not {one_line(repr(config), 60)}"
            )
        return config.lock()

    def flag_type(self) -> str:
        """What `--help` says of the values of this flag."""
        return "recipe"


def find_recipe(text: str) -> pathlib.Path | None:
    """The file that `--config` names: a path, or one of `recipes` in any of its spellings."""
    path = pathlib.Path(text)
    if path.is_file():
        return path
    name = text.lower().replace("-", "_").removeprefix("repvgg_").removeprefix("repvgg")
    return recipes().get(name)


def recipes() -> dict[str, pathlib.Path]:
    """Files of the recipes by name, e.g. `b1` or `ablation/acb`.

    They are in the installed package, or in its checkout.
    """
    package = pathlib.Path(_PACKAGE)
    folders = (package / "configs", package.parent / "configs")
    folder = next((each for each in folders if each.is_dir()), folders[0])
    found = sorted(folder.rglob("*.py"), key=lambda path: (len(path.parts), path))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in found}


def is_run(source: str | pathlib.Path) -> bool:
    """Whether `source` is a directory that has the configuration of a run."""
    return pathlib.Path(source, "config.json").is_file()


def default_recipe(arguments: Sequence[str], otherwise: str | None) -> str | None:
    """What `--config` is if it is not given.

    Args:
      arguments: of the command line, with the name of the program.
      otherwise: what it is if no run is evaluated, resumed or, with --workdir, started from.
    """
    known = flags.FlagValues()
    for name in ("workdir", "init_from"):
        flags.DEFINE_string(name, None, "", flag_values=known)
    flags.DEFINE_bool("eval_only", False, "", flag_values=known)
    known.set_gnu_getopt(True)  # flags after unknown ones
    known(arguments, known_only=True)
    workdir, init_from = known.workdir, known.init_from
    if known.eval_only:
        found = [path for path in (init_from, workdir) if path and is_run(path)]
    else:
        found = [path for path in (workdir, init_from) if path and workdir and _is_begun(path)]
    return found[0] if found else otherwise


# Flags of train.py and what they need to have an effect; "-" in front: what they have none with.
_NEEDS = {
    "step": "eval_only",
    "by_class": "eval_only",
    "output": "eval_only",
    "class_map": "eval_only",
    "real_labels": "eval_only",
    "entry": "init_from",
    "profile_steps": "-eval_only",
    "extend": "-eval_only",
}
CHECKED_FLAGS = (*_NEEDS, "eval_only", "init_from")


def check_flags(values: Mapping[str, Any]) -> None:
    """Checks that every flag that is given has an effect.

    Args:
      values: of `CHECKED_FLAGS`, by name.

    Raises:
      ValueError: one would have none.
    """
    for name, needs in _NEEDS.items():
        other = needs.removeprefix("-")
        if values[name] and bool(values[other]) == needs.startswith("-"):
            how = "no effect with" if needs.startswith("-") else "an effect only with"
            raise ValueError(f"--{name} has {how} --{other}")


def _is_begun(path: str) -> bool:
    """Whether there is a checkpoint; settings of a run that failed before are not worth keeping."""
    from repvgg_jax.train.workdir import Workdir

    return is_run(path) and Workdir(pathlib.Path(path)).has_checkpoint


def _of_run(path: str) -> ConfigDict:
    from repvgg_jax.train.workdir import Workdir

    try:
        return as_config(Workdir(pathlib.Path(path)).read_settings()).lock()
    except ValueError as error:
        raise RecipeError(str(error)) from error


def _load(file: str) -> types.ModuleType:
    loader = importlib.machinery.SourceFileLoader("config_config", file)
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module  # for what is pickled or a dataclass
    loader.exec_module(module)
    if not callable(getattr(module, "get_config", None)):
        raise RecipeError(
            f"{file}: no function get_config(); a recipe defines it, and it returns a ConfigDict"
        )
    return module


def _missing(file: str) -> str:
    found = recipes()
    hint = did_you_mean(pathlib.Path(file).stem, found)
    there = f"; {hint}recipes by name: {', '.join(found)}" if found else ""
    what = "not a run directory (no config.json)" if pathlib.Path(file).is_dir() else "no such file"
    return f"--config={file}: {what}{there}"


def _describe(error: Exception, file: str) -> str:
    """Where in the recipe an error arose, and what it is."""
    if isinstance(error, RecipeError):
        return str(error)
    if isinstance(error, SyntaxError):
        code = f": {one_line(error.text, 60)}" if error.text else ""
        return f"{error.filename}:{error.lineno}: {error.msg}{code}"
    frames = traceback.extract_tb(error.__traceback__)
    line = next((frame.lineno for frame in reversed(frames) if frame.filename == file), None)
    where = file if line is None else f"{file}:{line}"
    # ml_collections refuses unknown settings with an AttributeError that holds a KeyError.
    setting = isinstance(error, AttributeError) and isinstance(error.args[0], KeyError)
    if setting or isinstance(error, (ImportError, OSError, TypeError, ValueError)):
        return f"{where}: {' '.join(cli.text_of(error).split())}"
    return f"{where}: {type(error).__name__}: {error}"


def _is_of_an_extra(error: ModuleNotFoundError) -> bool:
    """Whether it is this package that imports the module which is missing."""
    frames = traceback.extract_tb(error.__traceback__)
    importers = [f.filename for f in frames if not f.filename.startswith("<frozen importlib")]
    return importers[-1].startswith(_PACKAGE)
