"""StableHLO through `jax.export`: one file for CPU, CUDA and TPU, any batch size.

The file runs wherever JAX does, without this package: `jax.export.deserialize(blob).call(images)`.
It is for deploying, not for keeping: JAX promises to read it for six months.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from repvgg_jax.export.format import Format, Run, Runtime
from repvgg_jax.export.network import Network
from repvgg_jax.proof import TOLERANCE

PLATFORMS = ("cpu", "cuda", "tpu")


def write(network: Network, path: Path, dtype: str) -> None:
    """Writes a serialised `jax.export.Exported` with the weights inside."""
    params = {name: dict(child) for name, child in network.params.items()}
    for layer in network.model.layers:
        # The model would round them at every call; done once, the file is as small as its type.
        params[layer.name]["reparam"] = jax.tree.map(
            lambda leaf: leaf.astype(jnp.dtype(dtype)), params[layer.name]["reparam"]
        )
    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *network.image_shape), network.images.dtype)
    # An artefact called float32 computes in float32 on every platform; accelerators would
    # otherwise multiply with fewer bits. Whoever wants their speed asks for bfloat16.
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        exported = export.export(
            jax.jit(lambda images: network.apply(params, images, dtype)), platforms=PLATFORMS
        )(images)
    path.write_bytes(exported.serialize())


def _open(path: Path, network: Network) -> Run:
    call = jax.jit(export.deserialize(bytearray(path.read_bytes())).call)
    return lambda images: np.asarray(call(images))


FORMAT = Format(
    name="stablehlo",
    filename="model.stablehlo",
    layout="NHWC",
    write=write,
    packages=("jax", "jaxlib"),
    runtimes=(Runtime("jax", _open),),
    tolerances={"float32": TOLERANCE, "bfloat16": 5e-2},
)
