"""Formats that need nothing but this package: StableHLO, and the weights alone in four containers.

StableHLO, through `jax.export`, is one file for CPU, CUDA and TPU and any batch size. It runs
wherever JAX does, without this package: `jax.export.deserialize(blob).call(images)`. It is for
deploying, not for archiving: JAX promises to read it for six months.

The others hold the deploy variables. `repvgg_jax.load_weights` reads the safetensors file, with
the network's description in its header, and the PyTorch state dicts;
`orbax.checkpoint.StandardCheckpointer().restore` reads the Orbax directory.
"""

from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.traverse_util import unflatten_dict

from repvgg_jax.export.description import model_header
from repvgg_jax.export.format import Format, Run, Runtime
from repvgg_jax.export.network import Network
from repvgg_jax.proof import TOLERANCE
from repvgg_jax.text import named_leaves, one_line
from repvgg_jax.weights import load_weights, save_weights

PLATFORMS = ("cpu", "cuda", "tpu")

_BITWISE = {"float32": 0.0}


def write_stablehlo(network: Network, path: Path, dtype: str) -> None:
    """Writes a serialized `jax.export.Exported` with the weights inside."""
    params = jax.tree.map(lambda leaf: leaf, network.params)  # mappings of our own
    for layer in network.model.layers if network.is_repvgg else ():
        # The model would round these at every call; rounded here, they take less space.
        params[layer.name][layer.block.deploy] = {
            name: leaf.astype(jnp.dtype(dtype))
            for name, leaf in params[layer.name][layer.block.deploy].items()
        }
    batch, *size = jax.export.symbolic_shape("batch, height, width")
    height, width, channels = network.image_shape
    if not network.dynamic_size:
        size = [height, width]
    images = jax.ShapeDtypeStruct((batch, *size, channels), network.images.dtype)
    # A float32 artifact computes in full float32 on every platform; accelerators would otherwise
    # multiply in lower precision. The fast alternative is bfloat16.
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        # Arrays that no output depends on must not be constants of the program.
        idle = {name: params.pop(name) for name in network.idle}

        def apply(images: jax.Array) -> Any:
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), idle)
            return network.apply({**params, **zeros}, images, dtype)

        try:
            exported = jax.export.export(jax.jit(apply), platforms=PLATFORMS)(images)
        except (ValueError, TypeError) as error:  # a module that needs to know the numbers
            if network.is_repvgg:
                raise
            raise ValueError(
                f"{network.name} cannot be exported for any number"
                f"{' and size' if network.dynamic_size else ''} of images: {one_line(error)}"
            ) from error
    path.write_bytes(exported.serialize())


def _open_stablehlo(path: Path, network: Network) -> Run:
    call = jax.jit(jax.export.deserialize(bytearray(path.read_bytes())).call)
    return lambda images: jax.tree.map(np.asarray, call(images))


STABLEHLO = Format(
    name="stablehlo",
    filename="model.stablehlo",
    write=write_stablehlo,
    packages=("jax", "jaxlib"),
    tolerances={"float32": TOLERANCE, "bfloat16": 5e-2},
    runtimes=(Runtime("jax", _open_stablehlo),),
    own_modules=True,
    maps_and_sizes=True,
)


def write_safetensors(network: Network, path: Path, dtype: str) -> None:
    """Writes every array under its path, `params/stage1_block0/…`; `dtype` is float32."""
    named = named_leaves(network.variables)
    tensors = {name: np.ascontiguousarray(leaf) for name, leaf in named.items()}
    header = {**network.header(SAFETENSORS.layout), **model_header(network)}
    safetensors.numpy.save_file(tensors, path, metadata=header)


def _read_safetensors(path: Path, network: Network) -> Any:
    flat = safetensors.numpy.load_file(path)
    return unflatten_dict(flat, sep="/")


SAFETENSORS = Format(
    name="safetensors",
    filename="model.safetensors",
    write=write_safetensors,
    packages=("safetensors",),
    tolerances=_BITWISE,
    read=_read_safetensors,
    own_modules=True,
)


def write_orbax(network: Network, path: Path, dtype: str) -> None:
    """Writes an Orbax checkpoint of `{"params": …}`; `dtype` is float32."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), network.variables)
        checkpointer.wait_until_finished()


def _read_orbax(path: Path, network: Network) -> Any:
    import orbax.checkpoint as ocp

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        network.variables,
    )
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path.absolute(), abstract)


ORBAX = Format(
    name="orbax",
    filename="orbax",
    write=write_orbax,
    packages=("orbax-checkpoint",),
    tolerances=_BITWISE,
    read=_read_orbax,
    marker="_CHECKPOINT_METADATA",
    own_modules=True,
)


def _torch(family: str) -> Format:
    """A state dict with another project's names; a .pth file too if PyTorch is installed."""

    def write(network: Network, path: Path, dtype: str) -> None:
        variant = network.model.variant
        save_weights(path, {"params": network.params}, family=family, variant=variant)

    def read(path: Path, network: Network) -> Any:
        model = network.model
        loaded = load_weights(path, variant=model.variant, num_classes=model.num_classes)
        return loaded.variables

    return Format(
        name=f"torch-{family}",
        filename=f"model.{family}.safetensors",
        write=write,
        packages=("safetensors",),
        tolerances=_BITWISE,
        read=read,
        also={f"model.{family}.pth": "torch"},
    )


TORCH_OFFICIAL = _torch("official")
TORCH_TIMM = _torch("timm")
