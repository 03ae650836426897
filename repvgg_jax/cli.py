"""What the command lines share: a user's mistake is one line and a non-zero exit status."""

import os
import pathlib
import sys
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from absl import app, flags, logging

flags.DEFINE_bool("traceback", False, "Show where in the code an error arose.")

# What the package raises for what a user can mend; anything else is our own bug and shows
# its traceback.
_USER_ERRORS = (ValueError, OSError, FloatingPointError)

# What absl and ml_collections raise for flags and for overrides of a configuration.
_FLAG_ERRORS = (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError)


def _keep_compiled_programs() -> None:
    """Lets jax keep compiled programs on disk: a second start of the same run skips compiling.

    `JAX_COMPILATION_CACHE_DIR`, which jax reads by itself, names another place.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    base = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    place = base / "repvgg_jax" / "xla"
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # a home that cannot be written costs compile time, nothing else
    jax.config.update("jax_compilation_cache_dir", str(place))


def run(
    main: Callable[[Sequence[str]], int],
    defaults: Mapping[str, str] = types.MappingProxyType({}),
) -> None:
    """Parses the flags, runs `main` and exits with its status, 1 for an error, 2 for a flag.

    Args:
      main: takes what is no flag, returns the exit status.
      defaults: flags to add where they are not given. The recipe is one: as its flag's own
        default it would be read, and fail, before anyone is there to say so in one line.
    """
    logging.set_verbosity(logging.WARNING)  # jax tells of every backend it does not find
    app.run(lambda argv: _guarded(main, argv), flags_parser=lambda argv: _parse(argv, defaults))


def _parse(arguments: Sequence[str], defaults: Mapping[str, str]) -> Sequence[str]:
    given = {argument.lstrip("-").partition("=")[0] for argument in arguments[1:]}
    added = [f"--{name}={value}" for name, value in defaults.items() if name not in given]
    arguments = [*arguments[:1], *added, *arguments[1:]]
    try:
        rest = flags.FLAGS(arguments)
    except _FLAG_ERRORS as error:
        _fail(error, status=2)
    if len(rest) > 1:
        _fail(ValueError(f"unexpected argument {rest[1]!r}; see --help"), status=2)
    return rest


def _guarded(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    _keep_compiled_programs()
    try:
        return main(argv)
    except (KeyboardInterrupt, *_USER_ERRORS) as error:
        if flags.FLAGS.traceback:
            raise
        status = explain(error)
        # Everything of ours is closed; a library's thread that waits for what failed, as Orbax's
        # do for minutes where a disk is full, shall not keep the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def explain(error: BaseException) -> int:
    """Prints an error, in a line if a user can mend it; returns the exit status."""
    if isinstance(error, KeyboardInterrupt):
        sys.stderr.write("error: interrupted\n")
        return 130
    if flags.FLAGS.traceback or not isinstance(error, _USER_ERRORS):
        traceback.print_exception(error)
        return 1
    sys.stderr.write(_line(error))
    return 1


def _fail(error: BaseException, status: int) -> NoReturn:
    sys.stderr.write(_line(error))
    sys.exit(status)


def _line(error: BaseException) -> str:
    return f"error: {' '.join(_text(error).split()) or type(error).__name__}\n"


def _text(error: object) -> str:
    # ml_collections raises an AttributeError with a KeyError in it, whose text is a repr.
    if isinstance(error, (AttributeError, KeyError)) and error.args:
        return f"unknown setting {_text(error.args[0]).removeprefix('unknown setting ')}"
    return str(error)
