"""What a format is: how it is written, in which types, and which runtimes read it back."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from repvgg_jax.export.network import Network

Run = Callable[[np.ndarray], np.ndarray]
"""Runs an opened artefact: images (images, height, width, channels) to (images, outputs)."""


@dataclasses.dataclass(frozen=True)
class Runtime:
    """A program that runs artefacts of a format.

    Attributes:
      name: of the module that is imported.
      open: opens an artefact; raises ImportError where the runtime is not installed.
    """

    name: str
    open: Callable[[Path, Network], Run]


@dataclasses.dataclass(frozen=True)
class Format:
    """A row of the table of formats.

    Attributes:
      name: as in `--format`.
      filename: what an artefact in the default type is called unless somebody says otherwise.
      layout: axes of the normalised images that an artefact takes.
      write: writes an artefact of a network to a path, computing in a type; raises
        ImportError where a package for it is not installed.
      packages: modules that writing needs, for messages and recorded versions.
      runtimes: what reads it back; the first one is the one most people deploy to.
      tolerances: by type that it can compute in, the largest |Δ| of a proof relative to the
        largest output; the first type is the default.
      extra: of the package, which installs writer and runtimes; None where the core suffices.
      is_directory: whether an artefact is a directory instead of a file.
      holds_graph: whether it holds a computation, in which preprocessing could travel, or
        weights alone.
    """

    name: str
    filename: str
    layout: str
    write: Callable[[Network, Path, str], None]
    packages: tuple[str, ...]
    runtimes: tuple[Runtime, ...]
    tolerances: Mapping[str, float]
    extra: str | None = None
    is_directory: bool = False
    holds_graph: bool = True

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Types that it can compute in, the default first."""
        return tuple(self.tolerances)

    def dtype(self, name: str | None) -> str:
        """The type of that name, the default for None.

        Raises:
          ValueError: the format cannot compute in it.
        """
        if name is not None and name not in self.dtypes:
            raise ValueError(
                f"format {self.name} cannot compute in {name!r}; it has {', '.join(self.dtypes)}"
            )
        return self.dtypes[0] if name is None else name

    def filename_in(self, dtype: str) -> str:
        """What an artefact of a type is called: `model.onnx`, `model.float16.onnx`."""
        stem, dot, suffix = self.filename.partition(".")
        return self.filename if dtype == self.dtypes[0] else f"{stem}.{dtype}{dot}{suffix}"

    def input_layout(self, network: Network) -> str:
        """Axes of the images that an artefact takes; bytes come as decoders give them, NHWC."""
        return "NHWC" if network.with_preprocessing else self.layout

    @property
    def remedy(self) -> str:
        """The command that installs what it needs."""
        return f'pip install "repvgg-jax[{self.extra}]"' if self.extra else "pip install repvgg-jax"
