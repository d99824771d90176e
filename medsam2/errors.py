"""Errors for users: the fault, its place and a remedy, without a traceback."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from pydantic import ValidationError

P = ParamSpec("P")
R = TypeVar("R")


class UserError(ValueError):
    """An error that the user can correct. The message names the file or key, the value and the remedy."""


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest of `options`, or an empty string."""
    close = difflib.get_close_matches(word, list(options), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def check_choice(label: str, value: str, options: Iterable[str]) -> None:
    """Refuse a value that is not in `options`, and suggest the closest one.

    Args:
        label: the name of the value in the message, e.g. "--layout".

    Raises:
        UserError: the value is not in `options`.
    """
    names = list(options)
    if value not in names:
        hint = next(filter(None, (did_you_mean(word, names) for word in (value, value.upper(), value.lower()))), "")
        raise UserError(f"{label} {value!r} is not one of {', '.join(names)}.{hint}")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def first_problem(error: ValidationError) -> str:
    """Return `key: message (found value)` for the first of pydantic's errors."""
    first = error.errors()[0]
    value = "" if first["type"] == "missing" else f" (found {str(first['input'])[:80]!r})"
    return f"{'.'.join(map(str, first['loc']))}: {first['msg'].removeprefix('Value error, ')}{value}"


def explain_errors(function: Callable[P, R]) -> Callable[P, R]:
    """Print a `UserError` as one line on stderr and exit with status 2 (MEDSAM2_TRACEBACK=1 shows the traceback)."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except UserError as error:
            if os.environ.get("MEDSAM2_TRACEBACK"):
                raise
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None

    return wrapped
