"""Choices by name: a folder in which each file is one, or a table of functions. A new one needs no list."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")


def modules_of(package: str, offers: str) -> Iterator[ModuleType]:
    """The modules of a package, in the order of the alphabet.

    Args:
        offers: only modules that have this name; the others are helpers.
    """
    for entry in pkgutil.iter_modules(importlib.import_module(package).__path__):
        module = importlib.import_module(f"{package}.{entry.name}")
        if hasattr(module, offers):
            yield module


def by_name(modules: Iterable[Any], what: str) -> dict[str, Any]:
    """Modules by their `NAME`.

    Args:
        what: plural of what they are, for the message.

    Raises:
        RuntimeError: two files claim one name.
    """
    named: dict[str, Any] = {}
    for module in modules:
        register(named, module.NAME, module, what)
    return named


def register(table: dict[str, T], name: str, choice: T, what: str) -> T:
    """Enter a choice into its table and return it.

    Args:
        what: plural of what the choices are, for the message.

    Raises:
        RuntimeError: the name is taken.
    """
    if name in table:
        raise RuntimeError(f"two {what} are named {name!r}: {table[name]} and {choice}")
    table[name] = choice
    return choice
