"""`ReparamBlock`, a Linen module for any block expression, and `RepVGGBlock`, its RepVGG case.

RepVGG in training form (paper, figure 2):

    y = ReLU( BN(K3 * x) + BN(K1 * x) + BN(x) )

K3 is a 3x3 kernel, K1 a 1x1 kernel, and the third branch, the identity, exists only where input
and output have the same shape. In evaluation batch normalization is affine per channel, so the
sum is one 3x3 convolution with a bias, and that is the deploy form:

    y = ReLU( K * x + b )

`fuse_params` computes K and b from the branches. `repvgg_jax.reparam.REPVGG` is the expression
inside the ReLU, and its names are those of the parameters; each norm has running statistics
`{mean, var}` under the same name in `batch_stats`. In deploy form all of them are replaced by
`reparam/{kernel, bias}`. Squeeze-and-excite, `se/{reduce, expand}`, is in both forms.

Everything is NHWC, kernels are HWIO.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from repvgg_jax import cpu_conv
from repvgg_jax.batch_stats import AxisName, image_groups, updated_running
from repvgg_jax.covariance import BlockSettings
from repvgg_jax.cpu_conv import Lowering
from repvgg_jax.layers import (
    KERNEL_INITIALIZERS,
    BatchNorm,
    ChannelScale,
    SqueezeExciteGate,
    torch_bias_init,
)
from repvgg_jax.meshes import on_auto_axes
from repvgg_jax.reparam import (
    EPSILON,
    REPVGG,
    AvgPool,
    BlockSpec,
    Chain,
    Conv,
    Filter,
    Geometry,
    Identity,
    Linear,
    Nonlinearity,
    Norm,
    Scale,
    Sum,
    leaves,
)
from repvgg_jax.reparam.algebra import unit_norm
from repvgg_jax.reparam.linear import present
from repvgg_jax.text import positive_integer
from repvgg_jax.variants import SqueezeExcite

TrainForm = Literal["auto", "branches", "covariance", "covariance_pallas"]
Activation = Callable[[jax.Array], jax.Array]
Response = Callable[[], jax.Array]  # computed only where something has to be padded with it


BEST_TRAIN_FORM: Mapping[str, TrainForm] = {
    "cpu": "branches",  # by time, `docs/results.md`
    "gpu": "covariance",  # by the traffic of programs for H100, `docs/covariance.md`
    "tpu": "covariance",  # by the traffic of programs for v5e, `docs/covariance.md`
}


def best_train_form(platform: str | None = None) -> TrainForm:
    """What `train_form="auto"` is on a platform.

    Args:
      platform: as `jax.Device.platform` has it; None for JAX's default backend, whatever a
        program is lowered for.
    """
    return BEST_TRAIN_FORM.get(platform or jax.default_backend(), "branches")


class ReparamBlock(nn.Module):
    """A block that trains as `spec.train` and deploys as one convolution.

    Attributes:
      features: output channels.
      stride: spatial stride.
      dilation: dilation of kernels and poolings larger than 1x1, padded by as much.
      groups: channel groups of the convolutions.
      identity: whether the terms in `SameShape` exist. None decides it from the shapes: True if
        input and output channels are equal and the stride is 1.
      se: squeeze-and-excite, or None.
      deploy: the fused form instead of the training form.
      bn_group_size: images that share batch statistics in training; None for the whole batch.
      axis_name: of the devices whose images are one batch, under `jax.shard_map` or `jax.pmap`;
        under `jax.jit` a sharded batch is one batch anyway.
      freeze_statistics: normalize by the running statistics in training, too, and keep them.
      train: whether it trains, if that is not said when it is called, as in Flax's
        `use_running_average`; e.g. inside `nn.Sequential`.
      train_form: how training computes the expression: "branches" term by term, "covariance",
        the same function by the block's fast training pass (`repvgg_jax.covariance`),
        "covariance_pallas", on NVIDIA GPUs with a kernel that was never timed, or "auto", which
        `best_train_form` says.
      lowering: how convolutions are computed: "auto", on CPUs in the way that was measured to be
        fastest (`repvgg_jax.cpu_conv`); "measured", in deploy form in the way that is fastest on
        this CPU, timed once per machine; or "plain", the same way everywhere.
      dtype: of the convolutions; parameters, statistics and norms stay float32.
      param_dtype: of the parameters; running statistics are in at least float32.
      activation: of the block's output, `nn.relu` by default; None for none. A module, e.g.
        `nn.PReLU()`, has its parameters in the child `activation`, in both forms.
      epsilon: of batch normalization.
      momentum: share of the old running statistics that every training step keeps.
      spec: the block.
    """

    features: int
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    identity: bool | None = None
    se: SqueezeExcite | None = None
    deploy: bool = False
    bn_group_size: int | None = None
    train_form: TrainForm = "auto"
    lowering: Lowering = "auto"
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    activation: Activation | None = nn.relu
    epsilon: float = EPSILON
    momentum: float = 0.9
    spec: BlockSpec = REPVGG
    axis_name: AxisName | None = None
    freeze_statistics: bool = False
    train: bool | None = None

    def __post_init__(self) -> None:
        for option in ("features", "stride", "dilation", "groups", "bn_group_size"):
            value = getattr(self, option)
            if value is not None or option != "bn_group_size":
                value = positive_integer(self.name or type(self).__name__, option, value)
            object.__setattr__(self, option, value)
        if not isinstance(self.spec, BlockSpec):
            raise ValueError(f"spec={self.spec!r} must be a BlockSpec, e.g. reparam.REPVGG")
        if not isinstance(self.se, SqueezeExcite | None):
            raise ValueError(f"se={self.se!r} must be a SqueezeExcite, or None")
        check_options(self.train_form, self.lowering, self.activation, self.epsilon, self.momentum)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool | None = None) -> jax.Array:
        """Maps (images, height, width, channels) to (…, height/stride, width/stride, features).

        Args:
          x: feature maps.
          train: batch statistics instead of running ones; needs `mutable=["batch_stats"]`.
            None for the attribute of that name, and False if that is None, too.

        Raises:
          ValueError: the parameters are of the other form, the shapes do not fit, or the block
            has no such training pass.
        """
        if self.train is not None:
            train = nn.merge_param("train", self.train, train)
        train = bool(train) and not self.freeze_statistics
        self._check(x)
        if self.deploy:
            if self.spec.obstacle:
                raise ValueError(f"{self._where}: no deploy form, {self.spec.obstacle}")
            size = self.spec.kernel_size(self.geometry(x))
            conv = Conv(self.spec.deploy, size, bias=True)
            return self._activate(self._conv(conv, x.shape[-1])(x))
        form = self.train_form
        if form == "auto":
            possible = self.spec.fast_train is not None and self.axis_name is None
            form = best_train_form() if possible else "branches"
        if train and form != "branches" and not self.is_initializing():
            return self._fast_train(x)
        term = present(self.spec.train, self.geometry(x).has_same_shape)
        assert term is not None, "checked above"
        y, _ = self._evaluate(term, x, None, train)
        return self._activate(y.astype(self.dtype))  # terms are summed before they are rounded

    @nn.nowrap
    def geometry(self, x: jax.Array) -> Geometry:
        """The shapes of this block on feature maps like `x`."""
        return Geometry(
            x.shape[-1], self.features, self.stride, self.dilation, self.groups, self.identity
        )

    @nn.nowrap
    def _evaluate(
        self, term: Linear, x: jax.Array, zero: Response | None, train: bool
    ) -> tuple[jax.Array, Response | None]:
        """A term on feature maps, and its response to zero.

        Args:
          term: what to evaluate.
          x: feature maps.
          zero: what comes before maps zero to this; None for zero.
          train: as in `__call__`.
        """
        if isinstance(term, Chain):
            for child in term.terms:
                x, zero = self._evaluate(child, x, zero, train)
            return x, zero
        if isinstance(term, Sum):
            y, response = self._evaluate(term.terms[0], x, zero, train)
            for child in term.terms[1:]:
                other, other_response = self._evaluate(child, x, zero, train)
                y += other
                response = _sum(response, other_response)
            return y, response
        if isinstance(term, Norm):
            norm = BatchNorm(
                momentum=self.momentum,
                epsilon=self.epsilon,
                group_size=self.bn_group_size,
                param_dtype=self.param_dtype,
                axis_name=self.axis_name,
                initial=term.initial,
                name=term.name,
            )
            channels = x.shape[-1]

            def at_zero() -> jax.Array:
                # By running statistics, in training without gradient, as the authors of DBB do.
                response = norm(_value(zero, channels))
                return jax.lax.stop_gradient(response) if train else response

            return norm(x, train), at_zero
        if isinstance(term, Conv):
            conv = self._conv(term, x.shape[-1], padded=zero is not None)
            channels = x.shape[-1]

            def response() -> jax.Array:
                value = _value(zero, channels)
                return conv(self._padded(term, value, value))[:, :1, :1]

            y = conv(x if zero is None else self._padded(term, x, zero()))
            return y, response if term.bias or zero is not None else None
        if isinstance(term, AvgPool):
            stride = self.stride if term.strided else 1
            padded = self._padded(term, x, _value(zero, x.shape[-1]))
            return _avg_pool(padded, term.kernel_size, stride, self.dilation), zero
        if isinstance(term, Filter):
            padded = self._padded(term, x, _value(zero, x.shape[-1]))
            kernel = term.kernel(x.shape[-1])
            before = zero
            if before is None:
                return self._filter(term, padded, kernel), None
            return self._filter(term, padded, kernel), lambda: before() * kernel.sum(axis=(0, 1))
        if isinstance(term, Scale):
            scale: Callable[[jax.Array], jax.Array] = lambda x: x  # noqa: E731
            if term.name is not None:
                scale = ChannelScale(
                    term.initial, self.param_dtype, term.bias, term.spread, name=term.name
                )
            before, channels = zero, x.shape[-1]
            if before is None and not term.bias:
                return scale(x) * term.factor, None
            return scale(x) * term.factor, lambda: scale(_value(before, channels)) * term.factor
        if isinstance(term, Nonlinearity):
            # Convolutions behind it pad with zeros, as everywhere: nothing is folded here.
            return getattr(jax.nn, term.function)(x), None
        assert isinstance(term, Identity), term
        return x, zero

    @nn.nowrap
    def _filter(self, term: Filter, x: jax.Array, kernel: np.ndarray) -> jax.Array:
        """A constant kernel applied to every channel of padded feature maps."""
        stride = self.stride if term.strided else 1
        return jax.lax.conv_general_dilated(
            x,
            jnp.asarray(kernel, x.dtype),
            (stride, stride),
            "VALID",
            rhs_dilation=(self.dilation, self.dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=x.shape[-1],
        )

    @nn.nowrap
    def _padded(self, term: Conv | AvgPool | Filter, x: jax.Array, zero: jax.Array) -> jax.Array:
        """Feature maps with a border of the response to zero, one value per channel."""
        height, width = self._reach(term)
        shape = (x.shape[0], x.shape[1] + 2 * height, x.shape[2] + 2 * width, x.shape[3])

        def padded(x: jax.Array, zero: jax.Array) -> jax.Array:
            border = jnp.broadcast_to(zero.astype(x.dtype), shape)
            return jax.lax.dynamic_update_slice(border, x, (0, height, width, 0))

        return on_auto_axes(padded, x, zero)

    @nn.nowrap
    def _reach(self, term: Conv | AvgPool | Filter) -> tuple[int, int]:
        """Pixels that a kernel reaches to each side."""
        dilation = self.dilation * (term.dilation if isinstance(term, Conv) else 1)
        height, width = (dilation * (size // 2) for size in term.kernel_size)
        return height, width

    @nn.nowrap
    def _conv(self, term: Conv, in_channels: int, *, padded: bool = False) -> nn.Conv:
        # Explicit padding: "SAME" pads differently from PyTorch at stride 2. A 1x1 kernel
        # without padding then meets the center of the 3x3 one at every stride and dilation.
        height, width = (0, 0) if padded else self._reach(term)
        spatial = max(term.kernel_size) > 1
        groups = term.groups_of(in_channels, self.groups)
        fan_in = math.prod(term.kernel_size) * in_channels // groups
        torch_bias = term.initial == "torch" and not self.deploy
        return nn.Conv(
            term.out_channels(in_channels, self.features),
            term.kernel_size,
            strides=self.stride if term.strided else 1,
            padding=((height, height), (width, width)),
            kernel_dilation=self.dilation * term.dilation if spatial else 1,
            feature_group_count=groups,
            use_bias=term.bias,
            kernel_init=KERNEL_INITIALIZERS[term.initial],
            bias_init=torch_bias_init(fan_in) if torch_bias else nn.initializers.zeros,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            conv_general_dilated=_of_unit_kernels(self._lowered())
            if term.unit
            else self._lowered(),
            name=term.name,
        )

    @nn.nowrap
    def _lowered(self) -> Callable[..., jax.Array] | None:
        if self.lowering == "plain":
            return None
        if self.deploy and self.lowering == "measured":
            return cpu_conv.measured_conv_general_dilated
        if self.deploy:
            return cpu_conv.conv_general_dilated
        return cpu_conv.training_conv_general_dilated

    @nn.nowrap
    def _fast_train(self, x: jax.Array) -> jax.Array:
        """The block by its fast training pass, which updates the same running statistics."""
        if self.axis_name is not None:
            raise ValueError(
                f"{self._where}: train_form={self.train_form!r} does not know axis_name="
                f"{self.axis_name!r}; use 'branches', or jax.jit on a sharded batch, where the "
                "statistics are those of the whole batch without it"
            )
        if self.spec.fast_train is None:
            raise ValueError(
                f"{self._where}: {self.spec.name} blocks have no train_form="
                f"{self.train_form!r}; use 'branches'"
            )
        out_shape = (x.shape[0], *(-(-side // self.stride) for side in x.shape[1:3]), self.features)
        groups = image_groups(out_shape, self.bn_group_size)
        settings = BlockSettings(
            stride=self.stride,
            dilation=self.dilation,
            groups=self.groups,
            identity=self.geometry(x).has_same_shape,
            activation=None if self._activates_itself else self.activation,
            image_groups=groups,
            epsilon=self.epsilon,
            pallas=self.train_form == "covariance_pallas",
        )
        kept = self.spec.keep
        params = {n: child for n, child in self.variables["params"].items() if n not in kept}
        y, statistics = self.spec.fast_train(settings, x.astype(self.dtype), params)
        count = math.prod(out_shape[:3]) // groups
        for name, (batch_mean, batch_var) in statistics.items():
            old: dict[str, jax.Array] = self.get_variable("batch_stats", name)
            mean, var = updated_running(
                old["mean"], old["var"], batch_mean, batch_var, count, self.momentum
            )
            self.put_variable("batch_stats", name, {"mean": mean, "var": var})
        return self._activate(y) if self._activates_itself else y

    @property
    def _activates_itself(self) -> bool:
        """Whether the fast training pass leaves the activation to the block."""
        return self.se is not None or isinstance(self.activation, nn.Module)

    @nn.nowrap
    def _activate(self, y: jax.Array) -> jax.Array:
        """Activation and squeeze-and-excite, in the variant's order."""
        activation = self.activation or (lambda y: y)
        if self.se is None:
            return activation(y)
        squeezed = self.se.squeezed(y.shape[-1])
        if not squeezed:
            raise ValueError(
                f"{self._where}: squeeze-and-excite with reduction {self.se.reduction} leaves "
                f"nothing of {y.shape[-1]} channels"
            )
        gate = SqueezeExciteGate(squeezed, self.dtype, self.param_dtype, name="se")
        return gate(activation(y)) if self.se.after_relu else activation(gate(y))

    @property
    def _where(self) -> str:
        return "/".join(self.path) or type(self).__name__

    @nn.nowrap
    def _check(self, x: jax.Array) -> None:
        if x.ndim != 4:
            raise ValueError(
                f"{self._where}: feature maps have shape {x.shape}; expected 4 axes (images, "
                "height, width, channels), in batches of one image if need be"
            )
        if not x.shape[-1]:
            raise ValueError(f"{self._where}: feature maps of shape {x.shape} have no channels")
        if self.identity and (x.shape[-1] != self.features or self.stride != 1):
            raise ValueError(
                f"{self._where}: an identity branch needs equal channels and stride 1, "
                f"got {x.shape[-1]} -> {self.features} channels at stride {self.stride}"
            )
        try:
            leaves(self.spec.train, self.geometry(x))
        except ValueError as error:
            raise ValueError(f"{self._where}: {error}") from None
        trained = any(self.has_variable("params", name) for name in self.spec.required)
        if self.deploy and trained:
            raise ValueError(
                f"{self._where}: this model is in its deploy form but was given the variables of "
                "the training form; pass them through fuse_params first"
            )
        if not self.deploy and self.has_variable("params", self.spec.deploy):
            raise ValueError(
                f"{self._where}: this model is in its training form but was given the variables "
                "of the deploy form; build it with deploy=True, or make them trainable with "
                "unfuse_params"
            )


def check_options(
    train_form: str, lowering: str, activation: Any, epsilon: float, momentum: float
) -> None:
    """Raises ValueError for options of a block, or of a network of blocks, that cannot be."""
    if train_form not in get_args(TrainForm):
        raise ValueError(
            f"train_form={train_form!r} must be one of {', '.join(map(repr, get_args(TrainForm)))}"
        )
    cpu_conv.check(lowering)
    if activation is not None and not callable(activation):
        raise ValueError(f"activation={activation!r} must be a function, e.g. nn.silu, or None")
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon={epsilon} must be a finite number, 0 or more")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum={momentum} must be from 0 to 1, e.g. 0.9")


class RepVGGBlock(ReparamBlock):
    """A 3x3 convolution that trains as three branches: a `ReparamBlock` with `spec=REPVGG`."""


def _of_unit_kernels(convolve: Callable[..., jax.Array] | None) -> Callable[..., jax.Array]:
    """A convolution that first divides the kernel by its norm per output channel."""
    convolve = convolve or jax.lax.conv_general_dilated
    return lambda x, kernel, *args, **options: convolve(
        x, unit_norm(kernel).astype(kernel.dtype), *args, **options
    )


def _avg_pool(x: jax.Array, size: tuple[int, int], stride: int, dilation: int) -> jax.Array:
    """Means over windows of pixels that are `dilation` apart, without padding."""
    zero = np.zeros((), x.dtype)
    total = jax.lax.reduce_window(
        x,
        zero,
        jax.lax.add,
        window_dimensions=(1, *size, 1),
        window_strides=(1, stride, stride, 1),
        padding="VALID",
        window_dilation=(1, dilation, dilation, 1),
    )
    return total / (size[0] * size[1])


def _value(zero: Response | None, channels: int) -> jax.Array:
    """A response to zero, (1, 1, 1, channels)."""
    return jnp.zeros((1, 1, 1, channels)) if zero is None else zero()


def _sum(a: Response | None, b: Response | None) -> Response | None:
    if a is None or b is None:
        return a or b
    return lambda: a() + b()
