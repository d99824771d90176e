"""Tar members written so that equal content gives equal bytes, and so that archives can be joined by appending."""

from __future__ import annotations

import tarfile
from typing import IO

BLOCK = 512
END = b"\0" * (2 * BLOCK)


def write_member(file: IO[bytes], offset: int, name: str, payload: bytes) -> tuple[int, int]:
    """Append a member at `offset`; returns (offset of its payload, offset after its padding)."""
    info = tarfile.TarInfo(name)  # its defaults: mtime, uid and gid 0, no owner, mode 644
    info.size = len(payload)
    header = info.tobuf(tarfile.USTAR_FORMAT)
    padding = -len(payload) % BLOCK
    file.write(header)
    file.write(payload)
    file.write(b"\0" * padding)
    start = offset + len(header)
    return start, start + len(payload) + padding
