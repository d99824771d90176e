"""Cases from shards and from raw data are the same cases."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from http_shards import HttpShards

from medsam2.cases.settings import read_settings
from medsam2.data.read.store import open_store
from medsam2.errors import UserError
from medsam2.evaluation.run.sources import list_cases, load_cases
from medsam2.shards.index import read_index, write_table


def test_raw_data_and_its_shards_give_the_same_cases(raw_folder: Path, shards: Path) -> None:
    raw = list_cases(raw_folder)
    stored = list_cases(shards, split="val")
    assert (raw.grid, stored.grid) == ("native", "stored")
    by_name = {(case.dataset, case.case): case for case in (raw.load(i) for i in range(raw.count))}
    for number in range(stored.count):
        case = stored.load(number)
        twin = by_name[case.dataset, case.case]
        assert torch.equal(case.frames, twin.frames)
        assert [case.mask(i).sum() for i in range(len(case.objects))] == [
            twin.mask(i).sum() for i in range(len(twin.objects))
        ]
        assert np.allclose(case.spacing, twin.spacing)
        assert (case.kind, case.modality, case.patient) == (twin.kind, twin.modality, twin.patient)
        assert case.content_hash == twin.content_hash != ""


def test_frames_are_channels_first_and_names_are_salted(shards: Path) -> None:
    cases = load_cases(shards, "val")
    assert {case.frames.shape[1] for case in cases} == {1, 3}
    for case in cases:
        assert case.frames.dtype == torch.uint8
        assert case.objects and all(case.mask(i).any() for i in range(len(case.objects)))
        assert "smith" not in case.case and "smith" not in case.patient


def test_the_limit_is_per_dataset(shards: Path) -> None:
    some = list_cases(shards, split="all", limit=1)
    assert some.count == len({some.load(i).dataset for i in range(some.count)})


def test_structures_are_filtered_and_a_misspelt_one_is_named(shards: Path) -> None:
    only = list_cases(shards, split="all", structures=("lesion",))
    assert {o.name for i in range(only.count) for o in only.load(i).objects} == {"lesion"}
    with pytest.raises(UserError, match="Did you mean 'lesion'"):
        list_cases(shards, split="all", structures=("leson",))


@pytest.mark.parametrize(("split", "what"), [("vall", "Did you mean 'val'"), ("test", "has the splits train, val")])
def test_a_split_that_does_not_exist_is_named_with_those_that_do(shards: Path, split: str, what: str) -> None:
    with pytest.raises(UserError, match=what):
        list_cases(shards, split=split)


def test_a_source_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such"):
        list_cases(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no case found"):
        list_cases(tmp_path)


def test_shards_behind_a_url_give_the_same_cases(shards: Path) -> None:
    with HttpShards(shards) as server:
        theirs = pickle.loads(pickle.dumps(server_cases := list_cases(server.url)))  # as worker processes get it
        ours = list_cases(shards)
        assert ours.count == theirs.count == server_cases.count > 0
        for number in range(ours.count):
            mine, other = ours.load(number), theirs.load(number)
            assert torch.equal(mine.frames, other.frames) and np.array_equal(mine.planes, other.planes)
        cases = load_cases(open_store(server.url))
        assert [case.case for case in cases] == [case.case for case in load_cases(shards)]


def test_a_yaml_configures_each_raw_dataset(raw_folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "sets.yaml"
    rules = "labels: {drop: [lesion], rename: {organ: liver}}"
    config.write_text(f"datasets: {{Dataset001*: {{modality: MR, {rules}}}, deep/scope: {{modality: XRAY}}}}")
    book = read_settings(config)
    listed = list_cases(raw_folder, limit=1, book=book)
    cases = {case.dataset: case for case in (listed.load(i) for i in range(listed.count))}
    assert {name: case.modality for name, case in cases.items()} == {
        "Dataset001_Test": "MR", "echo": "US", "recist": "CT", "scope": "XRAY",
    }  # fmt: skip
    assert [o.name for o in cases["Dataset001_Test"].objects] == ["liver"]


def test_what_is_for_raw_data_is_refused_for_shards(shards: Path) -> None:
    with pytest.raises(UserError, match="data.modality is for raw data"):
        list_cases(shards, modality="CT")


def test_cases_whose_keys_look_alike_have_names_of_their_own(shards: Path, tmp_path: Path) -> None:
    table = read_index(shards).table
    keys = ["a/b", "a-b", "a-b-2", "a/b", "k" * 300]
    alike = pa.concat_tables([table.slice(0, 1)] * len(keys)).set_column(0, "key", pa.array(keys))
    write_table(tmp_path, alike)
    names = list_cases(tmp_path, split="all").names()
    assert len({name.key for name in names}) == len(keys) and all(len(name.key) == 16 for name in names)
