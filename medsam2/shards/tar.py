"""Tar members written so that equal content gives equal bytes, and so that archives can be joined by appending."""

from __future__ import annotations

import io
import tarfile
from typing import IO

BLOCK = tarfile.BLOCKSIZE
END = b"\0" * (2 * BLOCK)


def new_tar(file: IO[bytes]) -> tarfile.TarFile:
    """A tar to which members are added. It is not to be closed, which would write the end mark."""
    return tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)


def add_member(tar: tarfile.TarFile, name: str, payload: bytes) -> int:
    """Append a member; returns the offset of its payload."""
    info = tarfile.TarInfo(name)  # its defaults: mtime, uid and gid 0, no owner, mode 644
    info.size = len(payload)
    tar.addfile(info, io.BytesIO(payload))
    return tar.offset - info.size - -info.size % BLOCK
