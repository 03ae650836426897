"""What `--config` names: a recipe, or a run directory, whose configuration is then the recipe."""

import importlib.machinery
import importlib.util
import pathlib
import sys
import traceback
import types
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict

from repvgg_jax import cli
from repvgg_jax.text import did_you_mean, one_line

_PACKAGE = str(pathlib.Path(__file__).parents[1])  # as tracebacks name it


class RecipeError(flags.Error):
    """A recipe that cannot be read; the message is one line. No ValueError: absl rewords those."""


class RecipeParser(flags.ArgumentParser):
    """Parser of `--config`: `FILE.py`, `FILE.py:ARGUMENT` or a run directory."""

    syntactic_help = "a recipe or a run directory"

    def parse(self, argument: str) -> ConfigDict:
        """The locked configuration.

        Raises:
          RecipeError: no such file, an error in it, or no configuration from it.
          ModuleNotFoundError: this package lacks a library of an extra.
        """
        if is_run(argument):
            return _of_run(argument)
        file, *rest = argument.split(":", maxsplit=1)
        if not pathlib.Path(file).is_file():
            raise RecipeError(_missing(file))
        try:
            config = _load(file).get_config(*rest)
        except Exception as error:  # whatever the code of a user raises
            if isinstance(error, ModuleNotFoundError) and _is_of_an_extra(error):
                raise
            raise RecipeError(_describe(error, file)) from error
        if not isinstance(config, ConfigDict):
            raise RecipeError(
                f"{file}: get_config() must return a ConfigDict, not {one_line(repr(config), 60)}"
            )
        return config.lock()

    def flag_type(self) -> str:
        """For --help."""
        return "recipe"


def is_run(source: str | pathlib.Path) -> bool:
    """Whether `source` is a directory that has the configuration of a run."""
    return pathlib.Path(source, "config.json").is_file()


def default_recipe(arguments: Sequence[str], otherwise: str | None) -> str | None:
    """What `--config` is if it is not given.

    Args:
      arguments: of the command line, with the name of the program.
      otherwise: what it is if no run is evaluated, resumed or, with --workdir, started from.
    """
    known = flags.FlagValues()
    for name in ("workdir", "init_from"):
        flags.DEFINE_string(name, None, "", flag_values=known)
    flags.DEFINE_bool("eval_only", False, "", flag_values=known)
    known.set_gnu_getopt(True)  # flags after unknown ones
    known(arguments, known_only=True)
    workdir, init_from = known.workdir, known.init_from
    if known.eval_only:
        found = [path for path in (init_from, workdir) if path and is_run(path)]
    else:
        found = [path for path in (workdir, init_from) if path and workdir and _is_begun(path)]
    return found[0] if found else otherwise


def _is_begun(path: str) -> bool:
    """Whether there is a checkpoint; settings of a run that failed before are not worth keeping."""
    from repvgg_jax.train.workdir import Workdir

    return is_run(path) and Workdir(pathlib.Path(path)).has_checkpoint


def _of_run(path: str) -> ConfigDict:
    from repvgg_jax.train.config import as_config
    from repvgg_jax.train.workdir import Workdir

    try:
        return as_config(Workdir(pathlib.Path(path)).read_settings()).lock()
    except ValueError as error:
        raise RecipeError(str(error)) from error


def _load(file: str) -> types.ModuleType:
    loader = importlib.machinery.SourceFileLoader("config_config", file)
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module  # for what is pickled or a dataclass
    loader.exec_module(module)
    if not callable(getattr(module, "get_config", None)):
        raise RecipeError(
            f"{file}: no function get_config(); a recipe defines it, and it returns a ConfigDict"
        )
    return module


def _missing(file: str) -> str:
    folder = pathlib.Path(sys.argv[0]).resolve().parent / "configs"
    found = sorted(path.stem for path in folder.glob("*.py"))
    hint = did_you_mean(pathlib.Path(file).stem, found)
    there = f"; {hint}{folder} has: {', '.join(found)}" if found else ""
    what = "not a run directory (no config.json)" if pathlib.Path(file).is_dir() else "no such file"
    return f"--config={file}: {what}{there}"


def _describe(error: Exception, file: str) -> str:
    """Where in the recipe an error arose, and what it is."""
    if isinstance(error, RecipeError):
        return str(error)
    if isinstance(error, SyntaxError):
        code = f": {one_line(error.text, 60)}" if error.text else ""
        return f"{error.filename}:{error.lineno}: {error.msg}{code}"
    frames = traceback.extract_tb(error.__traceback__)
    line = next((frame.lineno for frame in reversed(frames) if frame.filename == file), None)
    where = file if line is None else f"{file}:{line}"
    # ml_collections refuses unknown settings with an AttributeError that holds a KeyError.
    setting = isinstance(error, AttributeError) and isinstance(error.args[0], KeyError)
    if setting or isinstance(error, (ImportError, OSError, TypeError, ValueError)):
        return f"{where}: {' '.join(cli.text_of(error).split())}"
    return f"{where}: {type(error).__name__}: {error}"


def _is_of_an_extra(error: ModuleNotFoundError) -> bool:
    """Whether it is this package that imports the module which is missing."""
    frames = traceback.extract_tb(error.__traceback__)
    importers = [f.filename for f in frames if not f.filename.startswith("<frozen importlib")]
    return importers[-1].startswith(_PACKAGE)
