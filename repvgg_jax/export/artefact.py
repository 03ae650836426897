"""A written artefact: where it is, what proves it, and what it was made with."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repvgg_jax.proof import Proof


@dataclasses.dataclass(frozen=True)
class Artefact:
    """What `export` wrote.

    Attributes:
      format: its name.
      path: a file or, for some formats, a directory.
      dtype: what it computes in.
      description: what its users need to know: input, output, mean, std, labels, ….
      proofs: by runtime, how far its outputs are from the JAX model's on the same images
        (of probabilities, the logarithms are compared).
      unproven: by runtime that should have read it and could not, the reason.
      versions: of what wrote it and what read it back.
      sha256: of the file; of a directory, of the lines "sha256  path" of its files in order.
      size: in bytes.
      seconds: that writing and proving took.
    """

    format: str
    path: Path
    dtype: str
    description: Mapping[str, Any]
    proofs: Mapping[str, Proof]
    unproven: Mapping[str, str]
    versions: Mapping[str, str]
    sha256: str
    size: int
    seconds: float

    @property
    def proven(self) -> bool:
        """Whether a runtime has read it back and agreed; where one disagrees, `export` raises."""
        return bool(self.proofs)

    def __str__(self) -> str:
        head = f"{self.format}: {self.path.name} ({self.dtype}, {self.size / 1e6:.1f} MB)"
        lines = [
            f"proven with {runtime} {self.versions[runtime]}: {proof}"
            for runtime, proof in self.proofs.items()
        ]
        lines += [f"NOT PROVEN with {name}: {reason}" for name, reason in self.unproven.items()]
        return "\n  ".join([head if self.proven else f"{head} UNPROVEN", *lines])

    def as_dict(self) -> dict[str, Any]:
        """Everything, for `proof.json`."""
        return {
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
            "path": self.path.name,
            "status": "proven" if self.proven else "UNPROVEN",
            "description": dict(self.description),
            "proofs": {name: proof.as_dict() for name, proof in self.proofs.items()},
            "unproven": dict(self.unproven),
            "versions": dict(self.versions),
        }


def checksum(path: Path) -> str:
    """SHA-256 of a file or a directory, as `Artefact.sha256` says."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = [f"{checksum(file)}  {file.relative_to(path).as_posix()}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def size(path: Path) -> int:
    """Bytes of a file, or of all files of a directory."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
