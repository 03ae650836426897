"""Deployed networks as programs that contain their weights.

XLA transforms kernels that are constants once, when it compiles, and kernels that are arguments in
every call. On CPUs that makes the difference between 1 and 2 for small batches (docs/results.md).
Compiling takes longer for it, so the program can be kept on disk, in JAX's compilation cache.
"""

import dataclasses
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class CompiledNetwork:
    """A network with its weights inside; call it with images.

    Attributes:
      image_shape: (height, width, channels) that it was compiled for.
      batch_size: number of images that it was compiled for.
      seconds: that compiling took, or reading the program from the cache.
    """

    image_shape: tuple[int, int, int]
    batch_size: int
    seconds: float
    _function: Any
    _program: Any

    def __call__(self, images: Any) -> jax.Array:
        """Outputs of the model.

        Args:
          images: float32 (images, height, width, channels), normalized. Other numbers or sizes of
            images compile anew.
        """
        images = jnp.asarray(images, jnp.float32)
        known = images.shape == (self.batch_size, *self.image_shape)
        return self._program(images) if known else self._function(images)


def compile_deployed(
    model: Any,
    variables: Any = None,
    *,
    image_shape: Sequence[int] | None = None,
    batch_size: int = 1,
    cache: str | os.PathLike | None = None,
) -> CompiledNetwork:
    """Compiles a network in deploy form with its weights as constants: the fastest form on CPUs.

    Compiling then takes longer, see docs/deploy.md; with `cache` it happens once per machine.

    Args:
      model: in deploy form; or what `load_deployed` returned, then without `variables`.
      variables: of the model.
      image_shape: (height, width, channels); default: that of the deployment.
      batch_size: number of images per call.
      cache: a directory for the program, from which the next process reads it: JAX's compilation
        cache, unless this process has one already. None leaves JAX's settings alone.

    Returns:
      A function of normalized images, float32 (images, height, width, channels). Its outputs equal
      the model's up to rounding.

    Raises:
      ValueError: the model is in training form, or the size of images is unknown.
    """
    if variables is None:
        if not hasattr(model, "metadata"):
            raise ValueError("give the model's variables, or what load_deployed returned")
        image_shape = image_shape or model.metadata["image_shape"]
        model, variables = model.model, model.variables
    if not getattr(model, "deploy", True):
        raise ValueError(
            "the model is in training form: fuse_params, and create_model(…, deploy=True)"
        )
    if image_shape is None or len(image_shape) != 3:
        raise ValueError(
            f"image_shape={image_shape} must be (height, width, channels), e.g. (224, 224, 3)"
        )
    if cache is not None:
        keep_programs(cache, least_seconds=0.0)
    height, width, channels = image_shape
    shape = jax.ShapeDtypeStruct((batch_size, height, width, channels), jnp.float32)
    function = jax.jit(lambda images: model.apply(variables, images))
    began = time.perf_counter()
    program = function.lower(shape).compile()
    seconds = time.perf_counter() - began
    return CompiledNetwork((height, width, channels), batch_size, seconds, function, program)


def keep_programs(directory: str | os.PathLike, *, least_seconds: float | None = None) -> bool:
    """Sets up JAX's compilation cache on disk, if this process has none.

    Args:
      directory: created if it is missing.
      least_seconds: programs that compile faster are not kept; None leaves JAX's own limit, 1 s.

    Returns:
      False if there is one already, or if the directory cannot be created.
    """
    from jax.experimental.compilation_cache import compilation_cache

    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return False
    try:
        pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
    except OSError:
        return False  # only compile time is lost
    jax.config.update("jax_compilation_cache_dir", os.fspath(directory))
    if least_seconds is not None:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least_seconds)
    # JAX decides at the first program whether there is a cache.
    compilation_cache.reset_cache()
    return True
