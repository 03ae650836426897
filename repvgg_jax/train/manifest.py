"""What a checkpoint says of itself, beside its arrays; believed only where it is whole."""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any, Self

import jax
import numpy as np

from repvgg_jax.train.checksum import checksums

_CLASSES = "the number of classes, which is that of the data (config.data.source)"

# What the shape of an array depends on, by the beginning of its name; the first that fits.
_SETTINGS = (
    ("params/head", _CLASSES),
    ("params/aux_", _CLASSES),
    ("opt_state", "config.optimizer.name and config.optimizer.clip_norm"),
    ("ema", "config.ema.decay"),
    ("", "config.model.variant and the data's image channels"),
)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The description of a saved state.

    Attributes:
      checksums: of every array, by its path in the tree.
      arrays: dtype and shape of every array, as `float32[3, 3, 8, 16]`; empty in checkpoints
        that were saved before these were written down.
      saved_on: devices and processes, in words.
      accuracy: of the state's evaluation, a fraction; None where it was not evaluated.
    """

    checksums: dict[str, str]
    arrays: dict[str, str]
    saved_on: str
    accuracy: float | None

    @classmethod
    def of(cls, state: Any, accuracy: float | None) -> Self:
        """Describes a state that is about to be saved."""
        return cls(checksums(state), _arrays(state), machine(), accuracy)

    @classmethod
    def read(cls, step: pathlib.Path) -> Self:
        """The manifest in a checkpoint's directory.

        Raises:
          ValueError: it is damaged.
          OSError: there is none, or it cannot be read.
        """
        content = json.loads((step / "manifest" / "metadata").read_text())
        if not isinstance(content, dict):
            raise ValueError("it is no table")
        digest = content.pop("digest", None)
        if digest is None and content.keys() == {"checksums", "saved_on"}:
            # As it was before it had a digest. Without arrays, nothing is concluded from it but
            # that some of them are damaged.
            return cls(dict(content["checksums"]), {}, content["saved_on"], _old_accuracy(step))
        if digest != _digest(content):
            raise ValueError("it does not have the digest that it states")
        fields = {field.name for field in dataclasses.fields(cls)}
        if content.keys() != fields:
            raise ValueError(f"it is of another version: it has {', '.join(content)}")
        return cls(**content)

    def content(self) -> dict[str, Any]:
        """As `read` takes it back."""
        plain = dataclasses.asdict(self)
        return {**plain, "digest": _digest(plain)}

    def difference(self, like: Any) -> str | None:
        """How the saved arrays differ from those of `like`, and what decides it; None if not."""
        found = _arrays(like)
        names = [*found, *(name for name in self.arrays if name not in found)]
        differ = [name for name in names if self.arrays.get(name) != found.get(name)]
        if not self.arrays or not differ:
            return None
        first = differ[0]
        settings = next(text for start, text in _SETTINGS if first.startswith(start))
        return (
            f"{first} is {self.arrays.get(first, 'missing')} there and "
            f"{found.get(first, 'missing')} here ({len(differ)} of {len(names)} arrays differ); "
            f"make {settings} what the checkpoint was trained with"
        )


def machine() -> str:
    """Devices and processes of this run, in words."""
    devices, processes = jax.device_count(), jax.process_count()
    kind = f"{devices} {jax.devices()[0].platform} device{'s' if devices > 1 else ''}"
    return f"{kind} in {processes} process{'es' if processes > 1 else ''}"


def _arrays(tree: Any) -> dict[str, str]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
        )
        for path, leaf in leaves
    }


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _old_accuracy(step: pathlib.Path) -> float | None:
    """Where it was before manifests had it; a damaged one costs a place among the best."""
    try:
        return float(json.loads((step / "metrics" / "metrics").read_text())["accuracy"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
