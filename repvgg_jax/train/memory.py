"""Running out of memory, in one line: what did not fit, how much it needs, what to change."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import jax

from repvgg_jax.text import one_line, plural
from repvgg_jax.train.settings import Settings


@contextlib.contextmanager
def explained(what: Callable[[], str], advice: Callable[[], str]) -> Iterator[None]:
    """A context that turns running out of memory into one line.

    Args:
      what: says what needs the memory.
      advice: says what would need less.

    Raises:
      ValueError: in place of the error of JAX, or of Python.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = one_line((str(error).splitlines() or [type(error).__name__])[0], 200)
        raise ValueError(f"out of memory: {what()}; {advice()} ({reason})") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the host or of a device."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "resource_exhausted" in text or "out of memory" in text


def of_step(settings: Settings, programs: Sequence[jax.stages.Compiled], devices: int) -> str:
    """What a training step needs.

    Args:
      settings: of the run.
      programs: the step as it was compiled so far, for each size of images.
      devices: number of devices.
    """
    batch, microbatches = settings.train.batch_size, settings.train.accumulate
    text = (
        f"a step of config.train.batch_size={batch} on {plural(devices, 'device')} with "
        f"config.train.accumulate={microbatches} and config.model.remat={settings.model.remat}, "
        f"{batch // devices // microbatches} images at once per device, "
    )
    needs = [bytes_of(program) for program in programs]
    if not needs:
        return f"{text}could not be compiled"
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    there = f" of {limit / 2**20:,.0f}" if limit else ""
    return f"{text}needs {max(needs) / 2**20:,.1f} MiB{there} per device"


def bytes_of(program: jax.stages.Compiled) -> int:
    """Bytes per device of arguments, results and temporaries of a program."""
    found = program.memory_analysis()
    if found is None:  # a backend that does not tell
        return 0
    new = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + new + found.temp_size_in_bytes


def advice_for_step(settings: Settings) -> str:
    """What would need less memory."""
    less = ["a smaller batch"]
    if settings.bn.group_size is not None:  # microbatches exclude statistics of the whole batch
        less.insert(0, f"config.train.accumulate={2 * settings.train.accumulate}")
    if not settings.model.remat:
        less.insert(0, "config.model.remat=True")
    elif settings.model.remat_policy != "nothing":
        less.insert(0, "config.model.remat_policy=nothing")
    return f"less: {' or '.join(less)}; when resuming, with --extend"
