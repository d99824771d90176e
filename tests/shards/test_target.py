from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest

from medsam2.errors import UserError
from medsam2.shards.target import Target, open_target


@pytest.fixture(params=["folder", "memory://", "file://"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Target:
    """An empty place of each kind."""
    out = {"folder": str(tmp_path / "s"), "file://": f"file://{tmp_path}/s"}.get(request.param, f"memory://{uuid4()}/s")
    return open_target(out)


def test_what_is_written_is_there_under_its_name(target: Target, tmp_path: Path):
    assert target.names() == []
    assert target.size("a.tar") is None
    with target.write("a.tar") as file:
        file.write(b"content")
    with target.write("index.json") as file:
        file.write(b"{}")
    assert target.names() == ["a.tar", "index.json"]
    assert (target.size("a.tar"), target.read("a.tar")) == (7, b"content")
    target.copy_to("a.tar", tmp_path / "copy.tar")
    assert (tmp_path / "copy.tar").read_bytes() == b"content"
    with target.write("a.tar") as file:
        file.write(b"other")
    assert target.read("a.tar") == b"other"
    target.delete("a.tar")
    assert target.names() == ["index.json"]


def test_a_file_is_whole_or_absent(target: Target):
    with pytest.raises(RuntimeError), target.write("a.tar") as file:
        file.write(b"half of it")
        raise RuntimeError
    assert target.names() == []
    with target.write("a.tar") as file:
        file.write(b"whole")
    with pytest.raises(RuntimeError), target.write("a.tar") as file:
        file.write(b"half of it")
        raise RuntimeError
    assert target.read("a.tar") == b"whole"
    assert target.names() == ["a.tar"]


def test_opening_creates_nothing_and_local_urls_are_folders(tmp_path: Path):
    assert open_target(tmp_path / "new").local == tmp_path / "new"
    assert open_target(f"file://{tmp_path}/new").local == tmp_path / "new"
    assert open_target("memory://somewhere/shards").local is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["s4://bucket/shards", "gdrive-of-mine://x"])
def test_an_unknown_protocol_is_refused_with_what_to_install(url: str):
    with pytest.raises(UserError, match=f"{url}: cannot be opened .* install the fsspec package"):
        open_target(url)
