"""The `data.cache` group of the configuration, validated."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field

from medsam2.data.strict import Strict


class CacheSettings(Strict):
    """The local cache of shards that lie behind a URL (s3://, gs://, https://, memory:// ...).

    Attributes:
        mode: "shards": they are fetched whole, and kept for the next clips; "ranges": only what a clip needs is
            fetched, each time, and nothing but the index is kept: `size_gb` and `ahead` mean nothing then.
        folder: where fetched shards are kept; one folder may serve several runs and all ranks of a machine.
            None: `$MEDSAM2_CACHE`, else `~/.cache/medsam2/shards`.
        size_gb: the most bytes that the shards in it take, in 10**9; the least recently used go first.
        ahead: loader steps of the plan whose shards are fetched before they are needed.
        attempts: how often a failing fetch is tried, with growing pauses.
    """

    mode: Literal["shards", "ranges"] = "shards"
    folder: Path | None = None
    size_gb: float = Field(default=50.0, gt=0.0)
    ahead: int = Field(default=64, ge=0)
    attempts: int = Field(default=4, ge=1)


def default_folder() -> Path:
    """`$MEDSAM2_CACHE`, else `~/.cache/medsam2/shards`."""
    own = os.environ.get("MEDSAM2_CACHE")
    return Path(own) if own else Path.home() / ".cache" / "medsam2" / "shards"
