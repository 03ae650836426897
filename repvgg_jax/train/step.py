"""One step of training and of evaluation, as pure functions."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from repvgg_jax.data.augment import Augmentation, Mixing
from repvgg_jax.normalize import Normalize
from repvgg_jax.reparam import equivalent_l2
from repvgg_jax.train.state import TrainState
from repvgg_jax.train.task import Classification, Sums

Batch = Mapping[str, Any]


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
      optimizer: from a gradient to an update.
      augment: pixels to what the network takes, augmented.
      mixing: of images and targets, or None.
      seed: of the augmentation.
      equivalent_l2: weight decay of the equivalent kernel (`repvgg_jax.reparam.equivalent_l2`).
      ema_decay: a step, of the moving averages in the state, if it has any.
      pieces: how many pieces of the batch go through the network one after the other.
      group_size: images of a group that pieces do not split.
      over_pieces: where (pieces, images of a piece, …) lie; None leaves it to the compiler.
      unrolled: compile every piece apart. Loops are slow on CPUs; elsewhere they save memory.
    """

    model: nn.Module
    task: Classification
    optimizer: optax.GradientTransformation
    augment: Augmentation
    mixing: Mixing | None
    seed: int
    equivalent_l2: float = 0.0
    ema_decay: float = 0.0
    pieces: int = 1
    group_size: int = 1
    over_pieces: jax.sharding.Sharding | None = None
    unrolled: bool = False

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        """Takes one step on `batch`, images (n, height, width, channels) uint8, labels (n,)."""
        key = jax.random.fold_in(jax.random.key(self.seed), state.step)
        images = self.augment(key, batch["image"])
        targets = self.task.targets(batch["label"])
        if self.mixing is not None:
            images, targets = self.mixing(key, images, targets)
        gradients, batch_stats, metrics = self._gradients(state, images, targets)
        if self.equivalent_l2:
            penalty = jax.grad(
                lambda params: equivalent_l2({"params": params, "batch_stats": batch_stats})
            )(state.params)
            gradients = jax.tree.map(
                lambda g, p: g + self.equivalent_l2 / 2 * p, gradients, penalty
            )
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
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
        self, state: TrainState, images: jax.Array, targets: jax.Array
    ) -> tuple[Any, Any, Sums]:
        """Means over the pieces of the gradient, the new running statistics and the metrics.

        Every piece starts from the same running statistics, and their update is linear in the
        statistics of the groups of images, so the mean over pieces is what the whole batch at
        once would give.
        """

        def of_piece(images: jax.Array, targets: jax.Array) -> tuple[Any, Any, Sums]:
            def loss_of(params: Any) -> tuple[jax.Array, tuple[Any, Sums]]:
                logits, updated = self.model.apply(
                    {"params": params, "batch_stats": state.batch_stats},
                    images,
                    train=True,
                    mutable=["batch_stats", "auxiliary"],
                )
                loss, metrics = self.task.loss(logits, updated.get("auxiliary", {}), targets)
                return loss, (updated["batch_stats"], metrics)

            gradients, (batch_stats, metrics) = jax.grad(loss_of, has_aux=True)(state.params)
            return gradients, batch_stats, metrics

        if self.pieces == 1:
            return of_piece(images, targets)

        def add(total: Any, piece: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, of_piece(*piece)), None

        pieces = (self._split(images), self._split(targets))
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(of_piece, *(piece[0] for piece in pieces)),
        )
        total, _ = jax.lax.scan(add, zeros, pieces, unroll=self.pieces if self.unrolled else 1)
        return jax.tree.map(lambda leaf: leaf / self.pieces, total)

    def _split(self, values: jax.Array) -> jax.Array:
        """(n, …) as (pieces, n / pieces, …), whole groups each.

        Neighbouring groups go to different pieces, so that a device that holds neighbouring
        images has some of every piece. Where it holds fewer groups than there are pieces,
        `over_pieces` moves images, or every piece would be the work of some devices alone.
        """
        shape = values.shape[1:]
        groups = values.reshape(-1, self.pieces, self.group_size, *shape)
        pieces = groups.swapaxes(0, 1).reshape(self.pieces, -1, *shape)
        if self.over_pieces is None:
            return pieces
        return jax.lax.with_sharding_constraint(pieces, self.over_pieces)

    def _averaged(self, state: TrainState, variables: Any) -> Any:
        """The moving averages after this step; young ones forget faster."""
        if not state.ema:
            return state.ema
        decay = jnp.minimum(self.ema_decay, (1 + state.step) / (10 + state.step))
        return optax.incremental_update(variables, state.ema, 1 - decay)


@dataclasses.dataclass(frozen=True)
class EvalStep:
    """`eval_step(variables, batch) -> sums`, a pure function.

    Attributes:
      model: the network, in the form of the variables.
      task: which sums.
      normalise: pixels to what the network takes.
    """

    model: nn.Module
    task: Classification
    normalise: Normalize

    def __call__(self, variables: Any, batch: Batch) -> Sums:
        """Sums over the images that `batch["mask"]` keeps."""
        logits = self.model.apply(variables, self.normalise(batch["image"]))
        assert isinstance(logits, jax.Array)
        return self.task.evaluate(logits, batch)
