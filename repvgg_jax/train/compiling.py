"""Options of XLA for the train step; what there is depends on the platform."""

from collections.abc import Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

FEWER_COPIES = "xla_tpu_msa_inefficient_use_to_copy_ratio=3"
"""On TPUs, copies into fast memory only where they save traffic; see `docs/covariance.md`."""


def parse_options(settings: Sequence[str]) -> dict[str, str]:
    """`config.train.compiler_options`, NAME=VALUE each, as `jax.jit` takes them.

    Raises:
      ValueError: not of that form.
    """
    if not all(isinstance(setting, str) and "=" in setting for setting in settings):
        raise ValueError(
            f"config.train.compiler_options={settings!r} must hold texts NAME=VALUE, as "
            f"({FEWER_COPIES!r},) does"
        )
    return dict(setting.split("=", maxsplit=1) for setting in settings)


def try_options(settings: Sequence[str], mesh: Mesh) -> None:
    """Compiles next to nothing with the options.

    Not part of reading a configuration: what was trained on one platform is evaluated and
    converted on others, whose compilers have other options.

    Args:
      settings: as for `parse_options`.
      mesh: the devices to compile for.

    Raises:
      ValueError: their compiler knows no such option or value.
    """
    options = parse_options(settings)
    if not options:
        return
    nothing = jax.ShapeDtypeStruct((), "float32", sharding=NamedSharding(mesh, PartitionSpec()))
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(nothing).compile()
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"config.train.compiler_options={settings!r} on {mesh.devices.flat[0].platform}: "
            f"{str(error).splitlines()[0]}"
        ) from error
