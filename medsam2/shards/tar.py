"""Tar members written so that equal content gives equal bytes, and so that archives can be joined by appending."""

from __future__ import annotations

import tarfile
from typing import IO

BLOCK = 512
END = b"\0" * (2 * BLOCK)


def member_header(name: str, size: int) -> bytes:
    """A ustar header: mtime 0, uid and gid 0, no owner, mode 644."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime, info.uid, info.gid = size, 0o644, 0, 0, 0
    return info.tobuf(tarfile.USTAR_FORMAT)


def write_member(file: IO[bytes], offset: int, name: str, payload: bytes) -> tuple[int, int]:
    """Append a member at `offset`; returns (offset of its payload, offset after its padding)."""
    header = member_header(name, len(payload))
    padding = -len(payload) % BLOCK
    file.write(header)
    file.write(payload)
    file.write(b"\0" * padding)
    start = offset + len(header)
    return start, start + len(payload) + padding


def member_size(header: bytes) -> int | None:
    """Bytes of the member that follows a header, in any form of tar; None where this is no header."""
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").size
    except tarfile.HeaderError:
        return None
