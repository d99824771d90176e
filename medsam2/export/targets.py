"""Which formats there are: every file in `formats/` that states `TARGET = "name"  # what it is`.

The files are read, not imported, so that `medsam2 export --help` answers at once. A new format is a new file, which
also defines its `Exporter`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from medsam2.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from medsam2.export.formats.exporter import Exporter

ALL = "all"
STATEMENT = re.compile(r'^TARGET = "([a-z0-9_]+)"  # (.+)$', re.MULTILINE)


@dataclass(frozen=True)
class Target:
    """A format: its name on the command line, one line about it, and the module of its exporter."""

    name: str
    summary: str
    module: str

    def exporter(self) -> Exporter:
        from medsam2.export.formats.exporter import Exporter

        module = importlib.import_module(self.module)
        (found,) = (
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, Exporter) and value.__module__ == self.module
        )
        return found()


@cache
def targets() -> dict[str, Target]:
    """The formats by name, in the order of their files; two files of the same name are a mistake of the programmer."""
    known: dict[str, Target] = {}
    for path in sorted((Path(__file__).parent / "formats").glob("*.py")):
        for name, summary in STATEMENT.findall(path.read_text(encoding="utf-8")):
            if name in known:
                raise RuntimeError(f"two exporters are called {name!r}: {known[name].module} and {path.stem}")
            known[name] = Target(name, summary, f"medsam2.export.formats.{path.stem}")
    return known


def listed() -> str:
    """All formats in one line, for a help text."""
    return "; ".join(f"{target.name} ({target.summary})" for target in targets().values())


def split_names(values: Sequence[str]) -> list[str]:
    """The formats of `--to A --to B` or `--to A,B`, each once; ["all"] for a release.

    Raises:
        UserError: an unknown format, or "all" beside others.
    """
    names = list(dict.fromkeys(name.strip() for value in values for name in value.split(",") if name.strip()))
    if ALL in names and len(names) > 1:
        raise UserError(f"--to all is every format; leave out {', '.join(name for name in names if name != ALL)}.")
    for name in names:
        if name != ALL and name not in targets():
            hint = did_you_mean(name, targets())
            raise UserError(f"--to {name}: there is no such format. There is {listed()}.{hint}")
    return names
