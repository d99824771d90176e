"""`parts/`: the finished cases of an evaluation, so that an interrupted one continues where it stopped.

    parts/run.json       the settings that the rows depend on
    parts/rank-N.jsonl   the cases that rank N finished, one JSON object a line, on the disk before the next case begins
    parts/KEY.N.png      pictures of a case

A case counts as finished if its line has the fingerprint of these settings and of the case's data as it is now. Lines
of other settings or data stay in the file and are not used. A case that failed is tried again by the next run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from medsam2.errors import UserError
from medsam2.evaluation.report.overlays import Drawn
from medsam2.files import write_text

PARTS, RUN = "parts", "run.json"
MAX_SHOWN_CHARACTERS = 60
"""Of a setting in a message."""


@dataclass(frozen=True)
class Failure:
    """Why a case has no rows. stage: read or predict. reason: without names of patients. remedy: what to do."""

    stage: str
    reason: str
    remedy: str


@dataclass(frozen=True)
class Part:
    """One case.

    Attributes:
        key, dataset, case: as in `CaseName`; the case is a salted hash.
        fingerprint: of the settings and the case's data. rows: `quick.Row` as dictionaries.
        pictures: their files lie in `parts/`.
    """

    key: str
    dataset: str
    case: str
    fingerprint: str
    rows: tuple[dict[str, Any], ...] = ()
    pictures: tuple[Drawn, ...] = ()
    failure: Failure | None = None


_PART = TypeAdapter(Part)


def digest(content: Any) -> str:
    """16 hexadecimal digits of JSON values; other values count as their text."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def refuse_existing(output: Path, resume: bool) -> None:
    """Refuse an output folder that is taken, before hours of work.

    Raises:
        UserError: the output holds something, and it is not to be resumed.
    """
    if output.is_file():
        raise UserError(f"output={output} already exists and is a file; give a folder that does not exist yet.")
    if not output.is_dir() or not any(output.iterdir()):
        return
    has_parts = (output / PARTS / RUN).is_file()
    if not resume:
        more = ", or continue where it stopped with resume=true" if has_parts else ""
        raise UserError(f"output={output} already exists; choose another folder or remove it first{more}.")
    if not has_parts:
        raise UserError(f"resume=true: {output} holds no {PARTS}/{RUN}; give the output folder of an evaluation.")


class PartsFolder:
    """The finished cases of one output folder.

    Args:
        output: the evaluation's folder. content: the settings that the rows depend on (JSON values).
    """

    def __init__(self, output: Path, content: Mapping[str, Any]) -> None:
        self.folder = output / PARTS
        self.content: dict[str, Any] = json.loads(json.dumps(content, default=str))
        self._parts: dict[tuple[str, str], Part] = {}

    def begin(self) -> None:
        """Write `run.json`, for rank 0.

        Raises:
            UserError: the folder belongs to an evaluation with other settings.
        """
        path = self.folder / RUN
        before = json.loads(path.read_text()) if path.is_file() else self.content
        changed = [name for name in self.content if before.get(name) != self.content[name]]
        if changed:
            lines = [f"{name} was {_short(before.get(name))}, now {_short(self.content[name])}" for name in changed]
            raise UserError(
                f"resume=true: the finished cases of {self.folder.parent} were made with other settings: "
                f"{'; '.join(lines)}. Use the same settings, or another output."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(self.content))

    def load(self) -> None:
        """Read the lines of all ranks. A line that a killed process left incomplete is passed over."""
        self._parts = {}
        for path in sorted(self.folder.glob("rank-*.jsonl")):
            for line in path.read_bytes().splitlines():
                try:
                    part = _PART.validate_json(line)
                except ValueError:
                    continue
                known = self._parts.get((part.key, part.fingerprint))
                if part.failure is None or known is None or known.failure is not None:  # of failures the last
                    self._parts[part.key, part.fingerprint] = part

    def fingerprint(self, state: str) -> str:
        """Of these settings and a case's data (`CaseName.state`)."""
        return digest([self.content, state])

    def find(self, key: str, state: str) -> Part | None:
        """The case as it was finished or failed, if it was under these settings and with this data; see `load`."""
        return self._parts.get((key, self.fingerprint(state)))

    def append(self, rank: int, part: Part) -> None:
        """Add a case to the file of a rank; it is on the disk when this returns."""
        with open(self.folder / f"rank-{rank}.jsonl", "a+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 1, 0))
            torn = file.read(1) not in (b"", b"\n")  # a killed process left half a line
            file.write((b"\n" if torn else b"") + json.dumps(asdict(part), default=str).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def picture(self, key: str, number: int) -> Path:
        """The file of picture `number` of a case."""
        return self.folder / f"{key}.{number}.png"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[: MAX_SHOWN_CHARACTERS - 1] + "…"
