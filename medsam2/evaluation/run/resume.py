"""`parts/`: the finished cases of an evaluation, so that an interrupted evaluation can resume.

    parts/run.json       the settings on which the rows depend
    parts/rank-N.jsonl   the cases that rank N finished, one JSON object per line, synced before the next case begins
    parts/KEY.N.png      pictures of a case

A case counts as finished if its line has the fingerprint of the current settings and of the case's current data. Lines
with another fingerprint stay in the file and are ignored. The next run retries failed cases.
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
from medsam2.evaluation.report.overlays import DrawnPicture
from medsam2.files import write_text

PARTS, RUN = "parts", "run.json"
MAX_SETTING_CHARACTERS = 60
"""Characters of a setting in a message."""


@dataclass(frozen=True)
class Failure:
    """Why a case has no rows. stage: read or predict. reason: without names of patients. remedy: what to do."""

    stage: str
    reason: str
    remedy: str


@dataclass(frozen=True)
class CaseResult:
    """The rows and pictures of one case, or why it failed.

    Attributes:
        key, dataset, case: as in `CaseName`; the case is a salted hash.
        fingerprint: of the settings and the case's data. rows: `score_case.Row` as dictionaries.
        pictures: drawn pictures, with files in `parts/`.
    """

    key: str
    dataset: str
    case: str
    fingerprint: str
    rows: tuple[dict[str, Any], ...] = ()
    pictures: tuple[DrawnPicture, ...] = ()
    failure: Failure | None = None


_CASE_RESULT = TypeAdapter(CaseResult)


def refuse_existing(output: Path, resume: bool) -> None:
    """Refuse an output folder that is in use, before hours of work.

    Raises:
        UserError: the folder is not empty and `resume` is False, or there is nothing to resume.
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


class CaseResults:
    """The finished cases of one output folder.

    Args:
        output: the evaluation's folder. settings: the settings on which the rows depend (JSON values).
    """

    def __init__(self, output: Path, settings: Mapping[str, Any]) -> None:
        self.folder = output / PARTS
        self.settings: dict[str, Any] = json.loads(json.dumps(settings, default=str))
        self._results: dict[tuple[str, str], CaseResult] = {}

    def begin(self) -> None:
        """Write `run.json`; only rank 0 calls it.

        Raises:
            UserError: the folder belongs to an evaluation with other settings.
        """
        path = self.folder / RUN
        before = json.loads(path.read_text()) if path.is_file() else self.settings
        changes = [
            f"{name} was {_shorten(before.get(name))}, now {_shorten(value)}"
            for name, value in self.settings.items()
            if before.get(name) != value
        ]
        if changes:
            raise UserError(
                f"resume=true: the finished cases of {self.folder.parent} were made with other settings: "
                f"{'; '.join(changes)}. Use the same settings, or another output."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(self.settings))

    def load(self) -> None:
        """Read the lines of all ranks, skipping lines that a killed process left incomplete."""
        self._results = {}
        for path in sorted(self.folder.glob("rank-*.jsonl")):
            for line in path.read_bytes().splitlines():
                try:
                    result = _CASE_RESULT.validate_json(line)
                except ValueError:
                    continue
                earlier = self._results.get((result.key, result.fingerprint))
                # A success replaces failures, and a later failure an earlier one
                if result.failure is None or earlier is None or earlier.failure is not None:
                    self._results[result.key, result.fingerprint] = result

    def fingerprint(self, state: str) -> str:
        """Fingerprint of these settings and a case's data (`CaseName.state`): 16 hexadecimal digits."""
        content = json.dumps([self.settings, state], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def find(self, key: str, state: str) -> CaseResult | None:
        """The result of a case with these settings and this data, or None; call `load` first."""
        return self._results.get((key, self.fingerprint(state)))

    def append(self, rank: int, result: CaseResult) -> None:
        """Append a case to the file of a rank and sync it to disk."""
        with open(self.folder / f"rank-{rank}.jsonl", "a+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 1, 0))
            incomplete = file.read(1) not in (b"", b"\n")  # the last line, if a process was killed while writing it
            file.write((b"\n" if incomplete else b"") + json.dumps(asdict(result), default=str).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def picture_path(self, key: str, number: int) -> Path:
        """The file of picture `number` of a case."""
        return self.folder / f"{key}.{number}.png"


def _shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= MAX_SETTING_CHARACTERS else text[: MAX_SETTING_CHARACTERS - 1] + "…"
