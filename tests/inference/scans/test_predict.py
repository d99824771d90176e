"""From files to mask files: equal scans in unequal storage give equal masks; nothing is lost, nothing is replaced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dicom_files import write_series

from medsam2.cases.case import Label
from medsam2.cases.formats import dicom_seg, frames, video
from medsam2.cases.formats.dicom_series import read as read_series
from medsam2.cases.formats.volume import read_grid
from medsam2.cases.geometry import align_mask
from medsam2.cases.settings import DatasetSettings
from medsam2.errors import UserError
from medsam2.inference.predictor import FrameResult
from medsam2.inference.scans.predict import PredictSettings, Written, memory_settings, predict_files
from medsam2.inference.scans.prompts import from_flags
from medsam2.inference.scans.scan import ScanSettings, open_scan
from medsam2.inference.scans.spool import open_spool

CT = ScanSettings(modality="CT")


def disk(shape: tuple[int, int, int] = (9, 48, 56)) -> tuple[np.ndarray, np.ndarray]:
    """A bright ball in dark noise, HU, and where it is."""
    z, y, x = np.indices(shape)
    inside = ((z - 4) * 3.0) ** 2 + (y - 20) ** 2 + (x - 30) ** 2 < 12**2
    noise = np.random.default_rng(1).normal(-60, 15, shape)
    return (noise + 180 * inside).astype(np.int16), inside


BOX = "4,18,8,42,32,ball"


def run(inputs: list[Path], out: Path, scan: ScanSettings = CT, prompts: Any = None, **more: Any) -> list[Written]:
    settings = PredictSettings(checkpoint="nano", out=out, scan=scan, **more)
    return list(predict_files(inputs, prompts or from_flags(boxes=[BOX]), settings))


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_one_scan_stored_in_two_orders_gives_one_mask_in_the_world(tmp_path: Path, write: Any) -> None:
    image, inside = disk()
    straight = write.volume(tmp_path / "a.nii.gz", image, (1.0, 1.0, 3.0), (5.0, 7.0, 9.0))
    other = write.volume(  # feet and left first
        tmp_path / "b.nrrd",
        image[::-1, :, ::-1].copy(),
        (1.0, 1.0, 3.0),
        (60.0, 7.0, 33.0),
        (-1, 0, 0, 0, 1, 0, 0, 0, -1),
    )
    (first,) = run([straight], tmp_path / "a_mask.nii.gz")
    flipped = from_flags(boxes=[f"{8 - 4},{55 - 42},8,{55 - 18},32,ball"])
    (second,) = run([other], tmp_path / "b_mask.nrrd", prompts=flipped)
    a, b = read_grid(tmp_path / "a_mask.nii.gz"), read_grid(tmp_path / "b_mask.nrrd")
    np.testing.assert_array_equal(a.array, b.array[::-1, :, ::-1])
    np.testing.assert_allclose(b.affine, read_grid(other).affine, atol=1e-4)
    assert dice(a.array > 0, inside) > 0.8, "and it is the ball"
    assert first.counts == second.counts == (np.count_nonzero(a.array),) and first.names == ("ball",)


def test_a_dicom_series_gives_a_dicom_seg_with_the_mask_that_its_nifti_gives(tmp_path: Path, write: Any) -> None:
    image, inside = disk()
    series = tmp_path / "series"
    write_series(series, image + 1000, spacing=(3.0, 1.0, 1.0))  # intercept -1000
    (written,) = run([series], tmp_path / "out", ScanSettings())
    assert written.files == (tmp_path / "out" / "series.dcm",) and not written.notes
    raster = read_series(series, DatasetSettings())
    mask = dicom_seg.read_mask(written.files[0], DatasetSettings())
    planes, _ = align_mask(mask, raster)
    assert mask.labels == (Label(1, "ball"),)
    nifti = write.volume(tmp_path / "same.nii.gz", image, (1.0, 1.0, 3.0), (-20.0, 30.0, 5.0))
    run([nifti], tmp_path / "same_mask.nii.gz")
    np.testing.assert_array_equal(planes[0], read_grid(tmp_path / "same_mask.nii.gz").array)
    assert dice(planes[0] > 0, inside) > 0.8


def clip_files(folder: Path, write: Any) -> tuple[Path, Path]:
    """One grey clip of a moving square as a folder of PNG and as a video without loss."""
    import av
    from PIL import Image

    clip = np.random.default_rng(2).integers(20, 50, (11, 48, 64), dtype=np.uint8)
    for t in range(11):
        clip[t, 12:30, 10 + t : 30 + t] += 150
    pictures = folder / "pictures"
    pictures.mkdir()
    for t, picture in enumerate(clip):
        Image.fromarray(picture).save(pictures / f"shot_{t}.png")  # shot_10 comes behind shot_9
    with av.open(str(folder / "clip.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=20)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "gray"
        for picture in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="gray")))
        container.mux(stream.encode())
    return pictures, folder / "clip.mkv"


def test_a_video_and_its_frames_give_the_same_masks_under_the_names_of_the_frames(tmp_path: Path, write: Any) -> None:
    pictures, movie = clip_files(tmp_path, write)
    prompts = from_flags(boxes=["5,15,12,34,29"])
    run([pictures], tmp_path / "a", ScanSettings(), prompts)
    run([movie], tmp_path / "b", ScanSettings(), prompts)
    a = frames.read_mask(tmp_path / "a", DatasetSettings()).planes[0]
    np.testing.assert_array_equal(a, frames.read_mask(tmp_path / "b", DatasetSettings()).planes[0])
    assert [p.name for p in frames.list_frames(tmp_path / "a")] == [f"shot_{t}.png" for t in range(11)]
    assert all(dice(a[t] > 0, _square(t)) > 0.8 for t in range(11)), "forward and backward from frame 5"
    run([movie], tmp_path / "o.mp4", ScanSettings(), prompts)
    drawn, rate = video.read_video(tmp_path / "o.mp4")
    assert len(drawn) == 11 and rate == pytest.approx(20)
    coloured = (drawn.max(-1).astype(int) - drawn.min(-1)) > 25
    assert all(dice(coloured[t], _square(t)) > 0.7 for t in range(11))


def _square(t: int) -> np.ndarray:
    inside = np.zeros((48, 64), bool)
    inside[12:30, 10 + t : 30 + t] = True
    return inside


def test_forward_reaches_nothing_before_the_prompt(tmp_path: Path, write: Any) -> None:
    pictures, _ = clip_files(tmp_path, write)
    run([pictures], tmp_path / "m.nii.gz", ScanSettings(), from_flags(boxes=["5,15,12,34,29"]), direction="forward")
    masks = read_grid(tmp_path / "m.nii.gz").array.any((1, 2))
    assert masks.tolist() == [False] * 5 + [True] * 6


def test_a_file_an_object_keeps_overlaps_that_one_label_map_resolves(tmp_path: Path, write: Any) -> None:
    image, _ = disk()
    path = write.volume(tmp_path / "scan.nii.gz", image, (1.0, 1.0, 3.0))
    prompts = from_flags(boxes=["4,18,8,42,32,whole", "4,24,14,36,26,in/side"])
    (apart,) = run([path], tmp_path / "apart", prompts=prompts, per_object=True)
    (joined,) = run([path], tmp_path / "joined.nii.gz", prompts=prompts)
    assert [p.name for p in apart.files] == ["whole.nii.gz", "in-side.nii.gz"]
    whole, inside = (read_grid(p).array for p in apart.files)
    labels = read_grid(tmp_path / "joined.nii.gz").array
    assert (whole & inside).any() and set(np.unique(whole)) == {0, 1}
    np.testing.assert_array_equal(labels > 0, (whole | inside) > 0)
    np.testing.assert_array_equal(labels[(whole > 0) & (inside == 0)], 1)
    np.testing.assert_array_equal(labels[(inside > 0) & (whole == 0)], 2)
    assert apart.counts == (whole.sum(), inside.sum())
    assert joined.counts == ((labels == 1).sum(), (labels == 2).sum())


def test_overlaps_go_to_the_higher_logit_also_between_the_way_forward_and_the_way_back() -> None:
    rng = np.random.default_rng(3)
    logits = torch.from_numpy(rng.normal(0, 3, (3, 4, 12, 10)).astype(np.float32))  # N T H W
    best = logits.amax(0)
    expected = np.where(best > 0, np.array([7, 300, 2])[logits.argmax(0)], 0)
    with open_spool((4, 12, 10), (7, 300, 2), separate=False) as spool:
        for frame in range(4):  # objects 0 and 2 first, object 1 on the way back
            assert spool.add(FrameResult(frame, (2, 0), logits[[2, 0], frame], torch.zeros(2)))
        for frame in (3, 2, 1, 0):
            assert not spool.add(FrameResult(frame, (1,), logits[[1], frame], torch.zeros(1)))
        for frame in range(4):
            np.testing.assert_array_equal(spool.labels(frame), expected[frame])
        assert list(spool.counts()) == [(expected == value).sum() for value in (7, 300, 2)]


@pytest.mark.parametrize(
    ("name", "content"),
    [("b.nii.gz", None), ("b.npz", b"PK\x03\x04 torn"), ("b.mp4", b"no video"), ("b.tiff", b"II*\0")],
)
def test_one_bad_input_does_not_end_the_others(tmp_path: Path, write: Any, name: str, content: bytes | None) -> None:
    image, _ = disk()
    good = [write.volume(tmp_path / f"{letter}.nii.gz", image[:5]) for letter in ("a", "c")]
    bad = tmp_path / name
    bad.write_bytes(good[0].read_bytes()[:3000] if content is None else content)
    results = run([good[0], bad, good[1]], tmp_path / "masks")
    assert [bool(entry.error) for entry in results] == [False, True, False]
    assert name in results[1].error
    assert sorted(p.name for p in (tmp_path / "masks").iterdir()) == ["a.nii.gz", "c.nii.gz"]


def test_a_reader_that_breaks_costs_its_input_alone(
    tmp_path: Path, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [write.volume(tmp_path / f"{letter}.nii.gz", disk()[0][:5]) for letter in "ab"]
    real = open_scan

    def broken(path: Path, settings: ScanSettings) -> Any:
        if path.name == "a.nii.gz":
            raise NotImplementedError("an odd header")
        return real(path, settings)

    monkeypatch.setattr("medsam2.inference.scans.predict.open_scan", broken)
    first, second = run(paths, tmp_path / "masks")
    assert "a.nii.gz: NotImplementedError at " in first.error and "an odd header" in first.error and not second.error


def test_a_picture_gives_one_png_and_a_clip_none_before_anything_is_predicted(
    tmp_path: Path, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    pictures, movie = clip_files(tmp_path, write)
    still = Image.open(pictures / "shot_4.png").convert("RGB")
    still.save(tmp_path / "still.png")
    prompts = from_flags(boxes=["0,14,12,33,29"])
    (written,) = run([tmp_path / "still.png"], tmp_path / "masks", ScanSettings(), prompts)
    assert written.files == (tmp_path / "masks" / "still.png",)
    masks = np.asarray(Image.open(written.files[0]))
    assert Image.open(written.files[0]).mode == "P" and dice(masks > 0, _square(4)) > 0.8
    monkeypatch.setattr("medsam2.inference.predictor.Predictor.stream", lambda *_: pytest.fail("hours for nothing"))
    (refused,) = run([movie], tmp_path / "mask.png", ScanSettings(), prompts)
    assert "has 11 slices or frames" in refused.error and not (tmp_path / "mask.png").exists()


def test_a_video_is_decoded_frame_by_frame_and_keeps_a_bounded_number(
    tmp_path: Path, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, movie = clip_files(tmp_path, write)
    monkeypatch.setattr("medsam2.cases.formats.video._decode", lambda *_: pytest.fail("decoded as a whole"))
    monkeypatch.setattr("medsam2.inference.frames.MAX_CACHED_FRAMES", 4)
    scan = open_scan(movie)
    assert scan.spacing[0] == pytest.approx(0.05) and scan.shape == (11, 48, 64) and scan.moving
    shown = [int(torch.as_tensor(scan.frames[t])[0, 20, 10 + t : 30 + t].min()) for t in (10, 3, 7, 0)]
    assert min(shown) > 150, "the square, in whatever order frames are asked for"


def test_deep_pictures_are_scaled_as_a_whole(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "deep").mkdir()
    clip = np.random.default_rng(0).integers(1, 4000, (3, 20, 24)).astype(np.uint16)
    for t, picture in enumerate(clip):
        Image.fromarray(picture).save(tmp_path / "deep" / f"{t}.png")
    scan = open_scan(tmp_path / "deep", ScanSettings(window=(0.0, 4000.0)))
    expected = np.rint(clip.astype(np.float32) * np.float32(255 / 4000))
    np.testing.assert_array_equal(np.asarray(scan.frames)[:, 0], expected)


def test_a_full_disk_is_one_sentence_and_leaves_no_half_file(
    tmp_path: Path, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write.volume(tmp_path / "scan.nii.gz", disk()[0])

    def full(where: Path, *_: Any) -> None:
        where.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(where))

    monkeypatch.setattr("medsam2.cases.outputs.volume.write_mask", full)
    (written,) = run([path], tmp_path / "mask.nrrd")
    assert written.error.endswith("No space left on device.") and [p.name for p in tmp_path.iterdir()] == [
        "scan.nii.gz"
    ]


def test_a_taken_place_is_noticed_before_the_model_is_loaded(tmp_path: Path, write: Any) -> None:
    path = write.volume(tmp_path / "scan.nii.gz", disk()[0])
    (tmp_path / "mask.nii.gz").write_bytes(b"precious")
    with pytest.raises(UserError, match="mask.nii.gz already exists; .* --force"):
        run([path], tmp_path / "mask.nii.gz")
    assert (tmp_path / "mask.nii.gz").read_bytes() == b"precious"
    run([path], tmp_path / "mask.nii.gz", force=True)
    assert read_grid(tmp_path / "mask.nii.gz").array.any()


def test_an_input_is_never_written_over_even_with_force(tmp_path: Path, write: Any) -> None:
    scan = write.volume(tmp_path / "scans" / "ball.nii.gz", disk()[0])
    pictures, _ = clip_files(tmp_path, write)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    clip = from_flags(boxes=["5,15,12,34,29"])
    for inputs, out, prompts, more in (
        ([scan], scan, None, {}),
        ([scan], tmp_path / "scans", None, {"format": "nifti"}),
        ([pictures], pictures, clip, {}),
        ([pictures], tmp_path, clip, {}),
        ([pictures / "shot_0.png"], pictures, from_flags(boxes=["0,14,12,33,29"]), {"format": "frames"}),
    ):
        with pytest.raises(UserError, match="would overwrite the input"):
            run(inputs, out, prompts=prompts, force=True, **more)
    (refused,) = run([scan], tmp_path / "scans", force=True, per_object=True)  # the object is called ball
    assert "would overwrite the input" in refused.error
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("out", "more", "message"),
    [
        ("mask.nii.gz", {"per_object": True}, "--per-object writes several files; give a folder|is one file, but"),
        ("mask.nii.gz", {"format": "nrrd"}, "has the ending of nifti, --format says nrrd"),
        ("masks", {"format": "nift"}, "Did you mean 'nifti'"),
        ("mask.nii.gz", {"memory": "sam3"}, "memory=sam3: .* has no such option; .*sam2.*Did you mean"),
        ("mask.nii.gz", {"device": "cda"}, "cda"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path, write: Any, out: str, more: dict[str, Any], message: str
) -> None:
    path = write.volume(tmp_path / "scan.nii.gz", disk()[0])
    with pytest.raises(UserError, match=message):
        run([path], tmp_path / out, **more)
    assert [entry.name for entry in tmp_path.iterdir()] == ["scan.nii.gz"]


def test_several_inputs_need_a_folder(tmp_path: Path, write: Any) -> None:
    paths = [write.volume(tmp_path / f"{n}.nrrd", disk()[0]) for n in "ab"]
    with pytest.raises(UserError, match="there are 2 inputs; give a folder"):
        run(paths, tmp_path / "mask.nrrd")
    with pytest.raises(UserError, match="no such file"):
        run([tmp_path / "absent.nrrd"], tmp_path / "mask.nrrd")


def test_corrections_of_a_json_change_the_mask_and_a_named_policy_predicts(tmp_path: Path, write: Any) -> None:
    path = write.volume(tmp_path / "scan.nii.gz", disk()[0], (1.0, 1.0, 3.0))
    rounds = [{"frame": 4, "box": [18, 8, 42, 32]}, {"frame": 4, "points": [[30, 20, 1], [22, 12, 0], [40, 30, 0]]}]
    masks = []
    for count in (1, 2):
        content = {"objects": [{"name": "ball", "prompts": rounds[:count]}]}
        (tmp_path / f"{count}.json").write_text(json.dumps(content))
        prompts = from_flags(file=tmp_path / f"{count}.json")
        run([path], tmp_path / f"{count}.nii.gz", prompts=prompts, memory="sam2")
        masks.append(read_grid(tmp_path / f"{count}.nii.gz").array)
    assert masks[0].any() and masks[1].any() and (masks[0] != masks[1]).any()
    pruned = memory_settings("pruned")
    assert pruned is not None and pruned.policy == "pruned" and memory_settings("") is None


def test_an_existing_mask_is_carried_on_under_its_own_value(tmp_path: Path, write: Any) -> None:
    image, inside = disk()
    path = write.volume(tmp_path / "scan.nii.gz", image, (1.0, 1.0, 3.0))
    one_slice = np.zeros(image.shape, np.uint8)
    one_slice[4][inside[4]] = 6
    mask = write.volume(tmp_path / "slice.nii.gz", one_slice, (1.0, 1.0, 3.0))
    (written,) = run([path], tmp_path / "mask.nii.gz", prompts=from_flags(masks=[mask]))
    masks = read_grid(tmp_path / "mask.nii.gz").array
    assert set(np.unique(masks)) == {0, 6} and written.names == ("label_6",)
    assert dice(masks == 6, inside) > 0.8 and dice(masks[4] == 6, inside[4]) > 0.9


def test_real_scans_are_written_back_on_their_own_grids(tmp_path: Path, test_data: Path) -> None:
    mr = test_data / "mri" / "tptbox"
    scans = [p for p in (*sorted(mr.glob("*.nii.gz")), test_data / "mri/pyradiomics/brain1_image.nrrd") if p.is_file()]
    scan = next(p for p in scans if "msk" not in p.name)
    grid = read_grid(scan)
    z, y, x = (side // 2 for side in grid.array.shape)
    prompts = from_flags(boxes=[f"{z},{x - 8},{y - 8},{x + 8},{y + 8}"])
    run([scan], tmp_path / "mask.nrrd", ScanSettings(modality="MR"), prompts)
    masks = read_grid(tmp_path / "mask.nrrd")
    assert masks.array.shape == grid.array.shape and masks.array[z].any()
    np.testing.assert_allclose(masks.affine, grid.affine, atol=1e-3)


def test_a_real_dicom_series_gives_a_dicom_seg_that_its_slices_own(tmp_path: Path, test_data: Path) -> None:
    import highdicom
    import pydicom

    slices = sorted((test_data / "ct" / "dicom_seg" / "dcmqi").glob("0?.dcm"))
    if len(slices) != 3:
        pytest.skip(f"no real DICOM series at {test_data}/ct/dicom_seg/dcmqi")
    (tmp_path / "series").mkdir()
    for path in slices:
        (tmp_path / "series" / path.name).write_bytes(path.read_bytes())
    prompts = from_flags(boxes=["1,100,150,260,330,liver"])
    (written,) = run([tmp_path / "series"], tmp_path / "liver.dcm", ScanSettings(), prompts)
    assert not written.error
    raster = read_series(tmp_path / "series", DatasetSettings())
    planes, _ = align_mask(dicom_seg.read_mask(tmp_path / "liver.dcm", DatasetSettings()), raster)
    assert planes[0].shape == raster.array.shape and int((planes[0] == 1).sum()) == written.counts[0] > 0
    seg = highdicom.seg.segread(tmp_path / "liver.dcm")
    headers = [pydicom.dcmread(p, stop_before_pixels=True) for p in slices]
    assert {str(entry[2]) for entry in seg.get_source_image_uids()} == {str(h.SOPInstanceUID) for h in headers}
    assert seg.StudyInstanceUID == headers[0].StudyInstanceUID and seg.PatientID == headers[0].PatientID


def test_a_real_series_without_identifiers_is_refused_as_dicom_seg_and_written_as_nifti(
    tmp_path: Path, test_data: Path
) -> None:
    series = test_data / "ct" / "totalsegmentator" / "example_ct_dicom"
    if not series.is_dir():
        pytest.skip(f"no real DICOM series at {series}")
    prompts = from_flags(boxes=["9,150,180,250,300,liver"])
    (refused,) = run([series], tmp_path / "liver.dcm", ScanSettings(), prompts)
    assert "StudyInstanceUID" in refused.error and "--format nifti" in refused.error
    (written,) = run([series], tmp_path / "liver.nii.gz", ScanSettings(), prompts)
    raster = read_series(series, DatasetSettings())
    masks = read_grid(tmp_path / "liver.nii.gz")
    assert masks.array.shape == raster.array.shape and masks.array.sum() == written.counts[0] > 0
    np.testing.assert_allclose(masks.affine, raster.affine, atol=1e-3)
