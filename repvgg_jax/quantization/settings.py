"""How a network is quantized: every choice, checked once."""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

from repvgg_jax.quantization.calibrators import CALIBRATORS
from repvgg_jax.text import did_you_mean


@dataclasses.dataclass(frozen=True)
class Target:
    """The numbers that activations become on a kind of hardware.

    Weights are symmetric int8 per output channel, -127 … 127, on all of them.

    Attributes:
      name: as in `--target`.
      symmetric: whether zero is in the middle, so that the zero point is 0; else the range starts
        where the activations start, at 0 after a ReLU.
      lowest: the smallest number; 256 are used.
    """

    name: str
    symmetric: bool
    lowest: int

    @property
    def highest(self) -> int:
        """The largest number."""
        return self.lowest + 255


TARGETS: Mapping[str, Target] = types.MappingProxyType(
    {
        target.name: target
        for target in (
            Target("vnni", symmetric=False, lowest=0),
            Target("tensorrt", symmetric=True, lowest=-128),
            Target("arm", symmetric=False, lowest=-128),
        )
    }
)
"""By name: uint8 for x86 processors, int8 around zero for TensorRT, int8 for ARM and LiteRT."""


TRAINED = "trained"
"""The calibrator of ranges that quantization-aware training has found."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a network is quantized after training.

    Attributes:
      target: one of `TARGETS`.
      calibrator: how ranges follow from activations, one of `CALIBRATORS`; `TRAINED` for those of
        quantization-aware training, which `quantize` does not know.
      percentile: of the calibrator `percentile`: how many percent of the values are at most the
        largest number, and at least the smallest one.
      float_layers: layers that stay in float, by name, e.g. `("stem", "head")`.
      equalize: whether channels are first scaled between layers, see `reparam.equalize`; None if
        that lowers the error of the logits on calibration images, and all activations are ReLU, for
        which it is exact.
      bias_correction: whether biases make up for the shift of each channel's mean; None if that
        lowers the error of the logits.

    Raises:
      ValueError: an unknown target or calibrator, or a percentage that cannot be one.
    """

    target: str = "vnni"
    calibrator: str = "mse"
    percentile: float = 99.99
    float_layers: tuple[str, ...] = ()
    equalize: bool | None = None
    bias_correction: bool | None = None

    def __post_init__(self) -> None:
        for field, known in (("target", TARGETS), ("calibrator", (*CALIBRATORS, TRAINED))):
            value = getattr(self, field)
            if value not in known:
                raise ValueError(
                    f"--{field}={value} is unknown; {did_you_mean(str(value), known)}available: "
                    f"{', '.join(known)}"
                )
        if not 50 < self.percentile <= 100:
            raise ValueError(
                f"--percentile={self.percentile} must be above 50, up to 100; 99.99 is usual"
            )

    @property
    def numbers(self) -> Target:
        """What activations become."""
        return TARGETS[self.target]

    def as_dict(self) -> dict[str, Any]:
        """Every setting, for `proof.json`."""
        found = dataclasses.asdict(self) | {"float_layers": list(self.float_layers)}
        if self.calibrator != "percentile":
            del found["percentile"]
        return {**found, "weights": "int8, symmetric, per output channel", "bits": 8}
