"""The deploy variables as they are, for JAX itself: `params/stage1_block0/reparam/kernel`, ….

`repvgg_jax.load_weights` reads them.

The network's description is in the header.
"""

from pathlib import Path

import jax
import numpy as np
import safetensors.numpy

from repvgg_jax import proof
from repvgg_jax.export.format import Format, Run, Runtime
from repvgg_jax.export.network import Network, leaves


def write(network: Network, path: Path, dtype: str) -> None:
    """Writes every array under its path in the tree; `dtype` is float32."""
    named = leaves({"params": network.params})
    tensors = {name: np.ascontiguousarray(leaf) for name, leaf in named.items()}
    safetensors.numpy.save_file(tensors, path, metadata=network.header(FORMAT.layout))


def _open(path: Path, network: Network) -> Run:
    tensors = safetensors.numpy.load_file(path)
    ordered = [tensors[name] for name in leaves({"params": network.params})]
    params = jax.tree.unflatten(jax.tree.structure(network.params), ordered)
    return lambda images: proof.logits(network.apply, params, images)


FORMAT = Format(
    name="safetensors",
    filename="model.safetensors",
    layout="NHWC",
    write=write,
    packages=("safetensors",),
    runtimes=(Runtime("safetensors", _open),),
    tolerances={"float32": proof.TOLERANCE},
    holds_graph=False,
)
