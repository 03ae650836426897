"""The RepVGG block: three branches to train, one 3x3 convolution to deploy.

Training form (paper, figure 2):

    y = ReLU( BN(K3 * x) + BN(K1 * x) + BN(x) )

K3 is a 3x3 kernel, K1 a 1x1 kernel, and the third branch, the identity, is there only
where input and output have the same shape. In evaluation batch normalisation is affine
per channel, so the sum is one 3x3 convolution with a bias, and that is the deploy form:

    y = ReLU( K * x + b )

`repvgg_jax.reparam.fuse_params` computes K and b from the branches. Parameter names:

    training form   conv3x3/kernel  bn3x3/{scale,bias}  conv1x1/kernel  bn1x1/{scale,bias}
                    bn_identity/{scale,bias}            each bn with batch_stats {mean,var}
    deploy form     reparam/{kernel,bias}
    both forms      se/{reduce,expand}/{kernel,bias}    with squeeze-and-excite only

Everything is NHWC, kernels are HWIO.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from repvgg_jax import covariance
from repvgg_jax import cpu_conv as lowerings
from repvgg_jax.cpu_conv import Lowering
from repvgg_jax.norm import BatchNorm, image_groups, updated
from repvgg_jax.variants import SqueezeExcite

TrainForm = Literal["branches", "covariance"]

torch_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""PyTorch's default for convolutions and linear layers, U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""


def torch_bias_init(fan_in: int) -> Callable[..., jax.Array]:
    """PyTorch's default bias of a layer with that fan-in, from the same interval."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class RepVGGBlock(nn.Module):
    """A 3x3 convolution that trains as three branches.

    Attributes:
      features: channels out.
      stride: spatial stride.
      dilation: dilation of the 3x3 kernel, which is padded by as much.
      groups: channel groups of both convolutions.
      identity: whether there is an identity branch; None means where the shapes allow it.
      se: squeeze-and-excite, or None.
      deploy: the fused form instead of the three branches.
      bn_group_size: images that share batch statistics in training; None for all of them.
      train_form: how training computes the branches: "branches" as they are drawn, or
        "covariance", the same function without holding two of them (`repvgg_jax.covariance`).
      lowering: how convolutions are computed: "auto", on CPUs in the way that was measured to
        be fastest (`repvgg_jax.cpu_conv`), or "plain", as drawn everywhere.
      dtype: of the convolutions; parameters, statistics and batch normalisation stay float32.
      param_dtype: of the parameters.
    """

    features: int
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    identity: bool | None = None
    se: SqueezeExcite | None = None
    deploy: bool = False
    bn_group_size: int | None = None
    train_form: TrainForm = "branches"
    lowering: Lowering = "auto"
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps (images, height, width, channels) to (…, height/stride, width/stride, features).

        Args:
          x: feature maps.
          train: batch statistics instead of running ones; needs `mutable=["batch_stats"]`.

        Raises:
          ValueError: the parameters are of the other form, or an identity branch was asked
            for where input and output differ in shape.
        """
        self._check(x)
        if self.deploy:
            y = self._conv(3, "reparam", use_bias=True)(x)
        elif train and self.train_form == "covariance" and not self.is_initializing():
            y = self._by_covariance(x)
            if self.se is None:
                return y  # its backward pass contains the ReLU's
        else:
            bn = functools.partial(
                BatchNorm, group_size=self.bn_group_size, param_dtype=self.param_dtype
            )
            y = bn(name="bn3x3")(self._conv(3, "conv3x3")(x), train)
            y += bn(name="bn1x1")(self._conv(1, "conv1x1")(x), train)
            if self._has_identity(x):
                y += bn(name="bn_identity")(x, train)
            y = y.astype(self.dtype)  # the branches are summed before they are rounded

        if self.se is None:
            return nn.relu(y)
        attend = SqueezeExciteGate(self.se.reduction, self.dtype, self.param_dtype, name="se")
        return attend(nn.relu(y)) if self.se.after_relu else nn.relu(attend(y))

    def _by_covariance(self, x: jax.Array) -> jax.Array:
        """The branches in training by their statistics; ReLU included unless SE follows."""
        out_shape = (x.shape[0], *(-(-side // self.stride) for side in x.shape[1:3]), self.features)
        groups = image_groups(out_shape, self.bn_group_size)
        form = covariance.Form(
            stride=self.stride,
            dilation=self.dilation,
            groups=self.groups,
            identity=self._has_identity(x),
            relu=self.se is None,
            image_groups=groups,
            epsilon=BatchNorm.epsilon,
        )
        params = {name: piece for name, piece in self.variables["params"].items() if name != "se"}
        y, statistics = covariance.train_block(form, x.astype(self.dtype), params)
        count = math.prod(out_shape[:3]) // groups
        for name, (mean, var) in statistics.items():
            old: dict[str, jax.Array] = self.get_variable("batch_stats", name)
            unbiased = var * (count / (count - 1))
            new = {
                "mean": updated(old["mean"], mean, BatchNorm.momentum),
                "var": updated(old["var"], unbiased, BatchNorm.momentum),
            }
            self.put_variable("batch_stats", name, new)
        return y

    def _conv(self, size: int, name: str, use_bias: bool = False) -> nn.Conv:
        # Explicit padding: "SAME" pads differently from PyTorch at stride 2. A 1x1 kernel
        # without padding then meets the centre of the 3x3 one at every stride and dilation.
        pad = self.dilation * (size // 2)
        return nn.Conv(
            self.features,
            (size, size),
            strides=self.stride,
            padding=((pad, pad), (pad, pad)),
            kernel_dilation=self.dilation if size > 1 else 1,
            feature_group_count=self.groups,
            use_bias=use_bias,
            kernel_init=torch_kernel_init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            conv_general_dilated=self._lowered(),
            name=name,
        )

    def _lowered(self) -> Callable[..., jax.Array] | None:
        if self.lowering == "plain":
            return None
        if self.deploy:
            return lowerings.conv_general_dilated
        return lowerings.training_conv_general_dilated

    def _has_identity(self, x: jax.Array) -> bool:
        if self.identity is None:
            return x.shape[-1] == self.features and self.stride == 1
        return self.identity

    def _check(self, x: jax.Array) -> None:
        where = "/".join(self.path) or type(self).__name__
        if self.identity and (x.shape[-1] != self.features or self.stride != 1):
            raise ValueError(
                f"{where}: an identity branch needs equal channels and stride 1, "
                f"got {x.shape[-1]} -> {self.features} channels at stride {self.stride}"
            )
        other = "conv3x3" if self.deploy else "reparam"
        if self.has_variable("params", other):
            form = "deploy" if self.deploy else "training"
            raise ValueError(
                f"{where}: this model is in its {form} form but was given the variables of the "
                + (
                    "training form; pass them through fuse_params first"
                    if self.deploy
                    else "deploy form; build it with deploy=True, or make them trainable "
                    "with unfuse_params"
                )
            )


class SqueezeExciteGate(nn.Module):
    """Multiplies every channel by a gate in (0, 1) computed from all channels' means.

    Attributes:
      reduction: the squeezed width is `channels // reduction`.
      dtype: of the result.
      param_dtype: of the parameters.
    """

    reduction: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Gates `x` (images, height, width, channels)."""
        channels = x.shape[-1]
        squeezed = channels // self.reduction
        if squeezed == 0:
            raise ValueError(
                f"{'/'.join(self.path)}: squeeze-and-excite with reduction {self.reduction} "
                f"leaves nothing of {channels} channels"
            )
        pooled = x.mean(axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
        hidden = nn.relu(self._dense(squeezed, channels, "reduce")(pooled))
        gate = nn.sigmoid(self._dense(channels, squeezed, "expand")(hidden))
        return x * gate[:, None, None, :].astype(self.dtype)

    def _dense(self, features: int, fan_in: int, name: str) -> nn.Dense:
        return nn.Dense(
            features,
            kernel_init=torch_kernel_init,
            bias_init=torch_bias_init(fan_in),
            param_dtype=self.param_dtype,
            name=name,
        )
