"""The table of formats, in the order in which messages list them."""

import difflib
import types
from collections.abc import Mapping

from repvgg_jax.export import onnx, safetensors, savedmodel, stablehlo, tflite
from repvgg_jax.export.format import Format

FORMATS: Mapping[str, Format] = types.MappingProxyType(
    {
        module.FORMAT.name: module.FORMAT
        for module in (safetensors, stablehlo, onnx, tflite, savedmodel)
    }
)
"""Every format by name. None of them imports its packages before it is used."""


def get_format(name: str) -> Format:
    """The format of that name.

    Raises:
      ValueError: there is none, with the nearest one.
    """
    if name in FORMATS:
        return FORMATS[name]
    near = difflib.get_close_matches(name.lower(), FORMATS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"unknown format {name!r}; {hint}There are {', '.join(FORMATS)}")


def parse_format(text: str) -> tuple[Format, str]:
    """A format and what it computes in, as `--format` takes them: `onnx` or `onnx:float16`.

    Raises:
      ValueError: an unknown format, or a type that it does not have.
    """
    name, _, dtype = text.partition(":")
    form = get_format(name)
    return form, form.dtype(dtype or None)
