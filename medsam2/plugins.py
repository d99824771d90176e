"""Registries of plugins: the modules of a package, or a table of functions, by name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")


def modules_of(package: str, offers: str) -> Iterator[ModuleType]:
    """Import the modules of a package in alphabetical order.

    Args:
        offers: a name that a plugin's module defines; modules without it are helpers and are skipped.
    """
    for entry in pkgutil.iter_modules(importlib.import_module(package).__path__):
        module = importlib.import_module(f"{package}.{entry.name}")
        if hasattr(module, offers):
            yield module


def by_name(modules: Iterable[Any], kind: str) -> dict[str, Any]:
    """Index modules by their `NAME`.

    Args:
        kind: the kind of plugins in the plural, for the message.

    Raises:
        RuntimeError: two files have the same name.
    """
    named: dict[str, Any] = {}
    for module in modules:
        register(named, module.NAME, module, kind)
    return named


def register(table: dict[str, T], name: str, plugin: T, kind: str) -> T:
    """Add a plugin to its table and return it.

    Args:
        kind: the kind of plugins in the plural, for the message.

    Raises:
        RuntimeError: the name is taken.
    """
    if name in table:
        raise RuntimeError(f"two {kind} are named {name!r}: {table[name]} and {plugin}")
    table[name] = plugin
    return plugin
