"""A file system of a few kilobytes, for what happens when it is full."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A tmpfs of `size` ("100k") at `folder`; the test is skipped where mounting is not permitted."""
    folder.mkdir()
    if mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)):
        pytest.skip("mounting a small file system is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def mount(*arguments: str) -> int:
    """The status of the `mount` command, 1 where there is none."""
    try:
        return subprocess.run(["mount", *arguments], capture_output=True).returncode
    except OSError:
        return 1
