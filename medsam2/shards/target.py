"""Where shards are written: a local folder, or any fsspec URL (`s3://bucket/shards`, `gs://`, `memory://`).

A file is whole or absent in both. Locally it is written beside, fsynced and renamed; an object store has no rename, but
takes an object whole, so it is written to a local temporary file and sent. Either way the index is published last.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

from medsam2.errors import UserError
from medsam2.files import atomic_write


class Target(Protocol):
    """A flat folder of files by name."""

    where: str
    local: Path | None
    """The folder, where it is a local one."""

    def names(self) -> list[str]: ...

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None where there is none."""

    def read(self, name: str) -> bytes: ...

    def copy_to(self, name: str, path: Path) -> None: ...

    def write(self, name: str) -> Any:
        """A context that gives a binary file; the target holds it whole after a successful end, else not at all."""

    def delete(self, name: str) -> None: ...


def open_target(out: str | Path) -> Target:
    """The target of `--out`; nothing is created.

    Raises:
        UserError: a URL whose protocol is not known, or whose package is not installed.
    """
    text = str(out)
    if "://" not in text:
        return LocalTarget(Path(out))
    filesystem, root = open_url(text)
    if is_local(filesystem):
        return LocalTarget(Path(root))
    return ObjectTarget(filesystem, root.rstrip("/"), text)


def open_url(url: str, **options: Any) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it.

    Raises:
        UserError: the protocol is not known, or its package is not installed.
    """
    import fsspec

    try:
        filesystem, root = fsspec.core.url_to_fs(url, **options)
    except (ValueError, ImportError) as error:
        raise UserError(f"{url}: cannot be opened ({error}); install the fsspec package of this protocol.") from None
    return filesystem, str(root)


def is_local(filesystem: Any) -> bool:
    """Whether an fsspec file system is this machine's own."""
    protocol = filesystem.protocol
    return "file" in (protocol if isinstance(protocol, tuple) else (protocol,))


class LocalTarget:
    """A folder on a file system of this machine."""

    def __init__(self, folder: Path) -> None:
        self.local: Path | None = folder
        self.folder = folder
        self.where = str(folder)

    def names(self) -> list[str]:
        return sorted(p.name for p in self.folder.iterdir()) if self.folder.is_dir() else []

    def size(self, name: str) -> int | None:
        path = self.folder / name
        return path.stat().st_size if path.is_file() else None

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def copy_to(self, name: str, path: Path) -> None:
        shutil.copyfile(self.folder / name, path)

    @contextmanager
    def write(self, name: str) -> Iterator[IO[bytes]]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.folder / name) as file:
            yield file

    def delete(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)


class ObjectTarget:
    """A prefix of an object store."""

    def __init__(self, filesystem: Any, root: str, url: str) -> None:
        self.local: Path | None = None
        self.filesystem = filesystem
        self.root = root
        self.where = url
        self.scratch: Path | None = None
        """An existing folder for what is on its way; the system's own where it is None."""

    def names(self) -> list[str]:
        self.filesystem.invalidate_cache()
        try:
            found = self.filesystem.ls(self.root, detail=False)
        except FileNotFoundError:
            return []
        return sorted(str(name).rstrip("/").rsplit("/", 1)[-1] for name in found)

    def size(self, name: str) -> int | None:
        self.filesystem.invalidate_cache()
        try:
            return int(self.filesystem.size(f"{self.root}/{name}"))
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes:
        return bytes(self.filesystem.cat_file(f"{self.root}/{name}"))

    def copy_to(self, name: str, path: Path) -> None:
        self.filesystem.get_file(f"{self.root}/{name}", str(path))

    @contextmanager
    def write(self, name: str) -> Iterator[IO[bytes]]:
        with tempfile.TemporaryDirectory(prefix="medsam2-", dir=self.scratch) as folder:
            path = Path(folder) / name
            with open(path, "w+b") as file:
                yield file
            self.filesystem.makedirs(self.root, exist_ok=True)
            self.filesystem.put_file(str(path), f"{self.root}/{name}")

    def delete(self, name: str) -> None:
        self.filesystem.rm_file(f"{self.root}/{name}")
