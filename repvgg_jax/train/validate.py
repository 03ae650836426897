"""Settings against the machine: how a batch divides, and what the compiler knows.

What depends on the settings alone is checked by the settings themselves.
"""

import dataclasses
import math

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from repvgg_jax.text import plural
from repvgg_jax.train.settings import Settings


def check_batches(settings: Settings, *, devices: int, processes: int = 1) -> None:
    """Checks that the batches divide over devices, microbatches and groups of images.

    Args:
      settings: of the run.
      devices: number of devices of all processes together.
      processes: number of processes.

    Raises:
      ValueError: a batch size that does not divide, with the nearest values that work.
    """
    suffix = f" ({processes} processes of {devices // processes})" if processes > 1 else ""
    batch, microbatches = settings.train.batch_size, settings.train.accumulate
    division = Division(
        devices,
        group=settings.bn.group_size,
        microbatches=microbatches,
        mix_group=settings.mix_group,
    )
    if microbatches > 1 and division.group is None:
        example = division.nearest_group(batch, 32) or "32"
        raise ValueError(
            f'config.bn.group_size="global" and config.train.accumulate={microbatches} exclude '
            f"each other: no microbatch sees the whole batch; give a group size that divides "
            f"{batch // microbatches}, e.g. {example}"
        )
    division.require("train.batch_size", batch, suffix=suffix)
    Division(devices).require("eval.batch_size", settings.eval.batch_size, suffix=suffix)


def check_compiler_options(settings: Settings, mesh: Mesh) -> None:
    """Compiles a trivial program with `config.train.compiler_options`.

    Only for training: a run is also evaluated and converted on platforms whose compilers have
    other options.

    Args:
      settings: of the run.
      mesh: devices to compile for.

    Raises:
      ValueError: the compiler knows no such option or value.
    """
    if not settings.train.xla_options:
        return
    nothing = jax.ShapeDtypeStruct((), "float32", sharding=NamedSharding(mesh, PartitionSpec()))
    try:
        jitted = jax.jit(lambda x: x, compiler_options=settings.train.xla_options)
        jitted.lower(nothing).compile()
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"config.train.compiler_options={settings.train.compiler_options!r} on "
            f"{mesh.devices.flat[0].platform}: {str(error).splitlines()[0]}; a run that began on "
            'another platform goes on without them: --config.train.compiler_options="()"'
        ) from error


@dataclasses.dataclass(frozen=True)
class Division:
    """What must divide a batch.

    Attributes:
      devices: number of devices; each holds an equal share of every microbatch.
      group: images that share batch statistics; None for the whole batch.
      microbatches: number of microbatches, of whole groups each.
      mix_group: images that are mixed among themselves; 0 for the whole batch, or for none.
    """

    devices: int
    group: int | None = None
    microbatches: int = 1
    mix_group: int = 0

    @property
    def unit(self) -> int:
        """The smallest batch that divides; all others are its multiples."""
        count = self.microbatches
        return math.lcm(self.devices * count, (self.group or 1) * count, self.mix_group or 1)

    def divides(self, batch: int) -> bool:
        """Whether a batch of so many images divides."""
        return batch > 0 and batch % self.unit == 0

    def require(self, name: str, batch: int, *, suffix: str = "") -> None:
        """Checks that a batch divides.

        Args:
          name: of the setting, without `config.`.
          batch: its value.
          suffix: appended to the number of devices in messages, e.g. " (4 processes of 2)".

        Raises:
          ValueError: it does not; with the nearest values of the settings that would work.
        """
        group, count = self.group or 1, self.microbatches
        if self.divides(batch):
            return
        if batch < 1:
            raise ValueError(
                f"config.{name}={batch} must be 1 or more; the smallest that can be split over "
                f"{plural(self.devices, 'device')}{suffix}{self._others()}: {self.unit}"
            )
        if batch % self.devices:
            raise ValueError(
                f"config.{name}={batch} cannot be split over "
                f"{plural(self.devices, 'device')}{suffix}; the nearest that can"
                f"{self._others()}: {self._batches(batch)}"
            )
        if batch % group:
            what = f"config.bn.group_size={group} does not divide config.{name}={batch}"
            offer = self._nearest(batch, "group", group)
        elif batch % (group * count):
            what = (
                f"config.train.accumulate={count} does not divide the {batch // group} groups of "
                f"{group} images of config.{name}={batch}"
            )
            offer = self._nearest(batch, "microbatches", count)
        elif batch % (self.mix_group or 1):
            what = (
                f"config.augment.mix_group={self.mix_group} does not divide config.{name}={batch}"
            )
            offer = self._nearest(batch, "mix_group", self.mix_group)
        else:
            what = (
                f"config.train.accumulate={count} makes microbatches of {batch // count} images, "
                f"which {self.devices} devices{suffix} do not divide"
            )
            offer = self._nearest(batch, "microbatches", count)
        raise ValueError(
            f"{what}; the nearest that work: {offer or 'none'}, "
            f"or config.{name}={self._batches(batch)}"
        )

    def nearest_group(self, batch: int, wanted: int) -> str:
        """The group sizes nearest to `wanted` with which `batch` divides; "" if there are none."""
        return self._nearest(batch, "group", wanted)

    def _others(self) -> str:
        """The settings beside the devices that a batch depends on."""
        settings = {
            "config.bn.group_size": self.group or 1,
            "config.train.accumulate": self.microbatches,
            "config.augment.mix_group": self.mix_group or 1,
        }
        named = [f"{name}={value}" for name, value in settings.items() if value > 1]
        return f" with {' and '.join(named)}" if named and self.unit != self.devices else ""

    def _batches(self, wanted: int) -> str:
        below = max(0, wanted) // self.unit * self.unit
        return f"{below} or {below + self.unit}" if below else f"{self.unit}"

    def _nearest(self, batch: int, field: str, wanted: int) -> str:
        """The two divisors of `batch` nearest to `wanted` that work as `field`."""

        def works(value: int) -> bool:
            return dataclasses.replace(self, **{field: value}).divides(batch)

        divisors = (value for value in range(1, batch + 1) if batch % value == 0)
        found = sorted(filter(works, divisors), key=lambda value: abs(value - wanted))
        return " or ".join(map(str, sorted(found[:2])))
