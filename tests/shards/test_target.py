from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest

from medsam2.errors import UserError
from medsam2.shards.target import UrlFolder, open_folder


def test_files_are_sent_listed_read_and_deleted(tmp_path: Path):
    folder = open_folder(f"memory://{uuid4()}/s")
    assert isinstance(folder, UrlFolder) and folder.sizes() == {}
    (tmp_path / "a.tar").write_bytes(b"content")
    folder.put(tmp_path / "a.tar")
    assert folder.sizes() == {"a.tar": 7} and folder.read("a.tar") == b"content"
    folder.delete("a.tar")
    assert folder.sizes() == {}


def test_opening_creates_nothing_and_local_urls_are_folders(tmp_path: Path):
    assert open_folder(tmp_path / "new") == open_folder(f"file://{tmp_path}/new") == tmp_path / "new"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["s4://bucket/shards", "gdrive-of-mine://x"])
def test_an_unknown_protocol_is_refused_with_what_to_install(url: str):
    with pytest.raises(UserError, match=f"{url}: cannot be opened .* install the fsspec package"):
        open_folder(url)
