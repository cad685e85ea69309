"""The one exception for a user's mistake, and its "did you mean"."""

import difflib
import os
import reprlib
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """A mistake that the user can correct; the command line prints it and exits with code 2.

    The message has at most three lines: what is wrong (field and value), what is allowed, how to
    fix it.

    Args:
      problem: one line naming the field and the value.
      allowed: the allowed set or range, or None.
      fix: what to type or change, or None.
    """

    def __init__(self, problem: str, *, allowed: str | None = None, fix: str | None = None):
        lines = [problem]
        if allowed:
            lines.append(f"  allowed: {allowed}")
        if fix:
            lines.append(f"  fix: {fix}")
        # A value may contain line breaks, which would break the promise of three lines.
        super().__init__("\n".join(" ".join(line.splitlines()) for line in lines))


def closest(name: str, options: Iterable[str]) -> str | None:
    """The option that `name` was most likely meant to be, or None."""
    if len(name) > 80:  # No name is as long, and comparing takes its square.
        return None
    matches = difflib.get_close_matches(name, list(options), n=1, cutoff=0.5)
    return matches[0] if matches else None


def unknown(field: str, value: str, options: Iterable[str], *, hint: str = "") -> UserError:
    """The error for a name outside a known set, with the nearest name as the fix, and a hint."""
    options = sorted(options)
    guess = closest(value, options)
    fix = f"did you mean {guess!r}?" if guess else f"choose one of the names above for {field}"
    return UserError(
        f"{field}: unknown name {short(value)}",
        allowed=", ".join(options),
        fix=f"{fix} ({hint})" if hint else fix,
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's message (or its type), at most 200 characters."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def short(value: Any, limit: int = 80) -> str:
    """How a value that somebody gave is named in an error: its repr, at most `limit` characters.

    Only the beginning of a long one is written out, so that a picture in a text costs nothing.
    """
    if isinstance(value, str | bytes | bytearray):
        cut = bytes(value[:limit]) if isinstance(value, bytearray) else value[:limit]
        text = repr(cut)
    elif isinstance(value, memoryview):
        text = f"<memoryview of {value.nbytes} bytes>"
    else:
        text = _SHORT.repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def short_path(path: Any, limit: int = 80) -> str:
    """How a path that leads nowhere is named: its last `limit` characters, which say which it is.

    One that leads somewhere is written out, for the advice to be followed.
    """
    name = os.fspath(path)
    return name if len(name) <= limit else f"...{name[3 - limit :]}"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
