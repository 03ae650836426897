"""The eight CPU devices of the tests; importing this starts JAX's backend."""

import jax

MESH = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
OVER_BATCH = jax.sharding.NamedSharding(MESH, jax.sharding.PartitionSpec("data"))
"""The batch axis over all devices."""
