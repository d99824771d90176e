from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medsam2.cases.case import Case, CaseError
from medsam2.cases.formats.registry import find_format
from medsam2.cases.geometry import CaseWarning
from medsam2.cases.layouts import find_cases, layouts, load_case
from medsam2.cases.layouts.registry import layouts_at
from medsam2.errors import UserError


def scans(write, folder: Path, count: int = 2) -> Path:
    for number in range(count):
        image, mask = write.scan(number)
        write.volume(folder / f"img{number}.nii.gz", image)
        write.volume(folder / f"seg{number}.nii.gz", mask)
        write.volume(folder / f"lesion{number}.nii.gz", (mask == 2).astype(np.uint8) * 255)
        write.volume(folder / f"organ{number}.nii.gz", (mask > 0).astype(np.uint8))
    return folder


def csv_file(folder: Path, text: str, name: str = "manifest.csv") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def region(case: Case, name: str) -> np.ndarray:
    label = next(label for label in case.labels if label.name == name)
    return case.planes[label.plane] == label.id


def test_every_column_reaches_the_case(tmp_path: Path, write):
    scans(write, tmp_path)
    csv_file(
        tmp_path,
        "image,mask,case,patient,dataset,modality,split,labels,fps,spacing_mm,recist\n"
        'img1.nii.gz,seg1.nii.gz,first,p7,livers,mri,validation,"{""organ"": 1, ""lesion"": 2}",20,0.5,'
        '"[[5, 14, 12, 19, 15, ""lesion""]]"\n',
    )
    (ref,) = find_cases(tmp_path)
    assert (ref.dataset, ref.case_id, ref.patient_id, ref.modality, ref.split) == ("livers", "first", "p7", "MR", "val")
    assert ref.labels == (((1,), "organ"), ((2,), "lesion"))
    assert ref.spacing == (0.05, 0.5)
    assert ref.recist == ((5, 14.0, 12.0, 19.0, 15.0, "lesion"),)
    image, mask = write.scan(1)
    case = load_case(ref)
    assert np.array_equal(case.image, image)
    assert np.array_equal(region(case, "lesion"), mask == 2)


def test_names_have_defaults(tmp_path: Path, write):
    scans(write, tmp_path / "livers")
    csv_file(tmp_path / "livers", "image,mask,modality\nimg0.nii.gz,seg0.nii.gz,CT\n")
    (ref,) = find_cases(tmp_path)
    assert (ref.dataset, ref.case_id, ref.patient_id, ref.split) == ("livers", "img0", "img0", "")


def test_images_of_one_name_are_told_apart_by_their_folders(tmp_path: Path, write):
    scans(write, tmp_path / "s1", 1)
    scans(write, tmp_path / "s2", 1)
    csv_file(tmp_path, "image,mask\ns1/img0.nii.gz,s1/seg0.nii.gz\ns2/img0.nii.gz,s2/seg0.nii.gz\n")
    assert [ref.case_id for ref in find_cases(tmp_path)] == ["s1_img0", "s2_img0"]


@pytest.mark.parametrize(
    "row",
    [
        'image,mask,modality\nimg0.nii.gz,"organ=organ0.nii.gz; lesion = lesion0.nii.gz",CT\n',
        "image;mask;modality\nimg0.nii.gz;organ=organ0.nii.gz,lesion=lesion0.nii.gz;CT\n".replace(
            "organ=organ0.nii.gz,lesion=lesion0.nii.gz", '"organ=organ0.nii.gz;lesion=lesion0.nii.gz"'
        ),
    ],
)
def test_named_masks_are_one_structure_each_and_may_overlap(tmp_path: Path, write, row: str):
    csv_file(scans(write, tmp_path), row)
    case = load_case(find_cases(tmp_path)[0])
    mask = write.scan(0)[1]
    assert {label.name for label in case.labels} == {"organ", "lesion"}
    assert np.array_equal(region(case, "organ"), mask > 0)
    assert np.array_equal(region(case, "lesion"), mask == 2)


def test_masks_without_names_are_named_by_their_files(tmp_path: Path, write):
    csv_file(scans(write, tmp_path), "image,mask,modality\nimg0.nii.gz,organ0.nii.gz;lesion0.nii.gz,CT\n")
    case = load_case(find_cases(tmp_path)[0])
    assert {label.name for label in case.labels} == {"organ0", "lesion0"}


def test_json_lines_say_the_same(tmp_path: Path, write):
    scans(write, tmp_path)
    rows = [
        {"image": "img0.nii.gz", "mask": "seg0.nii.gz", "modality": "CT", "labels": {"all": [1, 2]}, "patient": 7},
        {"image": "img1.nii.gz", "mask": {"organ": "organ1.nii.gz"}, "modality": "CT", "split": None},
    ]
    csv_file(tmp_path, "\n\n".join(json.dumps(row) for row in rows), "manifest.jsonl")
    first, second = find_cases(tmp_path)
    assert first.patient_id == "7"
    assert np.array_equal(region(load_case(first), "all"), write.scan(0)[1] > 0)
    assert [label.name for label in load_case(second).labels] == ["organ"]


def test_a_manifest_of_any_name_can_be_the_source_and_paths_may_be_absolute(tmp_path: Path, write):
    scans(write, tmp_path / "data")
    text = f"image,mask,modality\n{tmp_path}/data/img0.nii.gz,../data/seg0.nii.gz,CT\n"
    path = csv_file(tmp_path / "lists", "\ufeff" + text, "mine.csv")
    (ref,) = find_cases(path)
    assert ref.dataset == "lists"
    load_case(ref)


def test_a_missing_file_and_a_missing_mask_fail_by_name_and_alone(tmp_path: Path, write):
    scans(write, tmp_path)
    csv_file(
        tmp_path,
        "image,mask,modality\nimg0.nii.gz,seg0.nii.gz,CT\nimg1.nii.gz,seg9.nii.gz,CT\nimg9.nii.gz,,CT\n\n",
    )
    refs = find_cases(tmp_path)
    load_case(refs[0])
    with pytest.raises(CaseError, match=r"seg9\.nii\.gz: no such file or folder, but .*manifest\.csv line 3"):
        load_case(refs[1])
    with pytest.raises(CaseError, match=r"line 4: img9\.nii\.gz has no mask"):
        load_case(refs[2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,mask,modalty\na,b,CT\n", "line 1: unknown column 'modalty'.*Did you mean 'modality'"),
        ("images,mask\na,b\n", "the column image is missing; there are images, mask. Did you mean 'images'"),
        ("", "the column image is missing; there are no columns"),
        ("image,mask\n", "no rows; expected one per case"),
        ("image,mask,mask\na,b,c\n", "a column occurs twice"),
        ("image,mask\na,b,c\n", "line 2: more cells than columns"),
        ("image,mask,modality\na,b,CTT\n", "line 2: modality: not one of CT.*Did you mean 'CT'"),
        ("image,mask,split\na,b,trian\n", "line 2: split: not one of train, val, test.* Did you mean 'train'"),
        ("image,mask,fps\na,b,-3\n", "line 2: fps: .*greater than 0"),
        ("image,mask,labels\na,b,{\n", "line 2: labels: not valid json"),
        ('image,mask,labels\na,b,"{""x"": ""y""}"\n', "line 2: labels: 'x': 'y' is neither"),
        ("image,mask\na,liver=b;c\n", "line 2: mask 'liver=b;c': give every file a name"),
        ("image,mask\na,liver=b;liver=c\n", "line 2: mask .* a name occurs twice"),
        ('image,mask,labels\na,liver=b,"{""x"": 1}"\n', "line 2: labels and name=path masks both"),
        ('image,mask,recist\na,b,"[[1, 2]]"\n', "line 2: recist"),
        ("image,mask\n,b\n", "line 2: image: Field required"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path: Path, text: str, message: str):
    csv_file(tmp_path, text)
    with pytest.raises(UserError, match=message):
        find_cases(tmp_path)


def test_two_manifests_in_a_folder_are_refused(tmp_path: Path):
    csv_file(tmp_path, "image,mask\na,b\n")
    csv_file(tmp_path, '{"image": "a", "mask": "b"}', "manifest.jsonl")
    with pytest.raises(UserError, match="remove one"):
        find_cases(tmp_path)


def test_broken_json_lines_are_named(tmp_path: Path):
    csv_file(tmp_path, '{"image": "a", "mask": "b"}\n{', "manifest.jsonl")
    with pytest.raises(UserError, match="line 2: not valid json"):
        find_cases(tmp_path)


# every layout's sample folder


def sample_nnunet(write, folder: Path) -> str:
    write.nnunet(folder, cases=1)
    return "nnunet_raw"


def sample_nnunet_1(write, folder: Path) -> str:
    write.nnunet(folder, cases=1)
    entries = [{"image": "./imagesTr/smith_000.nii.gz", "label": "./labelsTr/smith_000.nii.gz"}]
    description = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "a", "2": "b"}, "training": entries}
    (folder / "dataset.json").write_text(json.dumps(description))
    return "nnunet_raw"


def sample_msd(write, folder: Path) -> str:
    image, mask = write.scan(0)
    write.volume(folder / "imagesTr" / "liver_0.nii.gz", image)
    write.volume(folder / "labelsTr" / "liver_0.nii.gz", mask)
    entries = [{"image": "./imagesTr/liver_0.nii.gz", "label": "./labelsTr/liver_0.nii.gz"}]
    description = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "a", "2": "b"}, "training": entries}
    (folder / "dataset.json").write_text(json.dumps(description))
    return "msd"


def sample_msd_with_folds(write, folder: Path) -> str:
    name = sample_msd(write, folder)
    entries = [{"image": "imagesTr/liver_0.nii.gz", "label": "labelsTr/liver_0.nii.gz", "fold": 0}]
    (folder / "folds.json").write_text(json.dumps({"training": entries}))
    return name


def sample_datalist(write, folder: Path) -> str:
    scans(write, folder, 1)
    entries = [{"image": "img0.nii.gz", "label": "seg0.nii.gz"}]
    (folder / "dataset.json").write_text(json.dumps({"training": entries}))
    return "monai_datalist"


def sample_totalsegmentator(write, folder: Path) -> str:
    image, mask = write.scan(0)
    write.volume(folder / "s0001" / "ct.nii.gz", image)
    write.volume(folder / "s0001" / "segmentations" / "liver.nii.gz", (mask > 0).astype(np.uint8))
    return "totalsegmentator"


def sample_datalist_of_subjects(write, folder: Path) -> str:
    sample_totalsegmentator(write, folder)
    entries = [{"image": "s0001/ct.nii.gz", "label": "s0001/segmentations/liver.nii.gz"}]
    (folder / "list.json").write_text(json.dumps({"training": entries}))
    return "monai_datalist"


def sample_manifest(write, folder: Path) -> str:
    csv_file(scans(write, folder, 1), "image,mask,modality\nimg0.nii.gz,seg0.nii.gz,CT\n")
    return "manifest"


def sample_davis(write, folder: Path) -> str:
    write.davis(folder, clips=1)
    return "davis_frames"


def sample_videos(write, folder: Path) -> str:
    write.videos(folder, clips=1)
    return "video_masks"


def sample_npz(write, folder: Path) -> str:
    write.npz(folder / "CT_a.npz")
    return "medsam_npz"


SAMPLES = [
    sample_nnunet,
    sample_nnunet_1,
    sample_msd,
    sample_msd_with_folds,
    sample_datalist,
    sample_totalsegmentator,
    sample_datalist_of_subjects,
    sample_manifest,
    sample_davis,
    sample_videos,
    sample_npz,
]


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.__name__)
def test_every_data_set_is_recognised_by_one_layout(tmp_path: Path, write, sample: Callable[..., str]):
    name = sample(write, tmp_path / "set")
    assert [entry.NAME for entry in layouts_at(tmp_path / "set", layouts())] == [name]
    assert {ref.layout for ref in find_cases(tmp_path, modality="CT")} == {name}


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.__name__)
def test_a_manifest_wins_over_whatever_lies_beside_it(tmp_path: Path, write, sample: Callable[..., str]):
    sample(write, tmp_path / "set")
    scans(write, tmp_path / "other", 1)
    csv_file(tmp_path / "set", "image,mask,modality\n../other/img0.nii.gz,../other/seg0.nii.gz,CT\n")
    assert layouts()["manifest"].recognise(tmp_path / "set")
    assert [(ref.layout, ref.case_id) for ref in find_cases(tmp_path / "set")] == [("manifest", "img0")]


# real data


def manifest_of(folder: Path, **values: object) -> list:
    row = {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
    csv_file(folder, json.dumps(row), "manifest.jsonl")
    return find_cases(folder)


@pytest.mark.parametrize(
    ("modality", "image", "mask", "objects"),
    [
        ("CT", "ct/totalsegmentator/example_ct.nii.gz", "ct/totalsegmentator/example_seg.nii.gz", 41),
        ("MR", "mri/pyradiomics/brain1_image.nrrd", "mri/pyradiomics/brain1_label.nrrd", 1),
        ("MR", "mri/pyradiomics/breast1_image.nrrd", "mri/pyradiomics/breast1_label.nrrd", 1),
        ("CT", "ct/tptbox/sub-ct_label-22_ct.nii.gz", "ct/tptbox/sub-ct_seg-vert_label-22_msk.nii.gz", None),
        ("MR", "mri/tptbox/sub-mri_label-6_T2w.nii.gz", "mri/tptbox/sub-mri_seg-subreg_label-6_msk.nii.gz", None),
    ],
)
@pytest.mark.filterwarnings("ignore::medsam2.cases.geometry.CaseWarning")
def test_real_scans_keep_their_objects(
    tmp_path: Path, test_data: Path, modality: str, image: str, mask: str, objects: int | None
):
    (ref,) = manifest_of(tmp_path, image=test_data / image, mask=test_data / mask, modality=modality)
    case = load_case(ref)
    import SimpleITK as sitk

    voxels = sitk.GetArrayFromImage(sitk.ReadImage(str(test_data / mask)))
    values = {int(value) for value in np.unique(voxels) if value}
    assert {label.id for label in case.labels} == values
    assert objects is None or len(values) == objects
    for label in case.labels:
        assert region(case, label.name).sum() == (voxels == label.id).sum()


def test_two_real_masks_of_one_scan_overlap(tmp_path: Path, test_data: Path):
    folder = test_data / "ct" / "tptbox"
    masks = {kind: str(folder / f"sub-ct_seg-{kind}_label-22_msk.nii.gz") for kind in ("vert", "subreg")}
    (ref,) = manifest_of(tmp_path, image=folder / "sub-ct_label-22_ct.nii.gz", mask=masks, modality="CT")
    case = load_case(ref)
    assert {label.name for label in case.labels} == {"vert", "subreg"}
    assert (region(case, "vert") & region(case, "subreg")).any()


def test_a_real_dicom_series_meets_its_mask_through_their_affines(tmp_path: Path, test_data: Path):
    folder = test_data / "ct" / "totalsegmentator"
    series, mask = folder / "example_ct_dicom", folder / "example_seg_dicom.nii.gz"
    if find_format(series) is None:
        pytest.skip("no format reads a folder of DICOM files")
    (ref,) = manifest_of(tmp_path, image=series, mask=mask, modality="CT")
    assert ref.case_id == "example_ct_dicom"
    with pytest.warns(CaseWarning, match=re.escape(mask.name)):
        case = load_case(ref)
    assert case.image.shape == (20, 512, 512)
    assert len(case.labels) == 31
    # organs and bones are no air; with the mask laid on by index (upside down) 28 % of it would be
    assert (case.image[case.planes[0] > 0] < -200).mean() < 0.05


def test_a_row_of_a_series_in_time_is_a_clip_for_each_slice(tmp_path: Path):
    import SimpleITK as sitk

    image = np.random.default_rng(0).integers(0, 900, (6, 3, 16, 20)).astype(np.int16)
    mask = np.zeros((6, 3, 16, 20), np.uint8)
    mask[:, :, 4:9, 5:11] = 1
    for name, array in (("cine.nii.gz", image), ("wall.nii.gz", mask), ("blood.nii.gz", mask)):
        series = sitk.JoinSeries([sitk.GetImageFromArray(volume) for volume in array])
        sitk.WriteImage(series, str(tmp_path / name))
    csv_file(tmp_path, "image,mask,modality\ncine.nii.gz,wall=wall.nii.gz;blood=blood.nii.gz,MR\n")
    refs = find_cases(tmp_path)
    assert [ref.case_id for ref in refs] == [f"cine_slice00{z}" for z in range(3)]
    case = load_case(refs[1])
    assert case.kind == "clip"
    assert np.array_equal(case.image, image[:, 1])
    assert np.array_equal(region(case, "wall"), mask[:, 1] > 0)
    assert np.array_equal(region(case, "blood"), mask[:, 1] > 0)


def test_a_lossy_picture_mask_needs_the_threshold_and_is_named(tmp_path: Path, test_data: Path):
    from medsam2.cases.settings import DatasetSettings, SettingsBook

    folder, name = test_data / "endoscopy" / "kvasir", "cju0qkwl35piu0993l0dewei2.jpg"
    mask = {"polyp": str(folder / "masks" / name)}
    (ref,) = manifest_of(tmp_path, image=folder / "images" / name, mask=mask, modality="endoscopy")
    if find_format(ref.images[0]) is None:
        pytest.skip("no format reads .jpg")
    with pytest.raises(CaseError, match="threshold"):
        load_case(ref)
    (ref,) = find_cases(tmp_path, book=SettingsBook(common=DatasetSettings(threshold=127)))
    case = load_case(ref)
    assert [label.name for label in case.labels] == ["polyp"]
    assert 0.001 < region(case, "polyp").mean() < 0.5


def test_one_slice_is_never_cut_across_however_coarse_its_pixels_are(tmp_path: Path):
    picture = np.random.default_rng(0).integers(0, 255, (40, 60), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "i.png")
    Image.fromarray((picture > 200).astype(np.uint8)).save(tmp_path / "m.png")
    (tmp_path / "manifest.csv").write_text("image,mask,modality,spacing_mm\ni.png,m.png,MR,1.4\n")
    case = load_case(find_cases(tmp_path)[0])
    assert case.kind == "still"
    assert np.array_equal(case.image, picture[None])
