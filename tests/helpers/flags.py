"""Flags of XLA for the tests and for the processes that they start."""

import os

_DEVICES = "--xla_force_host_platform_device_count"


def xla_flags(devices: int | None = None) -> str:
    """The flags in the environment, with this number of CPU devices instead of theirs.

    Args:
      devices: how many; None for as many as there are by default.
    """
    given = [f for f in os.environ.get("XLA_FLAGS", "").split() if not f.startswith(_DEVICES)]
    return " ".join(given if devices is None else [*given, f"{_DEVICES}={devices}"])
