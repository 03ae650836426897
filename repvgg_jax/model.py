"""RepVGG: a stem, stages of `RepVGGBlock`, global average pooling and one linear layer.

Networks of other blocks are the same module: their layers follow from the variant, which may add
residual connections, other activations and a head that is a block.

Batch normalization, in one place: `train=False` is the default and uses the running
statistics; `train=True` uses those of the batch (of every `bn_group_size` images of it)
and needs `mutable=["batch_stats"]`. Momentum and epsilon are PyTorch's 0.1 (the new
value's share) and 1e-5; running variances are unbiased.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from repvgg_jax import cpu_conv
from repvgg_jax.activations import ACTIVATIONS
from repvgg_jax.batch_stats import AxisName
from repvgg_jax.block import Activation, ReparamBlock, RepVGGBlock, TrainForm, check_options
from repvgg_jax.cpu_conv import Lowering
from repvgg_jax.layers import (
    BatchNorm,
    check_classes,
    conv_bn,
    torch_bias_init,
    torch_kernel_init,
)
from repvgg_jax.reparam import EPSILON, REPVGG, Geometry, fuse_params, input_channels
from repvgg_jax.text import positive_integer
from repvgg_jax.variants import Layer, Variant, get_variant, residual_starts

RematPolicy = Callable[..., Any]  # as in `jax.checkpoint_policies`


def keep_convolutions(primitive: Any, *_: Any, **params: Any) -> bool:
    """A policy for `remat`: keeps outputs of convolutions, recomputes norms, sums, activations."""
    if primitive.name == "name":  # of `checkpoint_name`: what CPUs compute in another way, too
        return params["name"] == cpu_conv.NAME
    return primitive.name == "conv_general_dilated"


def create_model(
    name: str | Variant,
    *,
    num_classes: int = 1000,
    deploy: bool = False,
    output_stride: int | None = None,
    dilations: tuple[int, ...] | None = None,
    bn_group_size: int | None = None,
    train_form: TrainForm = "auto",
    lowering: Lowering = "auto",
    remat: bool | RematPolicy = False,
    dtype: jnp.dtype = jnp.float32,
    param_dtype: jnp.dtype = jnp.float32,
    activation: Activation | Literal["auto"] | None = "auto",
    epsilon: float = EPSILON,
    momentum: float = 0.9,
    axis_name: AxisName | None = None,
) -> "RepVGG":
    """Builds a RepVGG, or another network of `FAMILY`.

    Args:
      name: `A0` … `B3g4`, `D2se`, `plus-L2pse`, also spelled `RepVGG-A0` or `repvgg_a0`; a name
        in `FAMILY`, e.g. `mobileone_s0`; or a `Variant` of your own.
      num_classes: width of the classifier; 0 for none, the model then returns its pooled
        features.
      deploy: the fused form, whose variables come from `fuse_params`.
      output_stride: 8 or 16 replace the last strides by dilation, for dense prediction;
        parameters keep their shapes. None keeps the variant's own, 32 for the official ones.
      dilations: of the 3x3 branches of every block after the stem; None for those that follow
        from `output_stride`.
      bn_group_size: images that share batch statistics in training; None for the whole batch.
      train_form: "branches" trains the three branches as they are drawn; "covariance"
        computes the same function, statistics and gradients without ever holding two of the
        three (`docs/covariance.md`), in reverse mode only; "covariance_pallas" does so on NVIDIA
        GPUs with a kernel that was never timed; "auto" is what is best on JAX's default backend
        (`repvgg_jax.block.best_train_form`). Variables are the same.
      lowering: "auto" computes float32 convolutions on CPUs in ways they are good at
        (`repvgg_jax.cpu_conv`); "measured" times the possible ways on this CPU, once per shape
        and machine, in deploy form (`repvgg_jax.cpu_measured`); "plain" leaves convolutions as
        they are on every platform.
      remat: recompute every block's activations in the backward pass instead of keeping them; or
        which of them to keep, a policy of JAX's, e.g. `keep_convolutions`.
      dtype: of the convolutions, float32 or bfloat16. Parameters, statistics, batch
        normalization and the classifier stay float32.
      param_dtype: of the parameters; float64 is for proofs.
      activation: of every block, e.g. `nn.silu`; None for none; "auto" is the variant's, ReLU but
        for RepViT. Every block gets a copy of a module, e.g. of `nn.PReLU()`.
      epsilon: of batch normalization. `fuse_params` needs the same one.
      momentum: share of the old running statistics that every training step keeps.
      axis_name: of the devices whose images are one batch to batch normalization, under
        `jax.shard_map` or `jax.pmap`; under `jax.jit` a sharded batch is one batch anyway.

    Raises:
      ValueError: unknown variant, an output stride it cannot have, or an option that cannot be.
    """
    variant = get_variant(name)
    dilations = None if dilations is None else tuple(dilations)
    variant.layers(output_stride, dilations)  # raises where the stride cannot be had
    is_integer = isinstance(num_classes, (int, np.integer)) and not isinstance(num_classes, bool)
    if not is_integer or num_classes < 0:
        raise ValueError(f"num_classes={num_classes!r} must be 0 (pooled features) or more classes")
    if bn_group_size is not None:
        bn_group_size = positive_integer("create_model", "bn_group_size", bn_group_size)
    if not (isinstance(remat, bool) or callable(remat)):
        raise ValueError(f"remat={remat!r} must be True, False or a policy, e.g. keep_convolutions")
    activation = resolve_activation(variant.activation, activation)
    check_options(train_form, lowering, activation, epsilon, momentum)
    return RepVGG(
        variant=variant,
        num_classes=num_classes,
        deploy=deploy,
        output_stride=output_stride,
        dilations=dilations,
        bn_group_size=bn_group_size,
        train_form=train_form,
        lowering=lowering,
        remat=remat,
        dtype=dtype,
        param_dtype=param_dtype,
        activation=activation,
        epsilon=epsilon,
        momentum=momentum,
        axis_name=axis_name,
    )


def resolve_activation(
    own: str, activation: Activation | Literal["auto"] | None
) -> Activation | None:
    """The activation of a variant, by its name `own`, if "auto" is asked for; else what is."""
    if isinstance(activation, str) and activation == "auto":
        return ACTIVATIONS[own]
    return activation


class RepVGG(nn.Module):
    """The network; `create_model` documents the attributes."""

    variant: Variant
    num_classes: int = 1000
    deploy: bool = False
    output_stride: int | None = None
    dilations: tuple[int, ...] | None = None
    bn_group_size: int | None = None
    train_form: TrainForm = "auto"
    lowering: Lowering = "auto"
    remat: bool | RematPolicy = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    activation: Activation | None = nn.relu
    epsilon: float = EPSILON
    momentum: float = 0.9
    axis_name: AxisName | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.variant, Variant):
            raise ValueError(
                f"RepVGG takes a Variant, got {self.variant!r}; "
                f"repvgg_jax.create_model({self.variant!r}) makes a RepVGG from a name"
            )
        super().__post_init__()

    def setup(self) -> None:
        """Makes the blocks and heads."""
        # Attributes become the names of the tree: stem, stage1_block0, …, head.
        for layer in self.layers:
            setattr(self, layer.name, self._block(layer))
        if not self.deploy:
            for block, head in self._auxiliary_heads().items():
                features = next(layer.features for layer in self.layers if layer.name == block)
                logits = _classifier(self.num_classes, features, self.param_dtype)
                layers = conv_bn(self, features, stride=2)
                setattr(self, head, AuxiliaryHead(*layers, logits))
        if of_blocks := self.variant.head_layer(self.num_classes):
            self.head: nn.Module = self._block(of_blocks)
        elif self.num_classes:
            self.head = _classifier(self.num_classes, self.variant.features, self.param_dtype)

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Class scores, or pooled features where `num_classes` is 0.

        Args:
          images: (images, height, width, channels), normalized floating point numbers.
          train: use and update batch statistics; pass `mutable=["batch_stats"]`, and
            `"auxiliary"` in it too to train the auxiliary heads of plus-L2pse: their logits
            come back in that collection, by head.

        Returns:
          float32 logits (images, num_classes), or features (images, channels).

        Raises:
          ValueError: images of another rank, layout or type, or variables of the other form or of
            another number of classes.
        """
        if not self.is_initializing():
            head: dict[str, Any] = self.get_variable("params", "head", {})
            check_classes(self.variant.name, head, self.num_classes)
        x = self.features(images, train)[self.layers[-1].stage]
        x = _global_average(x)
        if self.variant.head_layer(self.num_classes):
            return self.head(x[:, None, None], train)[:, 0, 0]
        return self.head(x) if self.num_classes else x

    def features(self, images: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        """The last feature map of the stem and of every stage, for detectors and segmenters.

        `model.apply(variables, images, method="features")` gives
        `{"stem": …, "stage1": …, …}`, each (images, height, width, channels) in `dtype`.
        """
        self._check(images)
        x = images.astype(self.dtype)
        auxiliary = {} if self.deploy else self._auxiliary_heads()
        wanted = train and self.is_mutable_collection("auxiliary")
        maps: dict[str, jax.Array] = {}
        kept: dict[int, jax.Array] = {}
        starts = residual_starts(self.layers)
        for index, layer in enumerate(self.layers):
            if index in starts.values():
                kept[index] = x
            x = getattr(self, layer.name)(x, train)
            if layer.residual:
                x = x + kept[starts[index]]
            maps[layer.stage] = x
            if (head := auxiliary.get(layer.name)) and (wanted or self.is_initializing()):
                logits = getattr(self, head)(x, train)
                if not self.is_initializing():
                    self.put_variable("auxiliary", head, logits)
        return maps

    @nn.nowrap
    def fuse(self, variables: Any) -> Any:
        """The variables of `self.clone(deploy=True)`: `fuse_params` with this model's blocks.

        Raises:
          ValueError: as `fuse_params`; every block of the model must be there.
        """
        return fuse_params(
            variables,
            blocks=self.variant.blocks,
            expect=len(self.layers) + bool(self.variant.head_layer(self.num_classes)),
            epsilon=self.epsilon,
            geometries=self.geometries(variables["params"]),
        )

    @nn.nowrap
    def geometries(self, params: Any) -> dict[str, Geometry] | None:
        """Shapes of blocks by name; None where these parameters show them."""
        if not any(block.traceless or block.has_own_groups for block in self.variant.blocks):
            return None
        stem = input_channels(self.layers[0].block, params["stem"])
        return self.variant.geometries(stem or 3)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every block in order, with its name in the parameter tree."""
        return self.variant.layers(self.output_stride, self.dilations)

    @nn.nowrap
    def _block(self, layer: Layer) -> ReparamBlock:
        cls = RepVGGBlock if layer.block is REPVGG else ReparamBlock
        policy = self.remat if callable(self.remat) else None
        block = nn.remat(cls, static_argnums=(2,), policy=policy) if self.remat else cls
        return block(
            features=layer.features,
            stride=layer.stride,
            dilation=layer.dilation,
            groups=layer.groups,
            identity=layer.identity,
            se=layer.se,
            deploy=self.deploy,
            bn_group_size=self.bn_group_size,
            train_form=self.train_form,
            lowering=self.lowering,
            dtype=jnp.promote_types(self.dtype, jnp.float32) if layer.wide else self.dtype,
            param_dtype=self.param_dtype,
            activation=self._own_activation() if layer.activate else None,
            epsilon=self.epsilon,
            momentum=self.momentum,
            spec=layer.block,
            axis_name=self.axis_name,
        )

    @nn.nowrap
    def _own_activation(self) -> Activation | None:
        """For a block: parameters of an activation are not shared."""
        if isinstance(self.activation, nn.Module):
            return self.activation.clone(parent=None, name=None)
        return self.activation

    @nn.nowrap
    def _auxiliary_heads(self) -> dict[str, str]:
        """Names of the auxiliary heads by the block they listen to."""
        if not self.num_classes:
            return {}
        return {block: f"aux_{block}" for block in self.variant.auxiliary}

    @nn.nowrap
    def _check(self, images: jax.Array) -> None:
        shape = images.shape
        if len(shape) != 4:
            raise ValueError(
                f"images have shape {shape}; expected 4 axes (images, height, width, channels)"
            )
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(
                f"images are {images.dtype}; expected normalized floating point numbers, "
                "(pixels / 255 - mean) / std"
            )
        advice = "RepVGG takes (images, height, width, channels); images.transpose(0, 2, 3, 1)?"
        if self.is_initializing():
            # One row may be a spectrogram; three or four rows as many columns as channels are not.
            if shape[1] in (3, 4) and shape[2] == shape[3] and shape[2] > 4:
                raise ValueError(f"images of shape {shape} look channels-first; {advice}")
            return
        # The stem's parameters know how many channels they take.
        stem: dict[str, Any] = self.get_variable("params", "stem", {}) or {}
        taken = input_channels(self.layers[0].block, stem)
        if taken is not None and taken != shape[-1]:
            raise ValueError(
                f"images of shape {shape} have {shape[-1]} channels, "
                f"but these parameters take {taken}; {advice}"
            )


class AuxiliaryHead(nn.Module):
    """A classifier on an inner feature map, for training only (RepVGGplus).

    3x3 convolution of stride 2, batch normalization, ReLU, average pooling, linear layer.
    `fuse_params` drops it.
    """

    conv: nn.Conv
    bn: BatchNorm
    logits: nn.Dense

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits (images, classes) of feature maps (images, height, width, features)."""
        return self.logits(_global_average(nn.relu(self.bn(self.conv(x), train))))


def _global_average(x: jax.Array) -> jax.Array:
    return x.mean(axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))


def _classifier(num_classes: int, fan_in: int, param_dtype: jnp.dtype) -> nn.Dense:
    """A linear layer in at least float32: it costs nothing and decides everything."""
    return nn.Dense(
        num_classes,
        kernel_init=torch_kernel_init,
        bias_init=torch_bias_init(fan_in),
        param_dtype=param_dtype,
    )
