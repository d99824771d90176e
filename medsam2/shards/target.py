"""Where shards are: a folder of this machine, or any fsspec URL (`s3://bucket/shards`, `gs://`, `memory://`)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medsam2.errors import UserError


@dataclass(frozen=True)
class UrlFolder:
    """A flat folder behind a URL, whose files are copied whole.

    Attributes:
        filesystem: of fsspec. root: the folder's path in it.
    """

    filesystem: Any
    root: str

    def sizes(self) -> dict[str, int]:
        """Bytes of each file by its name; nothing where the folder does not exist."""
        self.filesystem.invalidate_cache()
        try:
            entries = self.filesystem.ls(self.root, detail=True)
        except FileNotFoundError:
            return {}
        return {entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry["size"] or 0 for entry in entries}

    def read(self, name: str) -> bytes:
        """The content of a file."""
        return bytes(self.filesystem.cat_file(f"{self.root}/{name}"))

    def put(self, file: Path) -> None:
        """Send a local file.

        Raises:
            UserError: it could not be sent.
        """
        try:
            self.filesystem.makedirs(self.root, exist_ok=True)
            self.filesystem.put_file(str(file), f"{self.root}/{file.name}")
        except Exception as error:  # each protocol has exceptions of its own
            raise UserError(
                f"{self.root}/{file.name}: could not be sent ({type(error).__name__}: {error}); run the same command "
                "again: what is there already is not sent again."
            ) from error

    def delete(self, name: str) -> None:
        """Delete a file."""
        self.filesystem.rm_file(f"{self.root}/{name}")


def open_folder(where: str | Path) -> Path | UrlFolder:
    """The folder of a path or URL; nothing is created.

    Raises:
        UserError: a URL whose protocol is not known, or whose package is not installed.
    """
    if "://" not in str(where):
        return Path(where)
    filesystem, root = open_url(str(where))
    return Path(root) if is_local(filesystem) else UrlFolder(filesystem, root.rstrip("/"))


def open_url(url: str, **options: Any) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it.

    Raises:
        UserError: the protocol is not known, or its package is not installed.
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
    """A text in which every URL is without user, password, query and fragment."""
    return re.sub(r"(://)(?:[^/\s'\"]*@)?([^\s?#'\"]*)(?:[?#][^\s'\")]*)?", r"\1\2", text)


def is_local(filesystem: Any) -> bool:
    """Whether an fsspec file system is this machine's own."""
    protocol = filesystem.protocol
    return "file" in (protocol if isinstance(protocol, tuple) else (protocol,))
