"""The deploy variables as they are, for JAX itself: `params/stage1_block0/reparam/kernel`, ….

Read back with `safetensors.numpy.load_file`; the network's description is in the header.
"""

import json
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy

from repvgg_jax.export.format import Format, Run, Runtime
from repvgg_jax.export.network import Network, leaves
from repvgg_jax.proof import TOLERANCE


def write(network: Network, path: Path, dtype: str) -> None:
    """Writes every parameter under its path in the tree; `dtype` is float32."""
    header = {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in network.description(FORMAT.layout).items()
    }
    tensors = {
        name: np.ascontiguousarray(leaf)
        for name, leaf in leaves({"params": network.params}).items()
    }
    safetensors.numpy.save_file(tensors, path, metadata=header)


def _open(path: Path, network: Network) -> Run:
    tensors = safetensors.numpy.load_file(path)
    structure = jax.tree.structure({"params": network.params})
    params = jax.tree.unflatten(
        structure, [tensors[name] for name in leaves({"params": network.params})]
    )["params"]

    def run(images: np.ndarray) -> np.ndarray:
        with jax.default_matmul_precision("highest"):
            return np.asarray(jax.jit(network.apply)(params, images))

    return run


FORMAT = Format(
    name="safetensors",
    filename="model.safetensors",
    layout="NHWC",
    write=write,
    packages=("safetensors",),
    runtimes=(Runtime("safetensors", _open),),
    tolerances={"float32": TOLERANCE},
    holds_graph=False,
)
