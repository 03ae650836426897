"""Devices that programs are compiled for without having them: TPU slices and NVIDIA GPUs.

Both compilers run on a CPU: libtpu contains XLA's for TPUs, the CUDA wheels of jaxlib that for
GPUs. What they know of a GPU is a text that describes it, made here from `gpus.toml`.
"""

import dataclasses
import functools
import importlib.resources
import importlib.util
import math
import os
import tomllib
from collections.abc import Mapping
from typing import Any

from repvgg_jax.text import how_to_install

_PLANES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16",
    "16x16x16",
)  # fmt: skip
_MOST_GPUS = 8  # in one machine, joined by NVLink


@dataclasses.dataclass(frozen=True)
class Chip:
    """A generation of TPUs, from Google's documentation.

    Attributes:
      hbm: memory per chip, GiB.
      topologies: of the slices that exist.
      options: further arguments of libtpu.
    """

    hbm: int
    topologies: tuple[str, ...]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


CHIPS: Mapping[str, Chip] = {
    # Both cores of a chip as one device, as on the machines themselves.
    "v4": Chip(32, _CUBES, {"chip_config_name": "megacore"}),
    "v5e": Chip(16, _PLANES),
    "v5p": Chip(95, (*_CUBES, "16x16x24")),
    "v6e": Chip(32, _PLANES),
}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A model of NVIDIA GPUs; the fields are explained in `gpus.toml`."""

    name: str
    capability: int
    multiprocessors: int
    units: int
    clock: float
    bandwidth: int
    memory: int
    cache: int
    shared: int
    shared_per_block: int

    @property
    def description(self) -> str:
        """What XLA calls a GPU target configuration, as the text of its protocol buffer."""
        feature = "ACCELERATED_FEATURES" if self.capability >= 9 else "NONE"
        info = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "threads_per_core_limit": 2048,
            "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 65535,
            "block_dim_limit_z": 65535,
            "registers_per_core_limit": 65536,
            "registers_per_block_limit": 65536,
            "shared_memory_per_block": 49152,
            "shared_memory_per_core": self.shared,
            "shared_memory_per_block_optin": self.shared_per_block,
            "core_count": self.multiprocessors,
            "fpus_per_core": self.units,
            "clock_rate_ghz": self.clock,
            "memory_bandwidth": self.bandwidth,
            "device_memory_size": self.memory,
            "l2_cache_size": self.cache,
        }
        fields = " ".join(f"{name}: {value}" for name, value in info.items())
        capability = f"major: {self.capability} feature_extension: {feature}"
        return (
            f"gpu_device_info {{ {fields} cuda_compute_capability {{ {capability} }} }} "
            'platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 patch: 0 } '
            "runtime_version { major: 12 minor: 9 patch: 0 } "
            f'device_description_str: "{self.name}"'
        )


@functools.cache
def gpus() -> Mapping[str, Gpu]:
    """The known GPUs by their short names."""
    text = importlib.resources.files(__package__).joinpath("gpus.toml").read_text("utf-8")
    return {name: Gpu(**figures) for name, figures in tomllib.loads(text).items()}


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
      name: as it was asked for, e.g. `v5e:16x16` or `h100x8`.
      platform: "tpu" or "gpu".
      chip: what each device is.
      shape: of the TPU slice, e.g. `16x16`; for GPUs their number.
    """

    name: str
    platform: str
    chip: Chip | Gpu
    shape: str

    @classmethod
    def parse(cls, name: str) -> "Target":
        """The devices that a name stands for.

        Args:
          name: GENERATION:SHAPE of TPUs, e.g. `v5e:16x16`, or CARD or CARDxNUMBER of GPUs in one
            machine, e.g. `h100` or `h100x8`.

        Raises:
          ValueError: there are no such devices.
        """
        generation, _, shape = name.partition(":")
        if generation in CHIPS:
            chip = CHIPS[generation]
            if shape not in chip.topologies:
                raise ValueError(
                    f"there is no TPU topology {name!r}; {generation} has: "
                    f"{', '.join(chip.topologies)}"
                )
            return cls(name, "tpu", chip, shape)
        card, times, number = name.partition("x")
        if card in gpus() and (number.isdecimal() if times else not number):
            count = int(number or 1)
            if not 1 <= count <= _MOST_GPUS:
                raise ValueError(
                    f"{name!r} has {count} GPUs; one machine has 1 to {_MOST_GPUS}, e.g. {card}x8"
                )
            return cls(name, "gpu", gpus()[card], str(count))
        examples = ", ".join(f"{each}:{chip.topologies[-1]}" for each, chip in CHIPS.items())
        cards = ", ".join(gpus())
        raise ValueError(
            f"there are no devices {name!r}; write GENERATION:SHAPE for TPUs, one of "
            f"{', '.join(CHIPS)}, e.g. {examples}, or CARDxNUMBER for GPUs, one of {cards}, "
            "e.g. h100x8"
        )

    @property
    def count(self) -> int:
        """The number of devices."""
        return math.prod(int(size) for size in self.shape.split("x"))

    @property
    def memory(self) -> int:
        """Bytes of memory per device."""
        return self.chip.memory if isinstance(self.chip, Gpu) else self.chip.hbm * 2**30

    @property
    def environment(self) -> dict[str, str]:
        """What the compiling process needs in its environment."""
        if self.platform == "tpu":
            return {
                "JAX_PLATFORMS": "cpu",
                "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server
                "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            }
        # Autotuning times kernels, for which there would have to be a GPU.
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0".strip()
        return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}

    def check_installed(self) -> None:
        """Raises ValueError if the compiler is missing, with the command that installs it."""
        if self.platform == "tpu":
            kind, module, install = "TPUs", "libtpu", how_to_install(extra="tpu")
        else:
            kind, module, install = "NVIDIA GPUs", "jax_cuda12_plugin", how_to_install(extra="cuda")
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"compiling for {kind} needs {module}, also without one: {install}")

    def devices(self) -> list[Any]:
        """The devices, in a process with `environment`."""
        from jax.experimental import topologies

        if isinstance(self.chip, Gpu):
            found = topologies.get_topology_desc(
                platform="cuda",
                topology=f"1x1x{self.count}",
                target_config=self.chip.description,
            )
        else:
            options = dict(self.chip.options)
            if self.shape == "1x1":  # a host of one chip; others have four
                options |= {"chips_per_host_bounds": (1, 1, 1), "num_slices": 1}
            found = topologies.get_topology_desc(platform="tpu", topology_name=self.name, **options)
        return list(found.devices)
