"""Options of XLA for the train step; what there is depends on the platform."""

from collections.abc import Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_EXAMPLE = "xla_tpu_msa_inefficient_use_to_copy_ratio=3"


def compiler_options(settings: Sequence[str], mesh: Mesh) -> dict[str, str]:
    """`config.train.compiler_options` as `jax.jit` takes them, tried on the devices' compiler.

    Args:
      settings: NAME=VALUE each.
      mesh: the devices.

    Raises:
      ValueError: not of that form, or the compiler knows no such option or value.
    """
    where = f"config.train.compiler_options={settings!r}"
    if not all(isinstance(setting, str) and "=" in setting for setting in settings):
        raise ValueError(f"{where} must hold texts NAME=VALUE, as ({_EXAMPLE!r},) does")
    options = dict(setting.split("=", maxsplit=1) for setting in settings)
    if options:
        nothing = jax.ShapeDtypeStruct((), "float32", sharding=NamedSharding(mesh, PartitionSpec()))
        try:
            jax.jit(lambda x: x, compiler_options=options).lower(nothing).compile()
        except jax.errors.JaxRuntimeError as error:
            platform = mesh.devices.flat[0].platform
            raise ValueError(f"{where} on {platform}: {str(error).splitlines()[0]}") from error
    return options
