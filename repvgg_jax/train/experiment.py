"""An experiment: the settings as resolved objects on this machine."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from repvgg_jax.data.augment import Augmentation, Mixing, make_augmentation, make_mixing
from repvgg_jax.data.dataset import Dataset, load
from repvgg_jax.data.identity import class_counts
from repvgg_jax.data.transforms import TrainSizes
from repvgg_jax.model import RematPolicy, RepVGG, create_model, keep_convolutions
from repvgg_jax.normalize import Normalize
from repvgg_jax.quantization.qat import Qat, Simulation, with_ranges
from repvgg_jax.reparam import BUILT_IN, BlockSpec, rep_init, repopt_search
from repvgg_jax.segmentation.inference import PROTOCOLS
from repvgg_jax.segmentation.network import Segmenter, create_segmenter
from repvgg_jax.segmentation.task import Segmentation
from repvgg_jax.train.freezing import Frozen
from repvgg_jax.train.optimizer import make_optimizer, schedule
from repvgg_jax.train.scales import Scales, read_scales
from repvgg_jax.train.settings import Settings
from repvgg_jax.train.state import (
    TrainState,
    data_mesh,
    initial_state,
    state_from,
    state_sharding,
)
from repvgg_jax.train.step import Classification, Task, TrainStep
from repvgg_jax.variants import ALL, VARIANTS, Variant

logger = logging.getLogger(__name__)

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

REMAT_POLICIES: Mapping[str, bool | RematPolicy] = {
    "nothing": True,
    "convolutions": keep_convolutions,
}
"""What `config.model.remat_policy` stands for, as `create_model(remat=)` takes it."""


Model = RepVGG | Segmenter
Evaluated = Model | Simulation


def blocks_of(model: Model) -> tuple[BlockSpec, ...]:
    """The kinds of blocks in a network."""
    variant = model.variant
    own = variant.blocks if isinstance(variant, Variant) else ()
    return own if isinstance(model, RepVGG) else (*own, *BUILT_IN)


def build_model(settings: Settings, num_classes: int) -> Model:
    """The network in training form.

    Raises:
      ValueError: numbers that no segmenter has.
    """
    options: dict[str, Any] = {
        "bn_group_size": settings.bn.group_size,
        "train_form": settings.model.train_form,
        "remat": settings.model.remat and REMAT_POLICIES[settings.model.remat_policy],
        "dtype": _DTYPES[settings.model.dtype],
    }
    if settings.task == "segmentation":
        options |= settings.segmentation.plain()
        return create_segmenter(settings.model.variant, num_classes, **options)
    assert isinstance(settings.model.variant, Variant)
    return create_model(settings.model.variant, num_classes=num_classes, **options)


def variant_title(name: str) -> str:
    """A classifier in words: `RepVGG A0`, but `mobileone_s0`, whose name says what it is."""
    return name if name in ALL.keys() - VARIANTS.keys() else f"RepVGG {name}"


def network_title(model: Model) -> str:
    """A network in words, e.g. `RepVGG A0` or `PSPNet on RepVGG A0`."""
    variant = model.variant
    title = variant_title(variant.name) if isinstance(variant, Variant) else variant.name
    if not isinstance(model, Segmenter):
        return title
    return f"PSPNet on {title}{'-fast' if model.fast else ''}"


def build_task(settings: Settings, dataset: Dataset, *, training: bool = True) -> Task:
    """Loss and metrics.

    Raises:
      ValueError: labels of the other task.
    """
    count = len(dataset.classes)
    per_pixel = settings.task == "segmentation"
    if per_pixel != dataset.masks:
        has = "per pixel" if dataset.masks else "per image"
        right = "segmentation" if dataset.masks else "classification"
        raise ValueError(
            f"config.task={settings.task!r}, but {dataset.name} has a label {has}; give "
            f"config.task={right!r} or another config.data.source"
        )
    if per_pixel:
        return Segmentation(
            count,
            auxiliary_weight=settings.train.auxiliary_weight,
            protocol=PROTOCOLS[settings.protocol],
        )
    balanced = settings.train.class_weights == "balanced" and training
    return Classification(
        num_classes=count,
        label_smoothing=settings.train.label_smoothing,
        auxiliary_weight=settings.train.auxiliary_weight,
        class_weights=balanced_weights(class_counts(dataset.train, count)) if balanced else (),
    )


def balanced_weights(counts: np.ndarray) -> tuple[float, ...]:
    """A weight per class, inversely proportional to its images, 1 on average over all images."""
    present = counts > 0
    return tuple(np.where(present, counts.sum() / (present.sum() * np.maximum(counts, 1)), 1.0))


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a run consists of; nothing here depends on its directory.

    Attributes:
      settings: what everything is made from.
      dataset: training and validation images.
      model: the network in training form.
      task: loss and metrics.
      optimizer: the gradient transformation.
      normalize: pixels to the network's input.
      augment: pixels to the network's input, augmented.
      mixing: mixup and cutmix, or None.
      mesh: all devices, on one axis `data`.
      frozen: what stays as it is.
      steps_per_epoch: whole batches in the training images.
      total_steps: step at which the run ends.
      scales: of the RepOptimizer, or None.
    """

    settings: Settings
    dataset: Dataset
    model: Model
    task: Task
    optimizer: optax.GradientTransformation
    normalize: Normalize
    augment: Augmentation
    mixing: Mixing | None
    mesh: Mesh
    frozen: Frozen
    steps_per_epoch: int
    total_steps: int
    scales: Scales | None = None

    @classmethod
    def from_config(
        cls,
        config: ConfigDict | Settings,
        *,
        dataset: Dataset | None = None,
        devices: Sequence[jax.Device] | None = None,
        training: bool = True,
        scales: Scales | None = None,
    ) -> "Experiment":
        """Loads the data and builds everything else.

        Args:
          config: a complete configuration, or settings.
          dataset: replaces the one that `config.data.source` names.
          devices: default: all devices of all processes.
          training: False for evaluation alone, which needs no training images.
          scales: replace those that `config.optimizer.scales` names.

        Raises:
          ValueError: the first setting that cannot work, and what would.
        """
        settings = Settings.from_config(config)
        dataset = load(settings.data) if dataset is None else dataset
        mean, std = settings.data.mean, settings.data.std
        channels = dataset.image_shape[-1]
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != channels:
                raise ValueError(
                    f"config.data.{name}={values} has {len(values)} values, but images of "
                    f"{dataset.name} have {channels} channels"
                )
        batch_size = settings.train.batch_size
        if batch_size > len(dataset.train) and training:
            raise ValueError(
                f"config.train.batch_size={batch_size} is more than the {len(dataset.train):,} "
                f"training images of {dataset.name}"
            )
        steps_per_epoch = max(1, len(dataset.train) // batch_size)
        offset = settings.train.step_offset
        total_steps = settings.train.epochs * steps_per_epoch - offset
        normalize = Normalize(mean, std)
        if not len(dataset.evaluation):
            raise ValueError(f"{dataset.name} has no validation images to evaluate on")
        task = build_task(settings, dataset, training=training)
        model = build_model(settings, len(dataset.classes))
        frozen = Frozen.of(model, settings.train.freeze, settings.bn.freeze_statistics)
        if settings.optimizer.scales and scales is None and training:
            scales = read_scales(settings.optimizer.scales)
        if scales is None and training and getattr(model.variant, "block", None) == "repopt":
            logger.warning(
                "%s trains as a plain network: config.optimizer.scales names no scales",
                model.variant.name,
            )
        return cls(
            settings=settings,
            dataset=dataset,
            model=model,
            task=task,
            optimizer=make_optimizer(
                settings.optimizer,
                batch_size=batch_size,
                steps_per_epoch=steps_per_epoch,
                total_steps=total_steps,
                offset=offset,
                blocks=blocks_of(model),
                scales=scales,
            ),
            normalize=normalize,
            augment=make_augmentation(settings.augment, normalize),
            mixing=make_mixing(settings.augment),
            mesh=data_mesh(jax.devices() if devices is None else devices),
            frozen=frozen,
            steps_per_epoch=steps_per_epoch,
            total_steps=total_steps,
            scales=scales,
        )

    @property
    def train_step(self) -> TrainStep:
        """One step, as a pure function of state and batch."""
        settings = self.settings.optimizer
        return TrainStep(
            model=self.model,
            task=self.task,
            optimizer=self.optimizer,
            augment=self.augment,
            mixing=self.mixing,
            seed=self.settings.seed,
            equivalent_l2=settings.weight_decay if settings.equivalent_l2 else 0.0,
            blocks=blocks_of(self.model),
            ema_decay=self.settings.ema.decay,
            microbatches=self.settings.train.accumulate,
            group_size=self.settings.bn.group_size or 1,
            unrolled=self.mesh.devices.flat[0].platform == "cpu",
            frozen=self.frozen,
            qat=self.qat,
        )

    @property
    def qat(self) -> Qat | None:
        """The forward pass of quantization-aware training, if that is what is done."""
        quantize = self.settings.quantize
        if not quantize.qat:
            return None
        return Qat(
            observed_steps=max(1, round(quantize.observe * self.total_steps)),
            decay=quantize.range_decay,
            running=quantize.statistics == "running",
            target=quantize.target,
            float_layers=quantize.float_layers,
        )

    def evaluated(self, variables: Any) -> tuple[Evaluated, Any]:
        """The network whose accuracy counts while training, and its variables.

        Args:
          variables: of the training form.
        """
        if self.qat is None:
            return self.model, variables
        return self.qat.simulation(self.model), self.fuse(variables)

    @functools.cached_property
    def fuse(self) -> Callable[[Any], Any]:
        """A function of the training form's variables: the deploy form's, on all devices."""
        # Compiled as a whole; otherwise every operation on every shape would be a program.
        return jax.jit(
            self.model.fuse,
            out_shardings=self.replicated,
            compiler_options=self._quick_to_compile,
        )

    @property
    def _quick_to_compile(self) -> dict[str, Any] | None:
        """Options of small programs: on CPUs optimizing them takes longer than they run."""
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        return {"xla_backend_optimization_level": 0} if on_cpu else None

    def lower_step(self, size: tuple[int, int] | None = None) -> jax.stages.Lowered:
        """The train step for the devices of the mesh, ready to be compiled.

        Compiled, it takes a state, which it consumes, and a batch, and returns the next state
        and the metrics.

        Args:
          size: height and width of the images; default: that of the data set.
        """
        # Every microbatch is sharded over all devices; groups may span devices.
        microbatch_sharding = NamedSharding(self.mesh, PartitionSpec(None, "data"))
        jitted = jax.jit(
            dataclasses.replace(self.train_step, microbatch_sharding=microbatch_sharding),
            out_shardings=(self.state_sharding(), self.replicated),
            donate_argnums=0,
            compiler_options=self.settings.train.xla_options,
        )
        return jitted.lower(self.abstract_state(), self.abstract_batch(size))

    def initial_state(self) -> TrainState:
        """The state before the first step, on all devices, with random weights."""
        jitted = jax.jit(
            self._init,
            out_shardings=self.state_sharding(),
            compiler_options=self._quick_to_compile,
        )
        return jitted(jax.random.key(self.settings.seed))

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self._shapes,
            self.state_sharding(),
        )

    def abstract_batch(self, size: tuple[int, int] | None = None) -> dict[str, Any]:
        """Shapes, dtypes and shardings of a training batch; `size` as in `lower_step`."""
        batch = self.settings.train.batch_size
        height, width, channels = self.dataset.image_shape
        size = size or (height, width)
        label = ((batch, *size), "uint8") if self.dataset.masks else ((batch,), "int32")
        return {
            "image": jax.ShapeDtypeStruct(
                (batch, *size, channels), "uint8", sharding=self.over_batch
            ),
            "label": jax.ShapeDtypeStruct(*label, sharding=self.over_batch),
        }

    def state_sharding(self) -> TrainState:
        """The sharding of every leaf of the state, by `config.train.shard_optimizer`."""
        return state_sharding(
            self._shapes, self.mesh, shard_optimizer=self.settings.train.shard_optimizer
        )

    @property
    def replicated(self) -> NamedSharding:
        """Every device holds a copy."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def over_batch(self) -> NamedSharding:
        """Every device holds a share of the images."""
        return NamedSharding(self.mesh, PartitionSpec("data"))

    @functools.cached_property
    def _shapes(self) -> TrainState:
        return jax.eval_shape(self._init, jax.random.key(0))

    def _init(self, key: jax.Array) -> TrainState:
        average, shape = self.settings.ema.decay > 0, self.dataset.image_shape

        def start(params: Any) -> Any:
            if self.scales is None:
                return params
            return rep_init(repopt_search(), self.scales, params, jax.random.fold_in(key, 1))

        state = initial_state(self.model, self.optimizer, key, shape, average=average, start=start)
        if self.qat is None:
            return state
        variables = with_ranges(state.variables, self.qat.unobserved(self.model))
        return state_from(variables, self.optimizer, average=average)

    @property
    def size_at(self) -> TrainSizes:
        """Height and width of the training images in an epoch, counted from 0."""
        return TrainSizes(self.settings.data.sizes, otherwise=self.dataset.image_shape[:2])

    @property
    def obstacle(self) -> str | None:
        """Why the network has no deploy form; None if it has one."""
        blocks = self.model.variant.blocks if isinstance(self.model, RepVGG) else ()
        return next((block.obstacle for block in blocks if block.obstacle), None)

    def is_due(self, every_epochs: int, step: int) -> bool:
        """Whether something that happens every so many epochs, and at the end, is due."""
        period = every_epochs * self.steps_per_epoch
        return step == self.total_steps or self.position(step) % period == 0

    def position(self, step: int) -> int:
        """Batches of the present size from the start of the data to this step."""
        return step + self.settings.train.step_offset

    def learning_rate(self, step: int) -> float:
        """The learning rate with which that step was taken, counted from 1."""
        return float(self._schedule(step - 1))

    @functools.cached_property
    def _schedule(self) -> optax.Schedule:
        rate = schedule(
            self.settings.optimizer,
            batch_size=self.settings.train.batch_size,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps,
            offset=self.settings.train.step_offset,
        )
        return jax.jit(rate, compiler_options=self._quick_to_compile)

    def describe(self) -> str:
        """The run as one line of key=value."""
        settings, devices = self.settings, self.mesh.devices
        batch, processes = settings.train.batch_size, jax.process_count()
        fields = {
            "task": settings.task if settings.task != "classification" else None,
            "model": self.model.variant.name,
            "dtype": settings.model.dtype,
            "devices": f"{devices.size}x{devices.flat[0].platform}",
            "processes": processes if processes > 1 else None,
            "data": self.dataset.name,
            "image": "x".join(map(str, self.dataset.image_shape)),
            "train": len(self.dataset.train),
            "eval": len(self.dataset.evaluation),
            "epochs": settings.train.epochs,
            "steps_per_epoch": self.steps_per_epoch,
            "batch": f"{batch} ({batch // devices.size}/device)",
            "microbatches": settings.train.accumulate if settings.train.accumulate > 1 else None,
            "bn_group": settings.statistics_group,
        }
        return " ".join(f"{name}={value}" for name, value in fields.items() if value is not None)
