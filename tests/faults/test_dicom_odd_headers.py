"""Header values of the wrong kind: the file is named, what it says is not."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from dicom_files import US, header, pixels, write_seg, write_series

from medsam2.cases.case import CaseError
from medsam2.cases.formats import dicom_multiframe, dicom_seg
from medsam2.cases.layouts import find_cases, load_case
from medsam2.cases.settings import DatasetSettings

STORED = np.random.default_rng(0).integers(0, 3000, (5, 16, 18)).astype(np.uint16)


def say_text(path: Path, key: str, text: str, kind: str = "DS") -> None:
    """Write `text` where the file should hold a number or a UID, as a careless export does."""
    import pydicom

    dataset = pydicom.dcmread(path)
    dataset[key] = pydicom.DataElement(key, "LO", text)
    dataset.save_as(path)
    tag = pydicom.tag.Tag(key)
    mark = tag.group.to_bytes(2, "little") + tag.elem.to_bytes(2, "little")
    path.write_bytes(path.read_bytes().replace(mark + b"LO", mark + kind.encode()))


@pytest.mark.parametrize("key", ["ImagePositionPatient", "PixelSpacing", "RescaleSlope"])
def test_text_where_a_number_belongs_is_refused_and_not_repeated(key: str, tmp_path: Path):
    slices = write_series(tmp_path, STORED)
    write_seg(tmp_path / "seg.dcm", slices, {"organ": np.ones(STORED.shape, bool)})
    say_text(slices[2], key, "CANARY^NAME")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (ref,) = find_cases(tmp_path)
        with pytest.raises(CaseError, match=slices[2].name) as found:
            load_case(ref)
    assert "CANARY" not in str(found.value) + "".join(str(entry.message) for entry in caught)


def test_a_uid_that_is_text_is_in_no_warning(tmp_path: Path):
    for path in write_series(tmp_path, STORED):
        say_text(path, "SeriesInstanceUID", "CANARY^NAME", "UI")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (ref,) = find_cases(tmp_path)
    assert not any("CANARY" in text for text in (ref.case_id, ref.problem, *(str(w.message) for w in caught)))


def test_frames_in_monochrome1_are_turned_the_right_way_round(tmp_path: Path):
    frames = np.arange(240, dtype=np.uint8).reshape(2, 10, 12)
    pixels(header("1", US, "US"), frames, "MONOCHROME1").save_as(tmp_path / "us.dcm", enforce_file_format=True)
    assert np.array_equal(dicom_multiframe.read(tmp_path / "us.dcm", DatasetSettings()).array, 255 - frames)


def test_tiles_of_a_whole_slide_are_no_clip(tmp_path: Path):
    tiles = np.zeros((4, 10, 12, 3), np.uint8)
    slide = header("1", "1.2.840.10008.5.1.4.1.1.77.1.6", "SM")
    pixels(slide, tiles, "RGB").save_as(tmp_path / "sm.dcm", enforce_file_format=True)
    with pytest.raises(CaseError, match="whole slide .* TIFF"):
        dicom_multiframe.read(tmp_path / "sm.dcm", DatasetSettings())


def test_segments_are_unpacked_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import highdicom

    masks = {f"s{n}": np.zeros(STORED.shape, bool) for n in range(8)}
    for n, mask in enumerate(masks.values()):
        mask[:, 2 * n : 2 * n + 2] = True
    path = write_seg(tmp_path / "seg.dcm", write_series(tmp_path / "ct", STORED), masks)
    asked: list[list[int]] = []
    whole = highdicom.seg.Segmentation.get_volume

    def counted(self, *args, **kwargs):
        asked.append(kwargs["segment_numbers"])
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(highdicom.seg.Segmentation, "get_volume", counted)
    found = dicom_seg.read_mask(path, DatasetSettings())
    assert asked == [[n] for n in range(1, 9)]
    assert found.planes.shape[0] == 1
    for label, mask in zip(found.labels, masks.values(), strict=True):
        assert np.array_equal(found.planes[label.plane] == label.id, mask), label.name
