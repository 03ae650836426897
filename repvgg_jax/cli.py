"""What the command lines share: errors in one line, exit statuses and the log's handler.

A command is a module with its flags, `main(arguments) -> int` and `run()`, which calls `run` of
this module; `repvgg_jax.train.command` is one. `train.py` calls the command's `run`; the console
scripts of an installed package are `train`, `convert`, `prepare`, `predict` and `visualize` of this
module.
"""

import gc
import importlib
import io
import itertools
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NoReturn

from absl import app, flags
from absl import logging as absl_logging

from repvgg_jax import command_help, files
from repvgg_jax.text import how_to_install

flags.DEFINE_bool("quiet", False, "Print results, warnings and errors only.")
flags.DEFINE_bool("traceback", False, "Show where in the code an error arose.")

# What the package raises for a user's mistake; anything else is a bug and shows its traceback.
_USER_ERRORS = (ValueError, OSError, FloatingPointError)

# What absl and ml_collections raise for flags and for overrides of a configuration.
_FLAG_ERRORS = (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError)


# What Python says if a flag's value is not a number, and what is meant.
_NUMBERS = (
    (r"invalid literal for int\(\) with base \d+: .*", "it takes an integer"),
    (r"could not convert string to float: .*", "it takes a number"),
)


class LogHandler(logging.Handler):
    """Writes messages as they are: INFO to standard output, unless `aside`, warnings to stderr.

    With several processes, process 0 writes INFO, and warnings start with the index of the
    process that writes them. INFO with `extra={"all_processes": True}` is treated like warnings.
    """

    def __init__(self, *, aside: bool = False):
        """See the class; `aside` leaves standard output to results."""
        super().__init__()
        self._aside = aside

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a message; the streams are looked up anew, as a live line replaces them."""
        import jax

        # Asking jax for the process index starts its backends, which is too early before this.
        several = jax.distributed.is_initialized() and jax.process_count() > 1
        info = record.levelno < logging.WARNING
        by_all = not info or getattr(record, "all_processes", False)
        if several and not by_all and jax.process_index() > 0:
            return
        prefix = f"process {jax.process_index()}: " if several and by_all else ""
        try:
            text = prefix + self.format(record)
            to_output = info and not self._aside
            print(text, file=sys.stdout if to_output else sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def _configure_logging(*, aside: bool) -> None:
    absl_logging.set_verbosity(absl_logging.WARNING)  # jax logs every backend it does not find
    logger = logging.getLogger("repvgg_jax")
    logger.setLevel(logging.INFO)
    logger.addHandler(LogHandler(aside=aside))
    logger.propagate = False  # absl's handler on the root logger would write all of it again


def _print_any_name() -> None:
    """Lets standard output escape what its encoding lacks, as standard error does."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _keep_compiled_programs() -> None:
    """Sets up jax's compilation cache on disk: a second start of the same run skips compiling.

    `JAX_COMPILATION_CACHE_DIR`, which jax reads itself, names another directory.
    """
    from repvgg_jax.compiled import keep_programs

    if (directory := files.cache_directory()) is not None:
        keep_programs(directory / "xla")


def run(
    main: Callable[[Sequence[str]], int],
    defaults: Callable[[Sequence[str]], Mapping[str, str]] = lambda _: {},
    *,
    positional: bool = False,
    logs_aside: bool = False,
) -> NoReturn:
    """Parses the flags, runs `main` and exits with its status, 1 for an error, 2 for a flag.

    Args:
      main: takes the arguments that are not flags, returns the exit status.
      defaults: takes the command line, returns flags to add if they are not given. The recipe is
        one: it depends on other flags, and a flag's own default would be read before errors can
        be caught.
      positional: whether it takes arguments that are not flags.
      logs_aside: whether progress goes to standard error, and results alone to standard output.
    """
    _configure_logging(aside=logs_aside)
    _print_any_name()
    # Tracing makes many objects and little garbage: with Python's own threshold, its collector
    # takes a tenth of the time until the first step.
    gc.set_threshold(5_000)
    for flag in flags.FLAGS.get_flags_for_module(main.__module__):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)  # for --help

    def parse(arguments: Sequence[str]) -> Sequence[str]:
        if command_help.is_asked(arguments):
            try:
                print(command_help.text(sys.modules[main.__module__]), flush=True)
            except BrokenPipeError:  # of a pager that was left
                os._exit(0)
            sys.exit(0)
        return _parse(arguments, defaults, positional=positional)

    app.run(lambda argv: _guarded(main, argv), flags_parser=parse)
    raise AssertionError("app.run does not return")


def as_defined(arguments: Sequence[str]) -> list[str]:
    """A command line with every flag's name as it is defined; `-` and `_` in names are the same.

    Names of settings, `--config.…`, stay as they are, and so do values.
    """
    found = list(arguments)
    for index, name, rest in _given(arguments):
        found[index] = f"--{name}{rest}"
    return found


def is_given(name: str, arguments: Sequence[str]) -> bool:
    """Whether the command line holds the flag `name`."""
    return name in {given for _, given, _ in _given(arguments)}


def _given(arguments: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """The known flags in a command line: index, name as it is defined, `=` and the value."""
    places = iter(range(1, len(arguments)))
    for index in places:
        argument = arguments[index]
        if argument == "--":
            break
        if not argument.startswith("-"):
            continue
        given, equals, value = argument.removeprefix("-").removeprefix("-").partition("=")
        name = _defined(given)
        if name is None:
            continue
        yield index, name, equals + value
        if not equals and name in flags.FLAGS and not flags.FLAGS[name].boolean:
            next(places, None)  # its value, whatever it looks like


def _defined(given: str) -> str | None:
    """A flag's name as it is defined, with `no` before it where that was given; None if unknown."""
    for name in (given, given.replace("-", "_"), given.replace("_", "-")):
        if name in flags.FLAGS:
            return name
        for no in ("no", "no-", "no_"):
            positive = name.removeprefix(no)
            if positive != name and positive in flags.FLAGS and flags.FLAGS[positive].boolean:
                return f"no{positive}"
    return None


def _parse(
    arguments: Sequence[str],
    defaults: Callable[[Sequence[str]], Mapping[str, str]],
    *,
    positional: bool,
) -> Sequence[str]:
    arguments = as_defined(arguments)
    try:
        _check_settings(arguments)
        added = [
            f"--{name}={value}"
            for name, value in defaults(arguments).items()
            if not is_given(name, arguments)
        ]
        arguments = [*arguments[:1], *added, *arguments[1:]]
        rest = flags.FLAGS(arguments)
    except _FLAG_ERRORS as error:
        _fail(error, status=2)
    if len(rest) > 1 and not positional:
        _fail(ValueError(f"unexpected argument {rest[1]!r}; see --help"), status=2)
    return rest


def _check_settings(arguments: Sequence[str]) -> None:
    """Raises ValueError for `-` in the name of a setting, which would be read as a minus."""
    for argument in itertools.takewhile(lambda argument: argument != "--", arguments[1:]):
        name = argument.lstrip("-").partition("=")[0]
        flag, dot, _ = name.partition(".")
        if (
            argument.startswith("-")
            and dot
            and flag in flags.FLAGS
            and re.fullmatch(r"[\w.-]+-[\w.-]+", name)
        ):
            raise ValueError(f"unknown setting {name}; did you mean {name.replace('-', '_')}?")


def _guarded(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    _keep_compiled_programs()
    if flags.FLAGS.quiet:
        logging.getLogger("repvgg_jax").setLevel(logging.WARNING)
    try:
        return main(argv)
    except (KeyboardInterrupt, *_USER_ERRORS) as error:
        if flags.FLAGS.traceback:
            raise
        status = explain(error)
        # Everything of ours is closed. Threads of libraries that wait for what failed, as
        # Orbax's do for minutes if a disk is full, must not keep the process alive.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def explain(error: BaseException) -> int:
    """Writes an error to standard error, a user's mistake in one line; returns the exit status."""
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
    return f"error: {' '.join(text_of(error).split()) or type(error).__name__}\n"


def text_of(error: object) -> str:
    """The text of an error, without the quotation marks and names of the libraries' own."""
    # ml_collections raises an AttributeError with a KeyError in it, whose text is a repr.
    if isinstance(error, (AttributeError, KeyError)) and error.args:
        return f"unknown setting {text_of(error.args[0]).removeprefix('unknown setting ')}"
    text = str(error)
    for pattern, words in _NUMBERS:
        text = re.sub(pattern, words, text)
    return text


def train() -> None:
    """The console script `repvgg-train`."""
    _script("repvgg_jax.train.command", extra="train")


def convert() -> None:
    """The console script `repvgg-convert`."""
    _script("repvgg_jax.convert.command", extra="export")


def prepare() -> None:
    """The console script `repvgg-prepare`."""
    _script("repvgg_jax.data.prepare.__main__", extra="train")


def predict() -> None:
    """The console script `repvgg-predict`."""
    _script("repvgg_jax.predict", extra="train", positional=True, logs_aside=True)


def visualize() -> None:
    """The console script `repvgg-visualize`."""
    _script("repvgg_jax.visualize.__main__", extra="train")


def _script(module: str, *, extra: str, **options: bool) -> None:
    """Runs a command whose libraries may not be installed: they come with an extra."""
    try:
        loaded = importlib.import_module(module)
        run(loaded.main, getattr(loaded, "defaults", lambda _: {}), **options)
    except ModuleNotFoundError as error:
        ours = (error.name or "").partition(".")[0] == __package__
        if ours or (flags.FLAGS.is_parsed() and flags.FLAGS.traceback):
            raise
        _fail(ValueError(f"{error}; {how_to_install(extra=extra)}"), status=1)
