"""Which files of an earlier conversion are kept when it is replaced.

Files that `convert.py` did not write stay in any case. Earlier formats stay if they are of the same
network, to the bit; those of another network would be taken for this one's, and go.
"""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from repvgg_jax import files
from repvgg_jax.export import FORMATS, Artifact
from repvgg_jax.text import first_few, named_leaves, one_line
from repvgg_jax.typed import typed
from repvgg_jax.variants import Variant

WEIGHTS = "weights_sha256"
"""Key of `weights_digest` in `metadata.json`."""

ARTIFACTS = "artefacts"
"""Key of `proof.json`; files on disk have it, so its spelling stays."""

_DESCRIPTIONS = ("metadata.json", "proof.json")
_OF_THE_NETWORK = ("num_classes", "classes", "image_shape", "mean", "std")


@dataclasses.dataclass(frozen=True)
class Kept:
    """What was taken over from an earlier conversion.

    Attributes:
      artifacts: their entries in `proof.json`.
      checksums: SHA-256 of their files, by path.
      lines: what stayed and what went, in words.
      int8: what was measured of quantized artifacts, if some stayed.
    """

    artifacts: tuple[Mapping[str, Any], ...] = ()
    checksums: Mapping[str, str] = dataclasses.field(default_factory=dict)
    lines: tuple[str, ...] = ()
    int8: Mapping[str, Any] | None = None


def weights_digest(params: Any) -> str:
    """The SHA-256 of the names, shapes and float32 values of deploy parameters."""
    digest = hashlib.sha256()
    for name, leaf in sorted(named_leaves(params).items()):
        array = np.ascontiguousarray(leaf, np.float32)
        digest.update(f"{name}{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def take_over(
    old: pathlib.Path,
    new: pathlib.Path,
    metadata: Mapping[str, Any],
    artifacts: Sequence[Artifact],
) -> Kept:
    """Puts what stays of `old` into `new`, which is about to take its place.

    Args:
      old: a directory that `convert.py` wrote, or nothing.
      new: the directory that is being written.
      metadata: that of `new`.
      artifacts: written to `new`.

    Raises:
      ValueError: a file that `convert.py` did not write is in the place of one of `new`.
      OSError: a file cannot be taken over.
    """
    if not old.is_dir():
        return Kept()
    proof, before = (_read(old / name) for name in reversed(_DESCRIPTIONS))
    listed = proof.get("sha256")
    listed = dict(listed) if isinstance(listed, Mapping) else {}
    listed = {name: sha for name, sha in listed.items() if files.is_below(name)}
    _keep_foreign(old, new, listed)
    written = {artifact.path.name for artifact in artifacts}
    found, lines = [], []
    checksums: dict[str, str] = {}
    for entry in proof.get(ARTIFACTS) or ():
        name = _name_of(entry)
        if name is None or name in written or name not in _top_level(listed):
            continue
        reason = _why_not(old, name, entry, listed, before, metadata)
        if reason:
            lines.append(f"removed: {name}, {reason}")
            continue
        parts = _files_of(name, listed)
        for part in parts:
            _link(old / part, new / part)
        found.append(entry)
        checksums |= parts
        lines.append(f"kept: {name}, of the same weights")
    measured = proof.get("int8")
    rounded = isinstance(measured, Mapping) and any(e.get("dtype") == "int8" for e in found)
    return Kept(tuple(found), checksums, tuple(lines), measured if rounded else None)


def _keep_foreign(old: pathlib.Path, new: pathlib.Path, listed: Mapping[str, str]) -> None:
    # Without a readable proof.json nothing but the names tells what is ours.
    ours = _top_level(listed) if listed else {known.filename for known in FORMATS.values()}
    for folder, _, names in os.walk(old):
        for name in names:
            path = pathlib.Path(folder, name)
            part = path.relative_to(old)
            is_ours = part.as_posix() in (*listed, *_DESCRIPTIONS) or (
                not listed and part.parts[0] in ours
            )
            if is_ours:
                continue
            if (new / part).exists() or (new / part.parts[0]).is_file():
                raise ValueError(
                    f"{path} was not written by convert.py and would be replaced; move it away, or "
                    "choose another --output"
                )
            _link(path, new / part)


def _why_not(
    old: pathlib.Path,
    name: str,
    entry: Mapping[str, Any],
    listed: Mapping[str, str],
    before: Mapping[str, Any],
    now: Mapping[str, Any],
) -> str:
    """Why an earlier artifact cannot stay; empty if it can."""
    if (
        _architecture(before) != _architecture(now)
        or any(before.get(key) != now.get(key) for key in _OF_THE_NETWORK)
        or _digest_of(old, before) != now[WEIGHTS]
    ):
        return "of another network"
    known = FORMATS.get(str(entry.get("format")))
    if known is None:
        return f"of an unknown format, {one_line(entry.get('format'), 40)}"
    same_input = before.get("with_preprocessing", False) == now["with_preprocessing"]
    if known.holds_graph and not same_input:
        return "with another preprocessing"
    damaged = [
        part
        for part, expected in _files_of(name, listed).items()
        if not (old / part).is_file() or files.sha256(old / part) != expected
    ]
    return f"damaged: {first_few(damaged)}" if damaged else ""


def _architecture(metadata: Mapping[str, Any]) -> Any:
    """Variant and activation; what an older version did not write has its default."""
    variant = metadata.get("variant")
    with contextlib.suppress(ValueError):  # of a version that is not known
        variant = typed(Variant | None, variant, "variant")
    return variant, metadata.get("activation", "relu"), metadata.get("segmentation")


def _digest_of(old: pathlib.Path, metadata: Mapping[str, Any]) -> str | None:
    """The digest of an earlier conversion's weights; None if it cannot be known."""
    if WEIGHTS in metadata:
        return metadata[WEIGHTS]
    try:  # an older version wrote it
        tensors = safetensors.numpy.load_file(old / FORMATS["safetensors"].filename)
    except (OSError, safetensors.SafetensorError):
        return None
    return weights_digest({name.removeprefix("params/"): leaf for name, leaf in tensors.items()})


def _name_of(entry: Any) -> str | None:
    """The file or directory of an entry of `proof.json`."""
    if not isinstance(entry, Mapping):
        return None
    names = entry.get("files")  # of version 0.1, for directories
    name = names[0] if isinstance(names, list) and len(names) == 1 else entry.get("path")
    return name if isinstance(name, str) else None


def _files_of(name: str, listed: Mapping[str, str]) -> dict[str, str]:
    return {p: sha for p, sha in listed.items() if p == name or p.startswith(f"{name}/")}


def _top_level(listed: Mapping[str, str]) -> set[str]:
    return {part.partition("/")[0] for part in listed}


def _link(source: pathlib.Path, target: pathlib.Path) -> None:
    """The same file at another place; a copy if the file system has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink():
        target.symlink_to(os.readlink(source))
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = files.read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
