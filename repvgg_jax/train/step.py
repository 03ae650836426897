"""The task, and one step of training and of evaluation, as pure functions."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from repvgg_jax.data.augment import Augmentation, Mixing
from repvgg_jax.normalize import Normalize
from repvgg_jax.quantization.qat import Qat, Simulation
from repvgg_jax.reparam import BUILT_IN, BlockSpec, equivalent_l2
from repvgg_jax.train.freezing import Frozen
from repvgg_jax.train.state import TrainState

_DROPOUT = 0x64726F70  # "drop", which sets its keys apart from those of the augmentation

MOST_CONFUSED = 1000
"""Classes up to which the confusion matrix is counted; it has their number squared entries."""

Batch = Mapping[str, Any]
Sums = Mapping[str, jax.Array]
Means = dict[str, np.ndarray]


class Task(Protocol):
    """What a network is trained for; `Classification` and `repvgg_jax.segmentation.task`."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""

    @property
    def each(self) -> str:
        """What has a class: an image or a pixel."""

    @property
    def headline(self) -> str:
        """The metric that says how good a network is."""

    @property
    def names(self) -> Mapping[str, str]:
        """Metrics in words: the metric of `headline`, and one beside it."""

    def targets(self, labels: jax.Array) -> jax.Array:
        """What the loss takes of the labels of a batch."""

    def loss(
        self, logits: jax.Array, auxiliary: Mapping[str, jax.Array], targets: jax.Array
    ) -> tuple[jax.Array, Sums]:
        """The loss to minimize, and the batch's metrics, `loss` and `accuracy` among them."""

    def outputs(self, network: Callable[[jax.Array], jax.Array], images: jax.Array) -> jax.Array:
        """What evaluation compares with labels, of normalized images."""

    def evaluate(self, outputs: jax.Array, batch: Mapping[str, Any]) -> Sums:
        """Sums over the images of a batch that its `mask` keeps."""

    def means(self, parts: Sequence[Sums]) -> Means:
        """Metrics of a data set from the sums of its batches."""

    def per_image(self, outputs: jax.Array, batch: Mapping[str, Any]) -> Sums:
        """Numbers of every image of a batch, `loss` among them, (images,) each."""

    def examples(self, outputs: jax.Array, batch: Mapping[str, Any]) -> Mapping[str, jax.Array]:
        """What `draw` shows of a batch; empty for no picture."""

    def draw(
        self, examples: Mapping[str, np.ndarray], classes: Sequence[str]
    ) -> Callable[[Any], None] | None:
        """A function that draws them to a file; None for no picture."""


@dataclasses.dataclass(frozen=True)
class Classification:
    """Classification with one label per image.

    Attributes:
      num_classes: number of classes.
      label_smoothing: fraction of the target that goes to all classes evenly.
      auxiliary_weight: weight of each auxiliary head's loss.
      class_weights: of the loss of each class, 1 on average over images; empty for 1.
    """

    num_classes: int
    label_smoothing: float = 0.0
    auxiliary_weight: float = 0.0
    class_weights: tuple[float, ...] = ()

    each = "image"
    """What has a class."""

    headline = "accuracy"
    """The metric that says how good a network is."""

    names: ClassVar = {"accuracy": "accuracy", "macro_accuracy": "macro accuracy"}
    """Metrics in words: the metric of `headline`, and one beside it."""

    def targets(self, labels: jax.Array) -> jax.Array:
        """Smoothed one-hot targets (images, classes) of labels (images,)."""
        one_hot = jax.nn.one_hot(labels, self.num_classes)
        return optax.smooth_labels(one_hot, self.label_smoothing)

    def loss(
        self, logits: jax.Array, auxiliary: Mapping[str, jax.Array], targets: jax.Array
    ) -> tuple[jax.Array, Sums]:
        """The loss to minimize, and the batch's metrics.

        An image counts as correct if the class with the largest target has the largest logit.

        Args:
          logits: (images, classes).
          auxiliary: logits of the auxiliary heads, by name; may be empty.
          targets: probabilities (images, classes).
        """
        weighted = targets
        if self.class_weights:
            # Not divided by the weights of the batch, so that the mean over microbatches is exact.
            weighted = targets * jnp.asarray(self.class_weights, jnp.float32)[None]
        main = optax.softmax_cross_entropy(logits, weighted).mean()
        heads = [optax.softmax_cross_entropy(head, weighted).mean() for head in auxiliary.values()]
        loss = main + self.auxiliary_weight * sum(heads, start=jnp.zeros_like(main))
        return loss, {"loss": loss, "accuracy": _in_top(1, logits, targets.argmax(-1)).mean()}

    def outputs(self, network: Callable[[jax.Array], jax.Array], images: jax.Array) -> jax.Array:
        """What evaluation compares with labels: logits."""
        return network(images)

    def evaluate(self, logits: jax.Array, batch: Mapping[str, Any]) -> Sums:
        """Sums over the images of a batch that its `mask` keeps.

        `loss` is without smoothing, so that it is comparable between recipes. `accuracy` and
        `top5` (if there are more than five classes) count the images whose label is among the
        one and five largest logits; `class_count` and `class_accuracy` (classes,) are the number
        of images and of correct ones per label. Up to `MOST_CONFUSED` classes, `confusion`
        (classes, classes) is the number of images by label and by predicted class.
        """
        mask, labels = batch["mask"].astype(jnp.float32), batch["label"]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        right = _in_top(1, logits, labels) * mask
        by_label = jax.nn.one_hot(labels, self.num_classes) * mask[:, None]
        sums = {
            "count": mask.sum(),
            "loss": (loss * mask).sum(),
            "accuracy": right.sum(),
            "class_count": by_label.sum(axis=0),
            "class_accuracy": (by_label * right[:, None]).sum(axis=0),
        }
        if self.num_classes <= MOST_CONFUSED:
            predicted = jax.nn.one_hot(logits.argmax(-1), self.num_classes)
            exact = jax.lax.Precision.HIGHEST
            sums["confusion"] = jnp.matmul(by_label.T, predicted, precision=exact)
        if self.num_classes > 5:
            sums["top5"] = (_in_top(5, logits, labels) * mask).sum()
        return sums

    def means(self, parts: Sequence[Sums]) -> Means:
        """Means over the images of all batches: `loss`, `accuracy`, `top5`, and `class_accuracy`.

        `macro_accuracy` is the mean over classes that have images. `images` is the number of
        images counted, all that could be decoded, and `class_images` that by label; `confusion`
        as `evaluate` counts it. `class_accuracy` is NaN for a class without images.
        """
        # On the host: on devices each shape would be a program.
        sums = jax.tree.map(lambda *values: np.sum(values, axis=0), *jax.device_get(parts))
        count, class_count = sums.pop("count"), sums.pop("class_count")
        class_correct, confusion = sums.pop("class_accuracy"), sums.pop("confusion", None)
        with np.errstate(invalid="ignore"):
            means = {name: np.asarray(value / count) for name, value in sums.items()}
            means["class_accuracy"] = class_correct / class_count
            known = means["class_accuracy"][class_count > 0]
            means["macro_accuracy"] = np.asarray(known.mean() if known.size else np.nan)
        counts = {"images": np.asarray(count, np.int64), "class_images": class_count}
        return {**means, **counts, **({} if confusion is None else {"confusion": confusion})}

    def per_image(self, logits: jax.Array, batch: Mapping[str, Any]) -> Sums:
        """For each image, the loss without label smoothing, the label and the predicted class."""
        labels = batch["label"]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return {"loss": loss, "label": labels, "predicted": logits.argmax(-1)}

    def examples(self, outputs: jax.Array, batch: Mapping[str, Any]) -> Mapping[str, jax.Array]:
        """An empty mapping: there is no picture."""
        return {}

    def draw(
        self, examples: Mapping[str, np.ndarray], classes: Sequence[str]
    ) -> Callable[[Any], None] | None:
        """None: there is no picture."""
        return None


def _in_top(k: int, logits: jax.Array, labels: jax.Array) -> jax.Array:
    """1 if the label's logit is among the k largest, else 0; the first of equal ones wins."""
    classes = jnp.arange(logits.shape[-1])[None]
    of_label = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    ahead = (logits > of_label) | ((logits == of_label) & (classes < labels[:, None]))
    # NaN compares false with everything, so it has to be excluded by hand.
    return ((ahead.sum(-1) < k) & ~jnp.isnan(logits).any(-1)).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """`train_step(state, batch) -> (state, metrics)`, a pure function.

    The mean over a batch that is sharded over devices is the mean over all of it, so one
    function serves one device and many.

    Metrics: the task's, `grad_norm` before clipping, and `first_bad_gradient`, the index of the
    first leaf of the parameters whose gradient is not finite, or -1.

    Attributes:
      model: the network in training form.
      task: loss and metrics.
      optimizer: the gradient transformation.
      augment: pixels to the network's input, augmented.
      mixing: mixup and cutmix, or None.
      seed: of the augmentation.
      equivalent_l2: weight decay of the equivalent kernel (`repvgg_jax.reparam.equivalent_l2`).
      blocks: those that have an equivalent kernel.
      ema_decay: decay per step of the moving averages, if the state has any.
      microbatches: number of microbatches whose gradients are accumulated.
      group_size: images of a group that microbatches must not split.
      microbatch_sharding: of (microbatches, images, …); None leaves it to the compiler.
      unrolled: unroll the loop over microbatches. Loops are slow on CPUs; elsewhere they save
        memory.
      frozen: what stays as it is.
      qat: the forward pass of quantization-aware training, or None for the ordinary one.
    """

    model: nn.Module
    task: Task
    optimizer: optax.GradientTransformation
    augment: Augmentation
    mixing: Mixing | None
    seed: int | jax.Array
    equivalent_l2: float = 0.0
    blocks: tuple[BlockSpec, ...] = BUILT_IN
    ema_decay: float = 0.0
    microbatches: int = 1
    group_size: int = 1
    microbatch_sharding: jax.sharding.Sharding | None = None
    unrolled: bool = False
    frozen: Frozen = Frozen()  # noqa: RUF009 (frozen)
    qat: Qat | None = None

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        """Takes one step on `batch`: uint8 images (n, height, width, channels) and their labels.

        Labels are as the task takes them, (n,) or (n, height, width).
        """
        key = jax.random.fold_in(jax.random.key(self.seed), state.step)
        images = self.augment(key, batch["image"])
        targets = self.task.targets(batch["label"])
        if self.mixing is not None:
            images, targets = self.mixing(key, images, targets)
        gradients, batch_stats, metrics = self._gradients(state, images, targets, key)
        if self.equivalent_l2:
            penalty = jax.grad(
                lambda params: equivalent_l2(
                    {"params": params, "batch_stats": batch_stats}, blocks=self.blocks
                )
            )(state.params)
            gradients = jax.tree.map(
                lambda g, p: g + self.equivalent_l2 / 2 * p, gradients, penalty
            )
        still = jax.tree.map(jnp.zeros_like, state.params)
        gradients = self.frozen.keep(gradients, still)  # of the penalty
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        params = self.frozen.keep(optax.apply_updates(state.params, updates), state.params)
        batch_stats = self.frozen.keep_statistics(batch_stats, state.batch_stats)
        squares = jnp.stack([jnp.square(g).sum() for g in jax.tree.leaves(gradients)])
        bad = ~jnp.isfinite(squares)
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            ema=self._averaged(state, {"params": params, "batch_stats": batch_stats}),
        )
        return new_state, {
            **metrics,
            "grad_norm": jnp.sqrt(squares.sum()),
            "first_bad_gradient": jnp.where(bad.any(), bad.argmax(), -1),
        }

    def _gradients(
        self, state: TrainState, images: jax.Array, targets: jax.Array, key: jax.Array
    ) -> tuple[Any, Any, Sums]:
        """Means over microbatches of the gradient, the new running statistics and the metrics.

        Every microbatch starts from the same running statistics, and their update is linear in
        the statistics of the groups of images, so the mean over microbatches is what the whole
        batch at once would give.
        """

        def of_microbatch(
            images: jax.Array, targets: jax.Array, number: Any = 0
        ) -> tuple[Any, Any, Sums]:
            # Of what drops channels; nothing is drawn where nothing does.
            dropout = jax.random.fold_in(jax.random.fold_in(key, _DROPOUT), number)

            def loss_of(params: Any) -> tuple[jax.Array, tuple[Any, Sums]]:
                params = self.frozen.keep(params, jax.lax.stop_gradient(params))
                if self.qat is not None:
                    variables = {"params": params, "batch_stats": state.batch_stats}
                    logits, batch_stats = self.qat(self.model, variables, images, state.step)
                    loss, metrics = self.task.loss(logits, {}, targets)
                    return loss, (batch_stats, metrics)
                with self.frozen.computing():
                    logits, updated = self.model.apply(
                        {"params": params, "batch_stats": state.batch_stats},
                        images,
                        train=True,
                        mutable=["batch_stats", "auxiliary"],
                        rngs={"dropout": dropout},
                    )
                loss, metrics = self.task.loss(logits, updated.get("auxiliary", {}), targets)
                return loss, (updated["batch_stats"], metrics)

            gradients, (batch_stats, metrics) = jax.grad(loss_of, has_aux=True)(state.params)
            return gradients, batch_stats, metrics

        if self.microbatches == 1:
            return of_microbatch(images, targets)

        def add(total: Any, microbatch: tuple[jax.Array, ...]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, of_microbatch(*microbatch)), None

        numbers = jnp.arange(self.microbatches)
        split = (self._split(images), self._split(targets), numbers)
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(of_microbatch, *(values[0] for values in split)),
        )
        unroll = self.microbatches if self.unrolled else 1
        total, _ = jax.lax.scan(add, zeros, split, unroll=unroll)
        return jax.tree.map(lambda leaf: leaf / self.microbatches, total)

    def _split(self, values: jax.Array) -> jax.Array:
        """(n, …) as (microbatches, n / microbatches, …), without splitting a group.

        Neighboring groups go to different microbatches, so that a device that holds neighboring
        images has some of every microbatch. If it holds fewer groups than there are microbatches,
        `microbatch_sharding` moves images; otherwise each microbatch would occupy only some of
        the devices.
        """
        shape = values.shape[1:]
        groups = values.reshape(-1, self.microbatches, self.group_size, *shape)
        split = groups.swapaxes(0, 1).reshape(self.microbatches, -1, *shape)
        if self.microbatch_sharding is None:
            return split
        return jax.lax.with_sharding_constraint(split, self.microbatch_sharding)

    def _averaged(self, state: TrainState, variables: Any) -> Any:
        """The moving averages after this step; the decay warms up."""
        if not state.ema:
            return state.ema
        decay = jnp.minimum(self.ema_decay, (1 + state.step) / (10 + state.step))
        averaged = optax.incremental_update(variables, state.ema, 1 - decay)
        return {
            "params": self.frozen.keep(averaged["params"], state.ema["params"]),
            "batch_stats": self.frozen.keep_statistics(
                averaged["batch_stats"], state.ema["batch_stats"]
            ),
        }


@dataclasses.dataclass(frozen=True)
class EvalStep:
    """`eval_step(variables, batch) -> sums`, a pure function.

    Attributes:
      model: the network, in the form of the variables, or the simulation of its integers.
      task: which sums.
      normalize: pixels to the network's input.
      replicated: sharding of what is of single images; None leaves it to the compiler.
      per_image: whether the result has the task's numbers of every image.
    """

    model: nn.Module | Simulation
    task: Task
    normalize: Normalize
    replicated: jax.sharding.Sharding | None = None
    per_image: bool = False

    def __call__(self, variables: Any, batch: Batch) -> dict[str, Any]:
        """Sums over the images that `batch["mask"]` keeps; `examples` for a picture, if any.

        With `per_image`, the numbers of every image are there under that name, and its mask.
        """

        def network(images: jax.Array) -> jax.Array:
            logits = self.model.apply(variables, images)
            assert isinstance(logits, jax.Array)
            return logits

        outputs = self.task.outputs(network, self.normalize(batch["image"]))
        single: dict[str, Any] = {"examples": self.task.examples(outputs, batch)}
        if self.per_image:
            # The barrier works around a failure of XLA when the mask and a slice of it, in
            # `examples`, are both replicated.
            counted = jax.lax.optimization_barrier(batch["mask"])
            single["per_image"] = {**self.task.per_image(outputs, batch), "mask": counted}
        if self.replicated is not None:
            single = jax.lax.with_sharding_constraint(single, self.replicated)
        sums = self.task.evaluate(outputs, batch)
        return {**sums, **{name: values for name, values in single.items() if values}}
