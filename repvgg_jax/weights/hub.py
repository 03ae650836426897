"""`load_pretrained`: timm's RepVGGs by their names on the Hugging Face hub."""

import contextlib
import os
import pathlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from repvgg_jax.text import did_you_mean, one_line
from repvgg_jax.variants import Variant
from repvgg_jax.weights.load import Weights, load_weights

_VARIANTS = ("A0", "A1", "A2", "B0", "B1", "B1g4", "B2", "B2g4", "B3", "B3g4", "D2se")

PRETRAINED: Mapping[str, str] = MappingProxyType(
    {f"repvgg_{variant.lower()}.rvgg_in1k": variant for variant in _VARIANTS}
)
"""timm's names on the hub and their variants. Trained on ImageNet-1k by the authors."""

_FILE = "model.safetensors"


def load_pretrained(
    name: str,
    *,
    num_classes: int | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Weights:
    """Loads one of `PRETRAINED` from the Hugging Face hub or its local cache.

    Args:
      name: `repvgg_b1g4.rvgg_in1k`; `repvgg_b1g4` and `timm/repvgg_b1g4.rvgg_in1k` mean the
        same.
      num_classes: as in `load_weights`; 0 loads the backbone only.
      revision: branch, tag or commit; None is the newest.
      cache_dir: directory of downloads; None is the hub's default (`HF_HOME`).

    Raises:
      ValueError: unknown name, `huggingface_hub` is not installed, neither cached nor
        downloadable, or as `load_weights`.
    """
    hub_name = _hub_name(name)
    path = _fetch(f"timm/{hub_name}", revision, cache_dir)
    return load_weights(path, num_classes=num_classes, variant=PRETRAINED[hub_name])


def load_file_or_pretrained(source: str, *, variant: str | Variant | None = None) -> Weights:
    """`load_weights` for a file, `load_pretrained` for a name without a file of that name.

    Raises:
      ValueError: as they do.
    """
    if source in PRETRAINED and not os.path.exists(source):
        return load_pretrained(source)
    return load_weights(source, variant=variant)


def _hub_name(name: str) -> str:
    short = name.removeprefix("hf-hub:").removeprefix("timm/")
    for candidate in (short, f"{short}.rvgg_in1k"):
        if candidate in PRETRAINED:
            return candidate
    raise ValueError(
        f"unknown pretrained weights {name!r}; {did_you_mean(short, PRETRAINED, cutoff=0.6)}"
        f"choose from {', '.join(PRETRAINED)}"
    )


def _fetch(repository: str, revision: str | None, cache_dir: str | os.PathLike | None) -> str:
    """The local path of a repository's weights, downloaded if they are not in the cache."""
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.utils.logging
    except ImportError as error:
        raise ValueError(
            f"downloading {repository} needs huggingface_hub, which is not installed: "
            "pip install 'repvgg-jax[hub]', or download the file and pass it to load_weights"
        ) from error
    try:
        with _quiet(huggingface_hub.utils.logging):
            return huggingface_hub.hf_hub_download(
                repository,
                _FILE,
                revision=revision,
                cache_dir=None if cache_dir is None else pathlib.Path(cache_dir),
            )
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = one_line(next(iter(str(error).strip().splitlines()), ""))
        raise ValueError(
            f"{repository}/{_FILE} is not in the local cache and could not be downloaded "
            f"({type(error).__name__}: {reason}); connect once, or pass the file to load_weights"
        ) from error


@contextlib.contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Suppresses the warnings of each attempt: the final error contains the reason."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
