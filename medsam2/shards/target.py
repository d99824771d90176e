"""Folders of shards: local ones, and any fsspec URL (`s3://bucket/shards`, `gs://`, `memory://`)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medsam2.errors import UserError


@dataclass(frozen=True)
class UrlFolder:
    """A flat folder behind a URL. Files are copied whole.

    Attributes:
        filesystem: the fsspec file system. root: the folder's path in it.
    """

    filesystem: Any
    root: str

    def sizes(self) -> dict[str, int]:
        """The size in bytes of each file by its name; empty if the folder does not exist."""
        self.filesystem.invalidate_cache()
        try:
            entries = self.filesystem.ls(self.root, detail=True)
        except FileNotFoundError:
            return {}
        return {entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry["size"] or 0 for entry in entries}

    def read(self, name: str) -> bytes:
        """Read a file."""
        return bytes(self.filesystem.cat_file(f"{self.root}/{name}"))

    def put(self, file: Path) -> None:
        """Upload a local file.

        Raises:
            UserError: the upload failed.
        """
        try:
            self.filesystem.makedirs(self.root, exist_ok=True)
            self.filesystem.put_file(str(file), f"{self.root}/{file.name}")
        except Exception as error:  # every protocol has its own exceptions
            raise UserError(
                f"{self.root}/{file.name}: cannot be uploaded ({type(error).__name__}: {error}); run the same "
                "command again: uploaded files are not sent again."
            ) from error

    def delete(self, name: str) -> None:
        """Delete a file."""
        self.filesystem.rm_file(f"{self.root}/{name}")


def open_folder(location: str | Path) -> Path | UrlFolder:
    """Open a path or URL as a folder without creating it.

    Raises:
        UserError: the URL's protocol is unknown, or its package is not installed.
    """
    if "://" not in str(location):
        return Path(location)
    filesystem, root = open_url(str(location))
    return Path(root) if is_local(filesystem) else UrlFolder(filesystem, root.rstrip("/"))


def open_url(url: str, **options: Any) -> tuple[Any, str]:
    """Return the fsspec file system of a URL and the path in it.

    Raises:
        UserError: the protocol is unknown, or its package is not installed.
    """
    import fsspec

    try:
        filesystem, root = fsspec.core.url_to_fs(url, **options)
    except (ValueError, ImportError) as error:
        raise UserError(
            f"{mask_secrets(url)}: cannot be opened ({error}); install the fsspec package of this protocol."
        ) from None
    return filesystem, str(root)


def mask_secrets(text: str) -> str:
    """Remove user, password, query and fragment from every URL in a text."""
    return re.sub(r"(://)(?:[^/\s'\"]*@)?([^\s?#'\"]*)(?:[?#][^\s'\")]*)?", r"\1\2", text)


def is_local(filesystem: Any) -> bool:
    """Whether an fsspec file system is the local one."""
    protocol = filesystem.protocol
    return "file" in (protocol if isinstance(protocol, tuple) else (protocol,))
