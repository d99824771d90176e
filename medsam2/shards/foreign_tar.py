"""Samples of a WebDataset tar with the place of every member, as far as the tar is whole; nothing is unpacked."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from medsam2.shards.tar import BLOCK

NAME = re.compile(r"(?P<key>(?:.*/)?[^/.]+)\.(?P<ending>[^/]+)")
"""WebDataset splits a member's name at the first dot of its base name."""


@dataclass(frozen=True)
class Member:
    """Where the payload of a member lies: bytes from the start of the tar."""

    offset: int
    length: int


@dataclass
class Sample:
    """Neighbouring members of one key, by their endings in lower case; `repeated` are endings that occur twice."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)


class DamagedTarError(ValueError):
    """The tar cannot be read on from some byte; samples before it are good."""


def read_samples(path: Path) -> Iterator[Sample]:
    """The samples of a tar in order; what is no plain file, hidden or without an ending is passed over.

    Raises:
        DamagedTarError: after the last good sample, where the tar is cut, damaged, compressed or not readable.
    """
    sample: Sample | None = None
    damage: DamagedTarError | None = None
    members = _members(path)
    while True:
        try:
            name, member = next(members)
        except StopIteration:
            break
        except DamagedTarError as error:
            damage = error
            break
        match = NAME.fullmatch(name)
        if match is None or match["key"].rsplit("/", 1)[-1].startswith("__"):  # WebDataset's own notes
            continue
        if sample is None or sample.key != match["key"]:
            if sample is not None:
                yield sample
            sample = Sample(match["key"])
        ending = match["ending"].lower()
        if ending in sample.members:
            sample.repeated.append(ending)
        sample.members[ending] = member
    # the last sample of a cut tar may lack members: whoever reads it says which
    if sample is not None:
        yield sample
    if damage is not None:
        raise damage


def _members(path: Path) -> Iterator[tuple[str, Member]]:
    """Name and place of every plain file of a tar.

    Raises:
        DamagedTarError: see `read_samples`.
    """
    at = 0
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as tar:  # uncompressed: others cannot be read by offset
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # else the memory grows with the tar
                at = info.offset
                if not 0 <= info.size <= size - info.offset_data:
                    left = size - info.offset_data
                    raise DamagedTarError(
                        f"the member at byte {at} claims {info.size} bytes, of which {max(0, left)} are there"
                    )
                if info.isreg() and not info.issparse():
                    yield info.name, Member(info.offset_data, info.size)
            at = tar.offset
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        if isinstance(error, DamagedTarError):
            raise
        raise DamagedTarError(f"not readable as an uncompressed tar after byte {at}: {error}") from None
    with open(path, "rb") as file:
        file.seek(at)
        mark = file.read(BLOCK)
    # tarfile takes a damaged header for the end
    if any(mark):
        raise DamagedTarError(f"no valid header at byte {at}")
    if len(mark) < BLOCK:
        raise DamagedTarError(f"ends at byte {size} without an end mark, so it was probably cut")
