"""Where a folder of shards is: a local folder, or any fsspec URL behind a local cache.

The rest of `data/` sees local files only: `path` gives the file of a shard, fetched first where it is remote.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol


class ShardStore(Protocol):
    """Access to one folder of shards. Picklable: workers that are started by spawn open it anew."""

    where: str
    """The folder or URL as it was given."""
    remote: bool
    index_folder: Path
    """A local folder that holds `index.arrow` (and `index.json` where there is one)."""

    def path(self, shard: str) -> Path:
        """A local file with the whole shard.

        Raises:
            OSError: it does not exist, or could not be fetched.
        """
        ...

    def fetch_ahead(self, shards: Sequence[str]) -> None:
        """Shards that will be needed soon, the next first; returns at once, does nothing where all is local."""
        ...


class LocalStore:
    """A folder of this machine."""

    remote = False

    def __init__(self, folder: Path | str) -> None:
        self.where = str(folder)
        self.index_folder = Path(folder)

    def path(self, shard: str) -> Path:
        return self.index_folder / shard

    def fetch_ahead(self, shards: Sequence[str]) -> None:
        """Nothing to do."""
