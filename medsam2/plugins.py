"""Folders in which each file is a choice: formats, layouts, kinds of prompt. A new one is a new file, and no list."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any


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
    found: dict[str, Any] = {}
    for module in modules:
        if module.NAME in found:
            raise RuntimeError(f"two {what} are named {module.NAME!r}: {found[module.NAME]} and {module}")
        found[module.NAME] = module
    return found
