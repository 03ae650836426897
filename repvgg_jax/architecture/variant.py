"""A `Variant`: how deep, how wide and how grouped a network is, unrolled into its layers."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from repvgg_jax.activations import ACTIVATIONS
from repvgg_jax.architecture import networks
from repvgg_jax.architecture.installed import Form, SavedBlock
from repvgg_jax.architecture.layer import Layer, SqueezeExcite, check_layers
from repvgg_jax.reparam import BlockSpec, Geometry
from repvgg_jax.text import one_line, positive_integer
from repvgg_jax.typed import typed

_MOST_BLOCKS, _MOST_CHANNELS = 10_000, 1_000_000  # anything above is a damaged file

Dilation = Literal["stage", "timm"]


@dataclasses.dataclass(frozen=True)
class Variant:
    """An architecture. The official ones are in `VARIANTS`; any other works as well.

    Attributes:
      name: what messages and metadata call it.
      depths: blocks of every stage after the stem.
      channels: channels of every stage after the stem; a tuple gives every block of a stage its
        own, e.g. those that pruning has left. Only blocks that keep their width have an identity
        branch.
      stem_channels: channels of the stem, a single block.
      groups: an int gives the paper's rule, g groups in every second block after the
        stem (the 2nd, 4th, …); a tuple gives every block after the stem its own.
      se: squeeze-and-excite in every block, or None.
      auxiliary: blocks whose output feeds an auxiliary classifier during training.
      strides: stride of the first block of every stage; None means 2 everywhere.
      stem_stride: stride of the stem.
      dilation: which blocks are dilated where an output stride replaces the stride of a stage:
        "stage", all of them, as in the paper's PSPNet; or "timm", where the first block of such a
        stage has half of the dilation (1, then 2), for backbones that timm trained at that stride.
        Parameters are the same.
      block: what a layer is: a `BlockSpec`; a function of a `Layer` of RepVGG to a `BlockSpec`, or
        to the layers in its place, which are named by their place in the stage; or a name of
        either, see `repvgg_jax.architecture.networks.block_named`. Only names can be saved in a
        config or a deploy directory; those of installed packages with a digest of their layers.
      activation: of its layers, a name in `ACTIVATIONS`.
      head: what classifies the pooled features, a name in `repvgg_jax.architecture.networks.HEADS`.
    """

    name: str
    depths: tuple[int, ...]
    channels: tuple[int | tuple[int, ...], ...]
    stem_channels: int
    groups: int | tuple[int, ...] = 1
    se: SqueezeExcite | None = None
    auxiliary: tuple[str, ...] = ()
    strides: tuple[int, ...] | None = None
    stem_stride: int = 2
    dilation: Dilation = "stage"
    block: "str | BlockSpec | Callable[[Layer], BlockSpec | tuple[Layer, ...]]" = dataclasses.field(
        default="repvgg", metadata={"saved": str | SavedBlock}
    )
    activation: str = "relu"
    head: str = "linear"

    def __post_init__(self) -> None:
        # Lists, e.g. from a config file, become tuples: a Variant must be hashable.
        for field in ("depths", "channels", "auxiliary", "strides", "groups"):
            value = getattr(self, field)
            if isinstance(value, (list, tuple, np.ndarray)):
                value = tuple(tuple(v) if isinstance(v, (list, np.ndarray)) else v for v in value)
                object.__setattr__(self, field, value)
        for field in ("depths", "channels", "stem_channels", "groups", "strides", "stem_stride"):
            value = getattr(self, field)
            if value is not None:
                object.__setattr__(self, field, self._integers(field, value))
        if isinstance(self.se, Mapping):
            object.__setattr__(self, "se", SqueezeExcite(**self.se))
        block: Any = self.block
        saved = typed(SavedBlock, block, "block") if isinstance(block, Mapping) else block
        if not isinstance(saved, SavedBlock):
            self._check()
            return
        object.__setattr__(self, "block", saved.name)
        self._checked(saved.check_installed)
        try:
            self._check()
        except ValueError as error:
            raise ValueError(f"{error}{saved.other_version()}") from error
        self._checked(saved.check, self.layers())

    def _integers(self, field: str, value: Any) -> Any:
        """A positive integer, or nested tuples of such, as Python's integers."""
        if isinstance(value, tuple):
            return tuple(self._integers(field, number) for number in value)
        return positive_integer(f"variant {self.name!r}", field, value)

    def _checked(self, check: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """Calls `check`; the message of a ValueError begins with the variant's name."""
        try:
            check(*arguments, **options)
        except ValueError as error:
            raise ValueError(f"variant {self.name!r}: {error}") from None

    def _check(self) -> None:
        where = f"variant {self.name!r}"
        if len(self.depths) != len(self.channels) or not self.depths:
            raise ValueError(
                f"{where}: {len(self.depths)} depths {self.depths} but {len(self.channels)} "
                f"channels {self.channels}; give one of each for every stage"
            )
        if len(self.stage_strides) != len(self.depths):
            raise ValueError(
                f"{where}: {len(self.stage_strides)} strides {self.strides} "
                f"for {len(self.depths)} stages; give one for every stage"
            )
        if isinstance(self.block, str):
            self._checked(networks.block_named, self.block)
        elif not callable(self.block) and not isinstance(self.block, BlockSpec):
            raise ValueError(
                f"{where}: block={one_line(self.block)} must be a name, a BlockSpec or a function "
                "of a Layer"
            )
        for field, known in (("activation", ACTIVATIONS), ("head", networks.HEADS)):
            if (value := getattr(self, field)) not in known:
                raise ValueError(
                    f"{where}: {field}={value!r} must be one of {', '.join(map(repr, known))}"
                )
        numbers = [*self.depths, self.stem_channels, self.stem_stride, *self.stage_strides]
        for stage, widths in enumerate(self.channels):
            if isinstance(widths, tuple) and len(widths) != self.depths[stage]:
                raise ValueError(
                    f"{where}: {len(widths)} channels {widths} for {self.depths[stage]} blocks of "
                    f"stage {stage + 1}; give one for every block, or one int for all"
                )
            numbers += widths if isinstance(widths, tuple) else (widths,)
        if sum(self.depths) > _MOST_BLOCKS or max(numbers) > _MOST_CHANNELS:
            blocks, widest = one_line(sum(self.depths), 20), one_line(max(numbers), 20)
            raise ValueError(
                f"{where}: {blocks} blocks of up to {widest} channels; the most are "
                f"{_MOST_BLOCKS} blocks of {_MOST_CHANNELS} channels"
            )
        if self.dilation not in get_args(Dilation):
            raise ValueError(
                f"{where}: dilation={self.dilation!r} must be one of "
                f"{', '.join(map(repr, get_args(Dilation)))}"
            )
        if isinstance(self.groups, tuple) and len(self.groups) != sum(self.depths):
            raise ValueError(
                f"{where}: {len(self.groups)} groups for {sum(self.depths)} blocks after the stem; "
                f"give one for every block, or one int for the paper's every second block"
            )
        layers = tuple(self._undilated())
        self._checked(check_layers, layers, features=self.features, total_stride=self.total_stride)
        names = {layer.name for layer in layers}
        if unknown := [name for name in self.auxiliary if name not in names]:
            raise ValueError(f"{where}: auxiliary names no block: {', '.join(unknown)}")

    def as_dict(self) -> dict[str, Any]:
        """The fields, in types that JSON has.

        Raises:
          ValueError: its `block` has no name, and no file can contain a function.
        """
        if not isinstance(self.block, str):
            raise ValueError(
                f"variant {self.name!r} has a {type(self.block).__name__} as block, which cannot "
                "be saved; give it a name, see docs/own_block.md"
            )
        fields = dataclasses.asdict(self)
        # Digests of settings that were saved before these fields existed must not change.
        kept = _without_defaults(fields, Variant, ("activation", "head"))
        if kept["se"] is not None:
            kept["se"] = _without_defaults(kept["se"], SqueezeExcite, ("multiple",))
        return kept

    def as_saved(self, form: Form) -> dict[str, Any]:
        """`as_dict` for files: what is known of a block of an installed package is part of it.

        Args:
          form: of the network that is saved with it.

        Raises:
          ValueError: as `as_dict`.
        """
        fields = self.as_dict()
        if self.block not in networks.BLOCKS:
            saved = SavedBlock.of(fields["block"], self.layers(), form)
            fields["block"] = dataclasses.asdict(saved)
        return fields

    @property
    def stage_strides(self) -> tuple[int, ...]:
        """Stride of the first block of every stage."""
        return self.strides if self.strides is not None else (2,) * len(self.depths)

    @property
    def total_stride(self) -> int:
        """Images' pixels per pixel of the last feature map: 32 for the official ones."""
        return self.stem_stride * math.prod(self.stage_strides)

    @property
    def features(self) -> int:
        """Width of the pooled features that the classifier sees."""
        last = self.channels[-1]
        return last[-1] if isinstance(last, tuple) else last

    @functools.lru_cache(maxsize=256)  # noqa: B019 (variants are few, and values)
    def layers(
        self, output_stride: int | None = None, dilations: tuple[int, ...] | None = None
    ) -> tuple[Layer, ...]:
        """Every block in order.

        Args:
          output_stride: replaces the strides beyond it by dilation, as the paper's PSPNet
            does: with 8, stage 3 runs at dilation 2 and stage 4 at dilation 4 (see `dilation`).
            None keeps every stride. Names, parameter shapes and identity branches do not depend
            on it.
          dilations: one per block after the stem, instead of those that follow from
            `output_stride`.

        Raises:
          ValueError: no stage ends at that stride, or not one dilation for every block.
        """
        if dilations is not None:
            return self._dilated(self.layers(output_stride), dilations)
        limit = self.total_stride if output_stride is None else output_stride
        layers: list[Layer] = []
        stride, dilation = 1, 1
        reached = {1}
        for layer in self._undilated():
            if layer.stride > 1:
                reached.add(stride * dilation)
            # The identity branch was decided before dilation replaces a stride, so that one
            # checkpoint serves every output stride.
            if layers and stride * layer.stride > limit:
                dilation *= layer.stride
                layer = dataclasses.replace(layer, stride=1)
            stride *= layer.stride
            own = self._dilation_of(layer.index, dilation) if layers else dilation
            layers.append(dataclasses.replace(layer, dilation=own))
        reached.add(stride * dilation)
        if limit != stride:
            valid = ", ".join(str(s) for s in sorted(reached - {1}))
            raise ValueError(
                f"variant {self.name!r} cannot have output_stride={output_stride}: "
                f"its stages end at strides {valid}"
            )
        return tuple(layers)

    def _dilation_of(self, index: int, dilation: int) -> int:
        """Dilation of block `index` of a stage, where the stage's is `dilation`."""
        if self.dilation == "timm" and index == 0:
            return 1 if dilation <= 2 else 2
        return dilation

    def _dilated(self, layers: Sequence[Layer], dilations: Sequence[int]) -> tuple[Layer, ...]:
        stem, *blocks = layers
        if len(dilations) != len(blocks) or min(dilations) < 1:
            raise ValueError(
                f"variant {self.name!r}: {len(dilations)} dilations {tuple(dilations)} for "
                f"{len(blocks)} blocks after the stem; give one of 1 or more for every block"
            )
        pairs = zip(blocks, dilations, strict=True)
        return (stem, *(dataclasses.replace(layer, dilation=rate) for layer, rate in pairs))

    @property
    def blocks(self) -> tuple[BlockSpec, ...]:
        """The kinds of blocks, each once; the head's, if it is one."""
        found = [layer.block for layer in self.layers()]
        head = networks.HEADS[self.head]
        return tuple({id(block): block for block in (*found, *([head] if head else []))}.values())

    def head_layer(self, num_classes: int) -> Layer | None:
        """The head as a layer on a single pixel; None for a plain linear layer, or no classes."""
        head = networks.HEADS[self.head]
        if head is None or not num_classes:
            return None
        # Wide: it costs nothing and decides everything.
        return Layer(
            "head", self.features, num_classes, 1, 1, 1, False, head, activate=False, wide=True
        )

    def geometries(self, in_channels: int = 3) -> dict[str, Geometry]:
        """Shapes of all blocks by name, for `fuse_params` and `unfuse_params`.

        Args:
          in_channels: channels of the images.
        """
        return {layer.name: layer.geometry(in_channels) for layer in self.layers()}

    def _undilated(self) -> Iterator[Layer]:
        """Every block in order, with the variant's own strides."""
        stem = Layer("stem", None, self.stem_channels, self.stem_stride, 1, 1, False, se=self.se)
        for count, other in enumerate(self._in_place_of(stem)):
            yield dataclasses.replace(other, name=f"stem_block{count}" if count else "stem")
        in_channels, position = self.stem_channels, 0
        for stage, (depth, widths) in enumerate(zip(self.depths, self.channels, strict=True)):
            count = 0
            for index in range(depth):
                position += 1
                features = widths[index] if isinstance(widths, tuple) else widths
                stride = self.stage_strides[stage] if index == 0 else 1
                layer = Layer(
                    name=f"stage{stage + 1}_block{index}",
                    in_channels=in_channels,
                    features=features,
                    stride=stride,
                    dilation=1,
                    groups=self._groups_of(position),
                    identity=in_channels == features and stride == 1,
                    se=self.se,
                )
                for other in self._in_place_of(layer):
                    yield dataclasses.replace(other, name=f"stage{stage + 1}_block{count}")
                    count += 1
                in_channels = features

    def _in_place_of(self, layer: Layer) -> tuple[Layer, ...]:
        """What the variant's `block` makes of a layer of RepVGG."""
        block = networks.block_named(self.block) if isinstance(self.block, str) else self.block
        try:
            found = block if isinstance(block, BlockSpec) else block(layer)
        except Exception as error:  # whatever the function does
            reason = one_line(f"{type(error).__name__}: {error}")
            raise ValueError(
                f"variant {self.name!r}: its block fails for layer {layer.name}: {reason}"
            ) from error
        if isinstance(found, BlockSpec):
            return (dataclasses.replace(layer, block=found),)
        if not isinstance(found, (tuple, list)) or not all(isinstance(x, Layer) for x in found):
            raise ValueError(
                f"variant {self.name!r}: its block gives {one_line(found)} for layer {layer.name}; "
                "it has to give a BlockSpec or a tuple of layers"
            )
        return tuple(found)

    def _groups_of(self, index: int) -> int:
        """Groups of block `index`, where the stem is 0."""
        if isinstance(self.groups, tuple):
            return self.groups[index - 1]
        return self.groups if index % 2 == 0 else 1


def _without_defaults(fields: dict[str, Any], cls: Any, names: Sequence[str]) -> dict[str, Any]:
    """The fields of a dataclass but those of these names that have their default."""
    default = {name: getattr(cls, name) for name in names}
    return {k: v for k, v in fields.items() if k not in default or v != default[k]}
