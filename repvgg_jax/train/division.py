"""How a batch is divided: over devices, into pieces, into groups of images."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Division:
    """What has to divide a batch.

    Attributes:
      devices: of all processes together; each has as many images of every piece.
      group: images that share batch statistics; None for the whole batch.
      pieces: that go through the network one by one, of whole groups each.
      mix_group: images that are mixed among themselves; 0 for the whole batch, or for none.
    """

    devices: int
    group: int | None = None
    pieces: int = 1
    mix_group: int = 0

    @property
    def unit(self) -> int:
        """The smallest batch that can be divided; the others are its multiples."""
        return math.lcm(
            self.devices * self.pieces, (self.group or 1) * self.pieces, self.mix_group or 1
        )

    def divides(self, batch: int) -> bool:
        """Whether a batch of so many images can be divided."""
        return batch > 0 and batch % self.unit == 0

    def require(self, name: str, batch: int, *, of: str = "") -> None:
        """Makes sure that a batch can be divided.

        Args:
          name: of the setting, without `config.`.
          batch: its value.
          of: what to say of the devices, say " (4 processes of 2)".

        Raises:
          ValueError: it cannot; with the nearest values of the settings that would make it.
        """
        group, pieces = self.group or 1, self.pieces
        if self.divides(batch):
            return
        if batch < 1 or batch % self.devices:
            raise ValueError(
                f"config.{name}={batch} cannot be split over {self.devices} devices{of}; "
                f"the nearest that can{self._others()}: {self._batches(batch)}"
            )
        if batch % group:
            what = f"config.bn.group_size={group} does not divide config.{name}={batch}"
            offer = self._nearest(batch, "group", group)
        elif batch % (group * pieces):
            what = (
                f"config.train.accumulate={pieces} does not divide the {batch // group} groups of "
                f"{group} images of config.{name}={batch}"
            )
            offer = self._nearest(batch, "pieces", pieces)
        elif batch % (self.mix_group or 1):
            what = (
                f"config.augment.mix_group={self.mix_group} does not divide config.{name}={batch}"
            )
            offer = self._nearest(batch, "mix_group", self.mix_group)
        else:
            what = (
                f"config.train.accumulate={pieces} makes pieces of {batch // pieces} images, which "
                f"{self.devices} devices{of} do not divide"
            )
            offer = self._nearest(batch, "pieces", pieces)
        raise ValueError(
            f"{what}; the nearest that work: {offer or 'none'}, "
            f"or config.{name}={self._batches(batch)}"
        )

    def nearest_group(self, batch: int, wanted: int) -> str:
        """The group sizes next to `wanted` with which `batch` can be divided, "" for none."""
        return self._nearest(batch, "group", wanted)

    def _others(self) -> str:
        """The settings beside the devices that a batch depends on."""
        settings = {
            "config.bn.group_size": self.group or 1,
            "config.train.accumulate": self.pieces,
            "config.augment.mix_group": self.mix_group or 1,
        }
        said = [f"{name}={value}" for name, value in settings.items() if value > 1]
        return f" with {' and '.join(said)}" if said and self.unit != self.devices else ""

    def _batches(self, wanted: int) -> str:
        below = max(0, wanted) // self.unit * self.unit
        return f"{below} or {below + self.unit}" if below else f"{self.unit}"

    def _nearest(self, batch: int, field: str, wanted: int) -> str:
        """The two divisors of `batch` next to `wanted` that work in the place of `field`."""

        def works(value: int) -> bool:
            return dataclasses.replace(self, **{field: value}).divides(batch)

        divisors = (value for value in range(1, batch + 1) if batch % value == 0)
        found = sorted(filter(works, divisors), key=lambda value: abs(value - wanted))
        return " or ".join(map(str, sorted(found[:2])))
