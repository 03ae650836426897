"""A run: everything that a configuration means on this machine."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from repvgg_jax.data.augment import Augmentation, Mixing, make_augmentation, make_mixing
from repvgg_jax.data.dataset import Dataset, load
from repvgg_jax.data.transforms import TrainSizes
from repvgg_jax.model import RepVGG
from repvgg_jax.normalize import Normalize
from repvgg_jax.train import config as configs
from repvgg_jax.train.compiling import parse_options
from repvgg_jax.train.optimizer import make_optimizer
from repvgg_jax.train.sharding import data_mesh, state_sharding
from repvgg_jax.train.state import TrainState, initial_state
from repvgg_jax.train.step import TrainStep
from repvgg_jax.train.task import Classification


@dataclasses.dataclass(frozen=True)
class Run:
    """What a configuration means on this machine; nothing here depends on the workdir.

    Attributes:
      config: where everything comes from.
      dataset: images to learn from and to be judged by.
      model: the network in training form.
      task: loss and metrics.
      optimizer: the gradient transformation.
      normalise: pixels to what the network takes.
      augment: the same with augmentation, for training.
      mixing: of images and targets, or None.
      mesh: all devices, on one axis `data`.
      steps_per_epoch: whole batches in the training images.
      total_steps: of the run.
    """

    config: ConfigDict
    dataset: Dataset
    model: RepVGG
    task: Classification
    optimizer: optax.GradientTransformation
    normalise: Normalize
    augment: Augmentation
    mixing: Mixing | None
    mesh: Mesh
    steps_per_epoch: int
    total_steps: int

    @classmethod
    def from_config(
        cls,
        config: ConfigDict,
        *,
        dataset: Dataset | None = None,
        devices: Sequence[jax.Device] | None = None,
    ) -> "Run":
        """Loads the data and builds the network.

        Args:
          config: complete.
          dataset: instead of the one that `config.data.source` names.
          devices: instead of all that jax finds, of all processes.

        Raises:
          ValueError: the first setting that cannot work, and what would.
        """
        dataset = load(config.data) if dataset is None else dataset
        channels = dataset.image_shape[-1]
        for name in ("mean", "std"):
            if len(config.data[name]) != channels:
                raise ValueError(
                    f"config.data.{name}={tuple(config.data[name])} has {len(config.data[name])} "
                    f"values, but images of {dataset.name} have {channels} channels"
                )
        batch_size = config.train.batch_size
        if batch_size > len(dataset.train):
            raise ValueError(
                f"config.train.batch_size={batch_size} is more than the {len(dataset.train):,} "
                f"training images of {dataset.name}"
            )
        steps_per_epoch = len(dataset.train) // batch_size
        total_steps = config.train.epochs * steps_per_epoch
        normalise = Normalize(tuple(config.data.mean), tuple(config.data.std))
        return cls(
            config=config,
            dataset=dataset,
            model=configs.model_of(config, num_classes=len(dataset.classes)),
            task=Classification(
                num_classes=len(dataset.classes),
                label_smoothing=config.train.label_smoothing,
                auxiliary_weight=config.train.auxiliary_weight,
            ),
            optimizer=make_optimizer(
                config.optimizer,
                batch_size=batch_size,
                steps_per_epoch=steps_per_epoch,
                total_steps=total_steps,
            ),
            normalise=normalise,
            augment=make_augmentation(config.augment, normalise),
            mixing=make_mixing(config.augment),
            mesh=data_mesh(jax.devices() if devices is None else devices),
            steps_per_epoch=steps_per_epoch,
            total_steps=total_steps,
        )

    @property
    def train_step(self) -> TrainStep:
        """One step of this run, as a pure function of state and batch."""
        settings = self.config.optimizer
        return TrainStep(
            model=self.model,
            task=self.task,
            optimizer=self.optimizer,
            augment=self.augment,
            mixing=self.mixing,
            seed=self.config.seed,
            equivalent_l2=settings.weight_decay if settings.equivalent_l2 else 0.0,
            ema_decay=self.config.ema.decay,
            pieces=self.config.train.accumulate,
            group_size=configs.bn_group_size(self.config) or 1,
            unrolled=self.mesh.devices.flat[0].platform == "cpu",
        )

    @property
    def replicated(self) -> NamedSharding:
        """Every device holds all of it: parameters, statistics, optimiser state."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def over_batch(self) -> NamedSharding:
        """Every device holds its share of the images."""
        return NamedSharding(self.mesh, PartitionSpec("data"))

    def state_sharding(self) -> TrainState:
        """Where every leaf of the state lies, as `config.train.shard_optimizer` says."""
        shapes = jax.eval_shape(self._init, jax.random.key(0))
        return state_sharding(shapes, self.mesh, shard_optimizer=self.config.train.shard_optimizer)

    def _init(self, key: jax.Array) -> TrainState:
        return initial_state(
            self.model,
            self.optimizer,
            key,
            self.dataset.image_shape,
            average=self.config.ema.decay > 0,
        )

    def initial_state(self) -> TrainState:
        """The state before the first step, on all devices."""
        # It runs once: on CPUs optimising it costs seconds, and it takes milliseconds.
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        options = {"xla_backend_optimization_level": 0} if on_cpu else None
        jitted = jax.jit(self._init, out_shardings=self.state_sharding(), compiler_options=options)
        return jitted(jax.random.key(self.config.seed))

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state, without computing it."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            jax.eval_shape(self._init, jax.random.key(0)),
            self.state_sharding(),
        )

    @property
    def size_at(self) -> TrainSizes:
        """Height and width of the training images of an epoch, counted from 0."""
        changes = tuple((epoch, size) for epoch, size in self.config.data.sizes)
        return TrainSizes(changes, otherwise=self.dataset.image_shape[0])

    def lower_step(self, size: int | None = None) -> jax.stages.Lowered:
        """The train step for the devices of the mesh, ready to be compiled.

        Compiled, it takes a state, which it consumes, and a batch, and returns the next state
        and the metrics.

        Args:
          size: height and width of the images; None for what the data set has.
        """
        # Every device has its share of every piece, if need be of groups that others share.
        over_pieces = NamedSharding(self.mesh, PartitionSpec(None, "data"))
        jitted = jax.jit(
            dataclasses.replace(self.train_step, over_pieces=over_pieces),
            out_shardings=(self.state_sharding(), self.replicated),
            donate_argnums=0,
            compiler_options=parse_options(self.config.train.compiler_options),
        )
        return jitted.lower(self.abstract_state(), self.abstract_batch(size))

    def abstract_batch(self, size: int | None = None) -> dict[str, Any]:
        """Shapes, dtypes and shardings of a training batch."""
        batch = self.config.train.batch_size
        height, width, channels = self.dataset.image_shape
        shape = (batch, size or height, size or width, channels)
        return {
            "image": jax.ShapeDtypeStruct(shape, "uint8", sharding=self.over_batch),
            "label": jax.ShapeDtypeStruct((batch,), "int32", sharding=self.over_batch),
        }

    def describe(self) -> str:
        """What will run on what, in a line."""
        variant, device = self.model.variant, jax.devices()[0]
        processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
        batch, pieces = self.config.train.batch_size, self.config.train.accumulate
        group = configs.bn_group_size(self.config) or batch
        in_pieces = f" in {pieces} pieces" if pieces > 1 else ""
        return (
            f"RepVGG {variant.name} ({self.config.model.dtype}) on {jax.device_count()} "
            f"{device.platform} device{'s' if jax.device_count() > 1 else ''}{processes}: "
            f"{self.dataset.name}, {len(self.dataset.train):,} images of "
            f"{'x'.join(map(str, self.dataset.image_shape))} to learn from and "
            f"{len(self.dataset.evaluation):,} held out, {self.config.train.epochs} epochs of "
            f"{self.steps_per_epoch} steps, batch {batch} "
            f"({batch // jax.device_count()} a device{in_pieces}, "
            f"batch normalisation over {group})"
        )
