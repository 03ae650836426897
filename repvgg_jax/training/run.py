"""A run: everything that a configuration means on this machine."""

import dataclasses
from typing import Any

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from repvgg_jax.data.augment import Augment, Normalise, make_augment
from repvgg_jax.data.dataset import Dataset, load
from repvgg_jax.model import RepVGG
from repvgg_jax.training import config as configs
from repvgg_jax.training import optimizer as optimizers
from repvgg_jax.training.state import TrainState, initial_state
from repvgg_jax.training.task import Classification


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
      augment: or None.
      mesh: all devices, on one axis `data`.
      steps_per_epoch: whole batches in the training images.
      total_steps: of the run.
    """

    config: ConfigDict
    dataset: Dataset
    model: RepVGG
    task: Classification
    optimizer: optax.GradientTransformation
    normalise: Normalise
    augment: Augment | None
    mesh: Mesh
    steps_per_epoch: int
    total_steps: int

    @classmethod
    def from_config(cls, config: ConfigDict) -> "Run":
        """Loads the data and builds the network.

        Raises:
          ValueError: the first setting that cannot work, and what would.
        """
        dataset = load(config.data)
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
        settings = config.optimizer
        return cls(
            config=config,
            dataset=dataset,
            model=configs.model_of(config, num_classes=len(dataset.classes)),
            task=Classification(
                num_classes=len(dataset.classes),
                label_smoothing=config.train.label_smoothing,
                auxiliary_weight=config.train.auxiliary_weight,
            ),
            optimizer=optimizers.sgd(
                optimizers.schedule(
                    learning_rate=settings.learning_rate,
                    batch_size=batch_size,
                    warmup_steps=round(settings.warmup_epochs * steps_per_epoch),
                    total_steps=total_steps,
                ),
                momentum=settings.momentum,
                nesterov=settings.nesterov,
                weight_decay=settings.weight_decay,
            ),
            normalise=Normalise(tuple(config.data.mean), tuple(config.data.std)),
            augment=make_augment(config.data.augment, **config.data.affine),
            # Explicit axes, today's default, break gathers on a sharded batch.
            mesh=jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,)),
            steps_per_epoch=steps_per_epoch,
            total_steps=total_steps,
        )

    @property
    def replicated(self) -> NamedSharding:
        """Every device holds all of it: parameters, statistics, optimiser state."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def over_batch(self) -> NamedSharding:
        """Every device holds its share of the images."""
        return NamedSharding(self.mesh, PartitionSpec("data"))

    def _init(self, key: jax.Array) -> TrainState:
        return initial_state(self.model, self.optimizer, key, self.dataset.image_shape)

    def initial_state(self) -> TrainState:
        """The state before the first step, on all devices."""
        return jax.jit(self._init, out_shardings=self.replicated)(jax.random.key(self.config.seed))

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state, without computing it."""
        shapes = jax.eval_shape(self._init, jax.random.key(0))
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.replicated),
            shapes,
        )

    def abstract_batch(self) -> dict[str, Any]:
        """Shapes, dtypes and shardings of a training batch."""
        batch = self.config.train.batch_size
        return {
            "image": jax.ShapeDtypeStruct(
                (batch, *self.dataset.image_shape), "uint8", sharding=self.over_batch
            ),
            "label": jax.ShapeDtypeStruct((batch,), "int32", sharding=self.over_batch),
        }

    def describe(self) -> str:
        """What will run on what, in a line."""
        variant, device = self.model.variant, jax.devices()[0]
        processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
        group = self.config.bn.group_size or self.config.train.batch_size
        return (
            f"RepVGG {variant.name} ({self.config.model.dtype}) on {jax.device_count()} "
            f"{device.platform} device{'s' if jax.device_count() > 1 else ''}{processes}: "
            f"{self.dataset.name}, {len(self.dataset.train):,} images of "
            f"{'x'.join(map(str, self.dataset.image_shape))} to learn from and "
            f"{len(self.dataset.evaluation):,} held out, {self.config.train.epochs} epochs of "
            f"{self.steps_per_epoch} steps, batch {self.config.train.batch_size} "
            f"({self.config.train.batch_size // jax.device_count()} a device, "
            f"batch normalisation over {group})"
        )
