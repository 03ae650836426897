"""What `--help` prints: examples, the flags in groups, and exit statuses."""

import pathlib
import shutil
import sys
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence

from absl import flags

COMMON = "Common"
_COMMON = ("quiet", "traceback")

STATUSES: Mapping[int, str] = {
    0: "done; of train.py also if SIGTERM stopped it, after it has saved",
    1: "an error, which standard error names; of data.check also images that would stop a run",
    2: "a flag or a setting that is unknown or has a value of the wrong type",
    130: "interrupted by Ctrl-C; train.py has saved",
}
"""Exit statuses of all commands."""

_TYPES = {"string": "TEXT", "int": "N", "float": "X", "comma separated list of strings": "A,B,…"}


def is_asked(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for help."""
    return bool({"--help", "-help", "-h"} & set(arguments[1:]))


def text(module: types.ModuleType) -> str:
    """The help of a command.

    Args:
      module: of its `main`: a docstring with examples, and what it may define: `COMMAND`, how the
        examples call it, by default `python -m MODULE`; `GROUPS`, names of its flags by title; and
        `ARGUMENTS`, what it takes beside flags.
    """
    width = max(60, min(100, shutil.get_terminal_size((100, 24)).columns))
    command = command_of(module)
    program = pathlib.Path(sys.argv[0]).name
    # Installed commands have names of their own; their examples call them so.
    shown = program if program.startswith("repvgg-") else command
    lines = (module.__doc__ or "").strip().replace(command, shown).splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith(shown)), len(lines))
    about, examples = ("\n".join(part).strip() for part in (lines[:first], lines[first:]))
    arguments = getattr(module, "ARGUMENTS", "")
    lines = [about, "", f"usage: {shown} [--flag=value …]{f' {arguments}' if arguments else ''}"]
    lines += ["", "Examples:", textwrap.indent(examples, "  ")]
    for title, names in {**groups_of(module), COMMON: _COMMON}.items():
        lines += ["", f"{title}:"]
        for name in names:
            lines += _flag(flags.FLAGS[name], width)
    lines += ["  --help", "      Print this.", "  --helpfull", "      Flags of libraries, too."]
    lines += ["", "- and _ in names of flags are the same."]
    lines += ["", "Exit status:"]
    lines += [f"  {status:<4}{meaning}" for status, meaning in STATUSES.items()]
    return "\n".join(lines)


def command_of(module: types.ModuleType) -> str:
    """How a command is called in a checkout."""
    name = module.__spec__.name if module.__spec__ is not None else module.__name__
    return getattr(module, "COMMAND", f"python -m {name.removesuffix('.__main__')}")


def groups_of(module: types.ModuleType) -> dict[str, Sequence[str]]:
    """Names of all flags of a command by title; those in no group come last."""
    groups = dict(getattr(module, "GROUPS", {}))
    grouped = {name for names in groups.values() for name in names}
    own = [flag.name for flag in flags.FLAGS.get_key_flags_for_module(module)]
    if others := [name for name in own if name not in grouped | set(_COMMON)]:
        groups["Others" if groups else "Flags"] = others
    return groups


def _flag(flag: flags.Flag, width: int) -> Iterator[str]:
    if flag.boolean:
        yield f"  --[no]{flag.name}" if flag.name not in _COMMON else f"  --{flag.name}"
    else:
        kind = getattr(flag.parser, "syntactic_help", "") and flag.flag_type()
        given = "" if flag.default is None else (flag.default_as_str or "").strip("'\"")
        default = f"  (default: {given})" if given else ""
        yield f"  --{flag.name}={_TYPES.get(kind or '', 'TEXT')}{default}"
    yield from textwrap.wrap(
        flag.help or "", width, initial_indent=" " * 6, subsequent_indent=" " * 6
    )
