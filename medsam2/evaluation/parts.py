"""`parts/`: one small file a finished case, so that a run that was interrupted goes on where it stopped.

    parts/run.json          what the parts depend on: weights, protocols, metrics, corruptions ... and their fingerprint
    parts/KEY.json          one case: its rows, or why it failed, and which pictures were drawn of it
    parts/KEY.N.png         these pictures
    parts/rank-N.now        the case that rank N works on: named when its process is killed

Each file is written beside and renamed, so it is whole or absent. A part counts only with the fingerprint of this run
and of its case's files. A case that failed is tried again by the next run, not by this one.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from medsam2.errors import UserError
from medsam2.files import atomic_write

PARTS, RUN = "parts", "run.json"
SHOWN = 60  # letters of a setting in a message


@dataclass(frozen=True)
class Failure:
    """Why a case has no rows. stage: read, predict or killed. reason: without names of patients. remedy: what to do."""

    stage: str
    reason: str
    remedy: str


@dataclass(frozen=True)
class PictureNote:
    """A picture in `parts/`: its file, the row of its first checkpoint, and the DSC of each checkpoint."""

    file: str
    row: dict[str, Any]
    scores: dict[str, float]


@dataclass(frozen=True)
class Part:
    """One case.

    Attributes:
        number: its place in the source. key: its file name. dataset, case: of the source; the case is a salted hash.
        state: of its files (`CaseName`). attempt: which start of the run made it. rows: `quick.Row` as dictionaries.
    """

    number: int
    key: str
    dataset: str
    case: str
    state: str = ""
    attempt: str = ""
    rows: tuple[dict[str, Any], ...] = ()
    pictures: tuple[PictureNote, ...] = field(default=())
    failure: Failure | None = None


def fingerprint(content: Mapping[str, Any]) -> str:
    """16 hex digits of `content` (JSON values), whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def refuse_existing(output: Path, resume: bool) -> None:
    """Before hours of work, not after.

    Raises:
        UserError: the output holds something, and it is not to be resumed.
    """
    if output.is_file():
        raise UserError(f"output={output} already exists and is a file; give a folder that does not exist yet.")
    if not resume and output.is_dir() and any(output.iterdir()):
        more = ", or go on where it stopped with resume=true" if (output / PARTS / RUN).is_file() else ""
        raise UserError(f"output={output} already exists; choose another folder or remove it first{more}.")


class PartsFolder:
    """The parts of one output folder.

    Args:
        output: the evaluation's folder. content: what the rows depend on (JSON values), told apart by name in errors.
        launch: equal for the ranks that were started together.

    `attempt` names this start of the run, once it has begun or joined.
    """

    def __init__(self, output: Path, content: Mapping[str, Any], launch: str = "") -> None:
        self.folder, self.content, self.launch = output / PARTS, dict(content), launch
        self.fingerprint, self.attempt = fingerprint(content), ""

    # ------------------------------------------------------------------------------------------- the run's note

    def begin(self, resume: bool) -> None:
        """Rank 0: leave the run's note, after refusing parts of other settings.

        Raises:
            UserError: the parts there were made with other settings.
        """
        if resume:
            self._refuse_other_settings()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.attempt = uuid4().hex[:8]
        self._dump(
            RUN,
            {"fingerprint": self.fingerprint, "launch": self.launch, "attempt": self.attempt, "content": self.content},
        )

    def _refuse_other_settings(self) -> None:
        found = self._load(RUN)
        if found is None:
            output = self.folder.parent
            if output.is_dir() and any(output.iterdir()):
                raise UserError(
                    f"resume=true: {output} holds no {PARTS}/{RUN}; give the output folder of an evaluation."
                )
            return  # nothing there yet: a first start with resume=true, as in a job script that is sent twice
        if found.get("fingerprint") == self.fingerprint:
            return
        before, now = _flat(found.get("content")), _flat(json.loads(json.dumps(self.content, default=str)))
        names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
        lines = [f"{name} was {_short(before.get(name))}, now {_short(now.get(name))}" for name in names[:3]]
        lines += [f"and {len(names) - 3} more"] if len(names) > 3 else []
        raise UserError(
            f"resume=true: the finished cases of {self.folder.parent} were made with other settings: "
            f"{'; '.join(lines)}. Use the same settings, or another output."
        )

    def join(self, minutes: float) -> None:
        """Other ranks: wait until rank 0 of the same launch has left its note.

        Raises:
            UserError: it did not within `minutes`, or it has other settings.
        """
        end = time.monotonic() + 60 * minutes
        while True:
            found = self._load(RUN)
            if found is not None and found.get("launch") == self.launch:
                break
            if time.monotonic() > end:
                raise UserError(f"{self.folder / RUN}: rank 0 did not start within {minutes:g} minutes.")
            time.sleep(0.2)
        if found.get("fingerprint") != self.fingerprint:
            raise UserError(f"{self.folder / RUN}: rank 0 has other settings; give every rank the same command.")
        self.attempt = str(found.get("attempt"))

    # ------------------------------------------------------------------------------------------------ the parts

    def find(self, key: str, state: str) -> Part | None:
        """The part of a case, or None if it is absent, damaged, or of other settings or other files."""
        found = self._load(f"{key}.json")
        if found is None or found.get("fingerprint") != self.fingerprint:
            return None
        try:
            part = _part(found["part"])
        except (KeyError, TypeError):
            return None
        return part if part.state == state else None

    def settled(self, key: str, state: str) -> Part | None:
        """The part, if nothing is left to do for the case in this attempt: it has rows, or it failed in it."""
        part = self.find(key, state)
        return part if part is not None and (part.failure is None or part.attempt == self.attempt) else None

    def write(self, part: Part) -> None:
        """Keep the part, whole or not at all."""
        self._dump(f"{part.key}.json", {"fingerprint": self.fingerprint, "part": asdict(part)})

    def picture(self, key: str, number: int) -> Path:
        """Where picture `number` of a case goes."""
        return self.folder / f"{key}.{number}.png"

    # ------------------------------------------------------------------------------------------ what is under way

    def starts(self, rank: int, number: int | None) -> None:
        """Rank `rank` begins case `number`, or (None) has no case in hand."""
        path = self.folder / f"rank-{rank}.now"
        if number is None:
            path.unlink(missing_ok=True)
        else:
            path.write_text(str(number))

    def in_hand(self, rank: int) -> int | None:
        """The case that rank `rank` was working on."""
        try:
            return int((self.folder / f"rank-{rank}.now").read_text())
        except (OSError, ValueError):
            return None

    # ---------------------------------------------------------------------------------------------------- files

    def _dump(self, name: str, content: Mapping[str, Any]) -> None:
        with atomic_write(self.folder / name, "w") as file:
            json.dump(content, file, default=str)

    def _load(self, name: str) -> dict[str, Any] | None:
        try:
            found = json.loads((self.folder / name).read_text())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None


def _part(content: Mapping[str, Any]) -> Part:
    failure = content["failure"]
    return Part(
        **{
            **content,
            "rows": tuple(content["rows"]),
            "pictures": tuple(PictureNote(**note) for note in content["pictures"]),
            "failure": Failure(**failure) if failure else None,
        }
    )


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    """Nested JSON as dotted names and plain values."""
    if isinstance(content, dict) or (isinstance(content, list) and content):
        pairs = content.items() if isinstance(content, dict) else enumerate(content)
        return {name: found for key, value in pairs for name, found in _flat(value, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): content}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
