"""Shards in an object store: sent once, the index last; what an interrupted run leaves."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from medsam2.errors import UserError
from medsam2.shards.prepare.folder import open_output, source_state
from medsam2.shards.prepare.plan import make_plan
from medsam2.shards.prepare.publish import plan_shards
from medsam2.shards.prepare.run import PrepareOptions, prepare
from medsam2.shards.prepare.stage import StagedCase

OPTIONS = PrepareOptions(shard_bytes=100_000)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def url() -> str:
    return f"memory://{uuid4()}/shards"


@pytest.fixture
def local(tmp_path: Path, raw_folder: Path) -> dict[str, bytes]:
    """The same data prepared into a folder."""
    prepare(raw_folder, tmp_path / "local", OPTIONS)
    return {p.name: p.read_bytes() for p in (tmp_path / "local").iterdir()}


def stored(url: str) -> dict[str, bytes]:
    filesystem, root = fsspec.core.url_to_fs(url)
    if not filesystem.exists(root):
        return {}
    return {name.rsplit("/", 1)[-1]: filesystem.cat_file(name) for name in filesystem.ls(root, detail=False)}


class Sending:
    """Counts the files that a store takes, and fails where it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.fail_at: int | str | None = None
        original = MemoryFileSystem.put_file

        def put_file(filesystem: Any, lpath: str, rpath: str, **more: Any) -> Any:
            name = rpath.rsplit("/", 1)[-1]
            if self.fail_at in (len(self.names), name):
                with filesystem.open(rpath, "wb") as file:  # a store without transactions keeps half of it
                    file.write(Path(lpath).read_bytes()[:1000])
                raise OSError("connection reset by peer")
            self.names.append(name)
            return original(filesystem, lpath, rpath, **more)

        monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)


@pytest.fixture
def sending(monkeypatch: pytest.MonkeyPatch) -> Sending:
    return Sending(monkeypatch)


def test_a_url_gets_the_bytes_of_a_folder_and_the_index_last(
    url: str, raw_folder: Path, tmp_path: Path, local, sending
):
    result = prepare(raw_folder, url, OPTIONS)
    assert result.where == url
    assert stored(url) == local
    assert sending.names[-3:] == ["sources.json", "index.json", "index.arrow"]
    assert len(local) == len(sending.names) > 6
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == []
    assert prepare(raw_folder, url, OPTIONS).already_complete
    assert len(sending.names) == len(local)


def test_an_interrupted_upload_publishes_nothing_and_sends_the_rest_later(url: str, raw_folder: Path, local, sending):
    sending.fail_at = 3
    with pytest.raises(UserError, match=r"cannot be uploaded .*connection reset.* not sent again"):
        prepare(raw_folder, url, OPTIONS)
    assert not {"index.json", "index.arrow"} & set(stored(url))
    first = list(sending.names)
    sending.fail_at = None
    prepare(raw_folder, url, OPTIONS)
    assert stored(url) == local
    assert len(first) == 3
    assert sorted(sending.names) == sorted(local)  # none was sent twice


def test_a_shard_of_other_sources_is_sent_again_although_its_size_is_the_same(url: str, tmp_path: Path, write, sending):
    source = write.nnunet(tmp_path / "raw" / "Dataset001", cases=2)
    sending.fail_at = "index.json"
    with pytest.raises(UserError):
        prepare(source, url, OPTIONS)
    before = {name: content for name, content in stored(url).items() if name.endswith(".tar")}
    path = source / "dataset.json"
    path.write_text(path.read_text().replace("lesion", "tumour"))  # as long a name
    sending.fail_at = None
    result = prepare(source, url, OPTIONS)
    after = stored(url)
    assert {name: len(after[name]) for name in before} == {name: len(before[name]) for name in before}
    assert all(after[name] != before[name] for name in before)
    for name, entry in result.summary["shards"].items():
        assert hashlib.sha256(after[name]).hexdigest() == entry["sha256"]


@pytest.mark.parametrize("name", ["index.json", "index.arrow"])
def test_an_upload_of_the_index_that_fails_is_made_up_for(url: str, raw_folder: Path, local, sending, name: str):
    sending.fail_at = name
    with pytest.raises(UserError, match=f"{name}: cannot be uploaded"):
        prepare(raw_folder, url, OPTIONS)
    sending.fail_at = None
    if name == "index.arrow":
        # this store keeps half a file, which no real object store does: it must not be taken for an index
        fsspec.core.url_to_fs(url)[0].rm_file(f"{fsspec.core.url_to_fs(url)[1]}/index.arrow")
    prepare(raw_folder, url, OPTIONS)
    assert stored(url) == local


def test_a_shard_that_is_not_what_was_sent_is_sent_again(url: str, raw_folder: Path, local, sending):
    sending.fail_at = "index.json"
    with pytest.raises(UserError):
        prepare(raw_folder, url, OPTIONS)
    first = sending.names[0]
    filesystem, root = fsspec.core.url_to_fs(url)
    filesystem.pipe_file(f"{root}/{first}", b"cut short")
    sending.fail_at = None
    prepare(raw_folder, url, OPTIONS)
    assert stored(url) == local
    assert sending.names.count(first) == 2


def test_added_cases_are_refused_at_a_url_as_in_a_folder(url: str, tmp_path: Path, write):
    write.nnunet(tmp_path / "raw" / "Dataset001")
    prepare(tmp_path / "raw", url, OPTIONS)
    before = stored(url)
    write.davis(tmp_path / "raw" / "echo")
    with pytest.raises(UserError, match="2 added"):
        prepare(tmp_path / "raw", url, OPTIONS)
    assert stored(url) == before


def test_names_of_failed_cases_stay_on_this_machine(url: str, tmp_path: Path, write):
    folder = write.nnunet(tmp_path / "raw" / "Dataset001")
    (folder / "labelsTr" / "smith_002.nii.gz").write_bytes(b"")
    result = prepare(folder, url, OPTIONS)
    assert "failures.jsonl" not in stored(url)
    assert tmp_path / "cache" in result.failures_file.parents
    assert json.loads(result.failures_file.read_text())["case"] == "smith_002"
    assert list(result.failures_file.parent.iterdir()) == [result.failures_file]
    assert not any(b"smith_002" in content for content in stored(url).values())


def test_a_store_with_something_else_in_it_is_refused(url: str, raw_folder: Path):
    filesystem, root = fsspec.core.url_to_fs(url)
    filesystem.pipe_file(f"{root}/thesis.pdf", b"precious")
    with pytest.raises(UserError, match=f"{url} already exists and is not empty"):
        prepare(raw_folder, url, OPTIONS)
    assert stored(url) == {"thesis.pdf": b"precious"}


def test_each_target_has_a_staging_folder_of_its_own_and_a_given_one_is_never_emptied(
    tmp_path: Path, url: str, raw_folder: Path
):
    mine = tmp_path / "staging"
    mine.mkdir()
    (mine / "thesis.tex").write_text("precious")
    options = replace(OPTIONS, staging=mine)
    folders = {open_output(out, mine).staging for out in (url, f"{url}/2", tmp_path / "a", tmp_path / "b")}
    assert len(folders) == 4
    assert all(folder.parent == mine for folder in folders)
    prepare(raw_folder, url, options)
    prepare(raw_folder, tmp_path / "a", options)
    assert [p.name for p in mine.iterdir()] == ["thesis.tex"]
    assert not (tmp_path / "a" / ".staging").exists()


def test_shards_hold_cases_in_the_order_of_their_content(raw_folder: Path):
    jobs = make_plan(raw_folder / "Dataset001_Test", PrepareOptions()).jobs
    rows = [{"objects": [{"pixels": [7]}], "content_hash": content} for content in ("2", "1", "3", "1")]
    staged = [StagedCase(job, source_state(job), (row,), size=60) for job, row in zip(jobs, rows, strict=True)]
    plan = plan_shards(staged, 1)
    assert list(plan.items()) == list(plan_shards(staged[::-1], 1).items())
    of_split = [m for split in ("train", "val") for m in (1, 3, 0, 2) if jobs[m].split == split]
    assert [cases[0] for cases in plan.values()] == [staged[number] for number in of_split]
    assert all(len(cases) == 1 for cases in plan.values())
