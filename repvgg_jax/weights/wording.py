"""Names and reasons from files, made fit for a message of one line."""

from collections.abc import Iterable
from typing import Any

_LISTED = 5


def brief(text: object, length: int = 160) -> str:
    """Text as one line of bounded length."""
    line = " ".join(str(text).split())
    return line if len(line) <= length else f"{line[:length]} …"


def some(names: Iterable[Any]) -> str:
    """The first few of many names."""
    short = [brief(name, 120) for name in names]
    return f"[{', '.join(short[:_LISTED])}{', …' if len(short) > _LISTED else ''}]"
