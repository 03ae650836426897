"""A Linen module as artifacts need it: every block in deploy form, computing in float32."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

SETTINGS: Mapping[str, Any] = {
    "deploy": True,
    "lowering": "plain",  # artifacts run on other machines than this one
    "remat": False,
    "dtype": jnp.float32,
    "param_dtype": jnp.float32,
}
"""Fields of a module, and of modules in its fields, that are set where they exist."""


def with_settings(module: Any, settings: Mapping[str, Any] = SETTINGS) -> Any:
    """A module with other settings, in its own fields and in those of modules in them.

    Args:
      module: a module, or a list, tuple or mapping of modules; anything else comes back as it is.
      settings: values by names of fields; a module without such a field keeps its own.
    """
    if isinstance(module, (list, tuple)) and not hasattr(module, "_fields"):
        return type(module)(with_settings(child, settings) for child in module)
    if isinstance(module, Mapping):
        changed = {key: with_settings(child, settings) for key, child in module.items()}
        return changed if any(changed[key] is not module[key] for key in changed) else module
    if not isinstance(module, nn.Module):
        return module
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(module):
        if field.name in ("parent", "name"):
            continue
        value = getattr(module, field.name)
        changes[field.name] = settings.get(field.name, with_settings(value, settings))
    return module.clone(**changes)


def output_names(outputs: Any) -> dict[str, Any]:
    """The arrays of a module's output by name: keys, or indices, joined by underscores."""
    if not isinstance(outputs, (Mapping, list, tuple)):
        return {"output": outputs}
    leaves, _ = jax.tree_util.tree_flatten_with_path(outputs)
    return {jax.tree_util.keystr(path, simple=True, separator="_"): leaf for path, leaf in leaves}
