from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medsam2.cases.case import CaseError
from medsam2.cases.layouts import find_cases, load_case
from medsam2.cases.settings import DatasetSettings


def test_a_video_has_colour_frames_masks_and_time(tmp_path: Path, write):
    case = load_case(find_cases(write.videos(tmp_path / "scope"))[0])
    assert case.image.shape == (10, 32, 48, 3)
    assert np.array_equal(case.planes[0], write.clip(0)[1])
    assert case.spacing == pytest.approx((0.04, 1, 1))
    assert case.modality == "ENDOSCOPY"


def test_unequal_numbers_of_frames_and_masks_are_refused(tmp_path: Path, write):
    folder = write.videos(tmp_path / "scope", clips=1)
    (folder / "masks" / "v0" / "00009.png").unlink()
    with pytest.raises(CaseError, match="9 masks for a video of 10 frames"):
        load_case(find_cases(folder)[0])


def mask_video(path: Path, mask: np.ndarray, codec: str, pixels: str) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = mask.shape[1], mask.shape[2], pixels
        for frame in mask:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="gray").reformat(format=pixels)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def test_a_mask_video_without_loss_keeps_its_labels(tmp_path: Path, write):
    folder = write.videos(tmp_path / "scope", clips=1)
    shutil.rmtree(folder / "masks" / "v0")
    mask_video(folder / "masks" / "v0.avi", write.clip(0)[1], "ffv1", "gray")
    case = load_case(find_cases(folder)[0])
    assert np.array_equal(case.planes[0], write.clip(0)[1])
    assert [label.name for label in case.labels] == ["instrument"]


def test_a_mask_video_with_loss_needs_a_threshold(tmp_path: Path, write):
    folder = write.videos(tmp_path / "scope", clips=1)
    shutil.rmtree(folder / "masks" / "v0")
    mask_video(folder / "masks" / "v0.mp4", write.clip(0)[1] * 255, "mpeg4", "yuv420p")
    ref = find_cases(folder)[0]
    with pytest.raises(CaseError, match=r"v0\.mp4: the mask holds values altered by a lossy format"):
        load_case(ref)
    case = load_case(replace(ref, settings=DatasetSettings(threshold=127)))
    assert (case.planes[0] != write.clip(0)[1]).mean() < 0.01


def test_a_mask_video_of_another_length_is_refused(tmp_path: Path, write):
    folder = write.videos(tmp_path / "scope", clips=1)
    shutil.rmtree(folder / "masks" / "v0")
    mask_video(folder / "masks" / "v0.avi", write.clip(0)[1][:7], "ffv1", "gray")
    with pytest.raises(CaseError, match=r"v0\.avi: 7 masks for a video of 10 frames"):
        load_case(find_cases(folder)[0])


@pytest.mark.parametrize("place", ["annotations.json", "masks/v0.json", "annotations/v0.json"])
def test_coco_annotations_are_masks(tmp_path: Path, write, place: str):
    folder = write.videos(tmp_path / "scope", clips=1)
    shutil.rmtree(folder / "masks")
    _, mask = write.clip(0)
    content = {
        "videos": [{"id": 1, "name": "v0"}],
        "images": [
            {"id": n, "file_name": f"v0/{n}.jpg", "frame_id": n, "video_id": 1, "height": 32, "width": 48}
            for n in range(10)
        ],
        "categories": [{"id": 3, "name": "polyp"}],
        "annotations": [
            {
                "image_id": n,
                "category_id": 3,
                "track_id": 1,
                "segmentation": [[5 + n, 8, 20 + n, 8, 20 + n, 20, 5 + n, 20]],
            }
            for n in range(10)
        ],
    }
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / place).write_text(json.dumps(content))
    case = load_case(find_cases(folder)[0])
    assert np.array_equal(case.planes[0], mask)
    assert [label.name for label in case.labels] == ["polyp"]


def test_folders_of_objects_are_masks(tmp_path: Path, write):
    folder = write.videos(tmp_path / "scope", clips=1)
    place = folder / "masks" / "v0"
    (place / "2").mkdir()
    for path in sorted(place.glob("*.png")):
        path.rename(place / "2" / path.name)
    case = load_case(find_cases(folder)[0])
    assert [label.name for label in case.labels] == ["object_2"]
    assert np.array_equal(case.planes[0], write.clip(0)[1])
