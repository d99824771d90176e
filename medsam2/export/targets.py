"""Which formats there are: every file of this folder that states `TARGET = "name"` and defines `export`.

The files are read, not imported, so that `medsam2 export --help` answers at once. A new format is a new file.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from medsam2.errors import UserError, did_you_mean

STATEMENT = re.compile(r'^TARGET = "([a-z0-9_]+)"  # (.+)$', re.MULTILINE)


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote.

    Attributes:
        folder: where; files: names in it.
        verified: the consumer's own code gave our masks (False: not asked to).
        report: what the verification measured, JSON values (empty if not verified).
    """

    folder: Path
    files: tuple[str, ...]
    verified: bool
    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """A format: its name on the command line, one line about it, and the module that writes it."""

    name: str
    summary: str
    module: str

    def exporter(self) -> Callable[..., ExportResult]:
        """`export(checkpoint, out, force=False, verify=True, case=None, scores=None)` of the module (see `run`)."""
        function: Callable[..., ExportResult] = importlib.import_module(self.module).export
        return function


@cache
def targets() -> dict[str, Target]:
    """The formats by name, in alphabetical order; two files of the same name are a mistake of the programmer."""
    found: dict[str, Target] = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        match = STATEMENT.search(path.read_text(encoding="utf-8"))
        if match and path.stem != Path(__file__).stem:
            name, summary = match.groups()
            if name in found:
                raise RuntimeError(f"two exporters are called {name!r}: {found[name].module} and {path.stem}")
            found[name] = Target(name, summary, f"medsam2.export.{path.stem}")
    return found


def listed() -> str:
    """All formats in one line, for a help text."""
    return "; ".join(f"{target.name} ({target.summary})" for target in targets().values())


def find_target(name: str) -> Target:
    """The format called `name`, or a `UserError` that lists them."""
    known = targets()
    if name not in known:
        raise UserError(f"--to {name}: there is no such format. There is {listed()}.{did_you_mean(name, known)}")
    return known[name]
