"""`load_pretrained`: timm's RepVGGs by their hub names."""

import contextlib
import difflib
import os
import pathlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from repvgg_jax.variants import Variant
from repvgg_jax.weights.loading import Weights, load_weights

_VARIANTS = ("A0", "A1", "A2", "B0", "B1", "B1g4", "B2", "B2g4", "B3", "B3g4", "D2se")

PRETRAINED: Mapping[str, str] = MappingProxyType(
    {f"repvgg_{variant.lower()}.rvgg_in1k": variant for variant in _VARIANTS}
)
"""timm's hub names, and the variant that each is. Trained on ImageNet-1k by the authors."""

_FILE = "model.safetensors"


def load_pretrained(
    name: str,
    *,
    num_classes: int | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Weights:
    """Loads one of `PRETRAINED` from the Hugging Face hub or from its local cache.

    Args:
      name: `repvgg_b1g4.rvgg_in1k`; `repvgg_b1g4` and `timm/repvgg_b1g4.rvgg_in1k` mean the
        same.
      num_classes: as in `load_weights`; 0 loads the backbone only.
      revision: branch, tag or commit; None is the newest.
      cache_dir: of downloads; None is the hub's own, `HF_HOME` says where.

    Raises:
      ValueError: unknown name, `huggingface_hub` missing, not in the cache and the hub out of
        reach, or as `load_weights`.
    """
    hub_name = _hub_name(name)
    path = _fetch(f"timm/{hub_name}", revision, cache_dir)
    return load_weights(path, num_classes=num_classes, variant=PRETRAINED[hub_name])


def load_file_or_pretrained(source: str, *, variant: str | Variant | None = None) -> Weights:
    """`load_pretrained` for one of its names, `load_weights` for a file; a file comes first.

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
    near = difflib.get_close_matches(short, PRETRAINED, n=2, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(
        f"no pretrained weights named {name!r}; {hint}There are {', '.join(PRETRAINED)}"
    )


def _fetch(repository: str, revision: str | None, cache_dir: str | os.PathLike | None) -> str:
    """The local path of a repository's weights, downloaded where they are not yet."""
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.utils.logging
    except ImportError as error:
        raise ValueError(
            f"{repository} comes through huggingface_hub, which is not installed: "
            "pip install 'repvgg-jax[hub]', or give load_weights the file itself"
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
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise ValueError(
            f"{repository}/{_FILE} is neither in the local cache nor to be had from the hub "
            f"({type(error).__name__}: {reason}); connect once, or give load_weights the file"
        ) from error


@contextlib.contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Without the warnings of every attempt: the error that comes in the end says it all."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
