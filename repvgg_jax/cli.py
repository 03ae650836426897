"""What the command lines share: a user's mistake is one line and a non-zero exit status."""

import os
import pathlib
import sys
from collections.abc import Callable, Sequence

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


def run(main: Callable[[Sequence[str]], int]) -> None:
    """Parses the flags, runs `main` and exits with its status, 1 for an error, 2 for a flag."""
    logging.set_verbosity(logging.WARNING)  # jax tells of every backend it does not find
    app.run(lambda argv: _guarded(main, argv), flags_parser=_parse)


def _parse(arguments: Sequence[str]) -> Sequence[str]:
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
    except KeyboardInterrupt:
        if flags.FLAGS.traceback:
            raise
        sys.stderr.write("error: interrupted\n")
        sys.exit(130)
    except _USER_ERRORS as error:
        if flags.FLAGS.traceback:
            raise
        _fail(error, status=1)
        raise AssertionError("unreachable") from error


def _fail(error: BaseException, status: int) -> None:
    # KeyError and its like print the repr of their message; what they were given reads better.
    text = str(error.args[0]) if isinstance(error, (KeyError, AttributeError)) else str(error)
    line = " ".join(text.split()).replace("\\'", "'")
    sys.stderr.write(f"error: {line or type(error).__name__}\n")
    sys.exit(status)
