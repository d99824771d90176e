"""Write tar members such that equal content gives equal bytes, and archives can be joined by appending."""

from __future__ import annotations

import io
import tarfile
from typing import IO

END_MARK = bytes(2 * tarfile.BLOCKSIZE)


def new_tar(file: IO[bytes]) -> tarfile.TarFile:
    """Open a tar to append members to. Do not close it: that would write the end mark."""
    return tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)


def add_member(tar: tarfile.TarFile, name: str, payload: bytes) -> int:
    """Append a member; returns the offset of its payload in bytes."""
    info = tarfile.TarInfo(name)  # its defaults: mtime, uid and gid 0, no owner, mode 644
    info.size = len(payload)
    tar.addfile(info, io.BytesIO(payload))
    return tar.offset - info.size - -info.size % tarfile.BLOCKSIZE
