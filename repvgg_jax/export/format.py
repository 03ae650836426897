"""What a format is, and what is known about a file once it is written in one."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from repvgg_jax import files
from repvgg_jax.export.network import Network
from repvgg_jax.proof import Proof
from repvgg_jax.text import how_to_install

Run = Callable[[np.ndarray], Any]
"""Runs an opened artifact: images (images, height, width, channels) to outputs as of
`Network.apply`.
"""


@dataclasses.dataclass(frozen=True)
class Runtime:
    """A program that runs artifacts of a format.

    Attributes:
      name: the module to import, e.g. `onnxruntime`.
      open: opens an artifact; raises ImportError if the runtime is not installed.
    """

    name: str
    open: Callable[[Path, Network], Run]


@dataclasses.dataclass(frozen=True)
class Format:
    """A row of `repvgg_jax.export.FORMATS`.

    A format either holds a graph, and is proven by running it in its `runtimes`, or holds
    weights alone, and is proven by reading them back with `read`, bitwise identical.

    Attributes:
      name: as in `--format`.
      filename: default name of an artifact in the default dtype.
      write: writes a network to a path, computing in a dtype; raises ImportError if a package
        is not installed.
      packages: distributions that write it, for messages and recorded versions.
      tolerances: for every dtype it can compute in, the largest |Δ| of a proof relative to the
        largest output; the first dtype is the default.
      runtimes: what runs it; the first one is what most people deploy to.
      read: reads the parameters back, for weights alone.
      layout: axes of the normalized images that an artifact takes.
      marker: a file that every artifact contains, if artifacts are directories.
      also: further default filenames, each with the module that it needs to be written.
      own_modules: whether it takes any Linen module, and not only a RepVGG.
      segmenters: whether it takes a segmenter, if it does not take any module.
      maps_and_sizes: whether a graph can return feature maps and take images of any size.
      extra: the extra of this package that installs writer and runtimes; None if convert.py
        itself needs them.
    """

    name: str
    filename: str
    write: Callable[[Network, Path, str], None]
    packages: tuple[str, ...]
    tolerances: Mapping[str, float]
    runtimes: tuple[Runtime, ...] = ()
    read: Callable[[Path, Network], Any] | None = None
    layout: str = "NHWC"
    marker: str | None = None
    also: Mapping[str, str] = dataclasses.field(default_factory=dict)
    own_modules: bool = False
    segmenters: bool = False
    maps_and_sizes: bool = False
    extra: str | None = None

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes it can compute in, the default first."""
        return tuple(self.tolerances)

    @property
    def holds_graph(self) -> bool:
        """Whether it holds a computation, which preprocessing can be part of."""
        return self.read is None

    @property
    def remedy(self) -> str:
        """The command that installs what it needs."""
        return how_to_install(extra=self.extra or "export")

    def input_layout(self, network: Network) -> str:
        """Axes of an artifact's input; uint8 images are NHWC, as decoders return them."""
        return "NHWC" if network.with_preprocessing else self.layout


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A written and verified file or directory.

    Attributes:
      format: name of its format.
      path: a file or, for some formats, a directory.
      dtype: what it computes in.
      description: what its users need to know: input, output, mean, std, labels, ….
      proofs: by runtime, how far its outputs are from the JAX model's on the same images
        (the logarithms of probabilities are compared).
      unproven: by runtime that could not run it, the reason.
      identical: whether the weights were read back and are bitwise identical (formats that hold
        weights alone).
      versions: of the packages that wrote it and read it back.
      checksums: SHA-256 of its files, by path relative to its parent directory.
      size: in bytes.
      seconds: taken by writing and verifying.
    """

    format: str
    path: Path
    dtype: str
    description: Mapping[str, Any]
    proofs: Mapping[str, Proof]
    unproven: Mapping[str, str]
    identical: bool
    versions: Mapping[str, str]
    checksums: Mapping[str, str]
    size: int
    seconds: float

    @property
    def proven(self) -> bool:
        """Whether it was read back and agreed; a disagreement raises and nothing is written."""
        return self.identical or bool(self.proofs)

    @property
    def sha256(self) -> str:
        """Digest of the file; of a directory, that of the lines "sha256  path" of its files."""
        if self.checksums.keys() == {self.path.name}:
            return self.checksums[self.path.name]
        prefix = f"{self.path.name}/"
        lines = [f"{sha}  {name.removeprefix(prefix)}\n" for name, sha in self.checksums.items()]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def __str__(self) -> str:
        small = self.size < 100_000
        size = f"{self.size / 1e3:.1f} kB" if small else f"{self.size / 1e6:.1f} MB"
        head = f"{self.format}: {self.path.name} ({self.dtype}, {size})"
        if self.identical:
            return f"{head}, read back bitwise identical"
        lines = [
            f"proven with {runtime} {self.versions[runtime]}: {proof}"
            for runtime, proof in self.proofs.items()
        ]
        lines += [f"NOT PROVEN with {name}: {reason}" for name, reason in self.unproven.items()]
        return "\n  ".join([head if self.proven else f"{head} UNPROVEN", *lines])

    def as_dict(self) -> dict[str, Any]:
        """Everything, for `proof.json`."""
        return {
            "format": self.format,
            "path": self.path.name,
            "files": [self.path.name],
            "dtype": self.dtype,
            "status": "proven" if self.proven else "UNPROVEN",
            "same_bits": self.identical,
            "proofs": {name: proof.as_dict() for name, proof in self.proofs.items()},
            "unproven": dict(self.unproven),
            "description": dict(self.description),
            "versions": dict(self.versions),
            "sha256": self.sha256,
            "size": self.size,
            "seconds": self.seconds,
        }


def checksums(path: Path) -> dict[str, str]:
    """SHA-256 of a file, or of all files in a directory, by path relative to its parent."""
    found = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {file.relative_to(path.parent).as_posix(): files.sha256(file) for file in found}


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a directory."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
