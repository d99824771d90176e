"""Names of patients and cases, and what files say of them, are in no byte that is written."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from medsam2.cases.layouts.registry import find_cases
from medsam2.shards.prepare.remove import remove_patients
from medsam2.shards.prepare.run import PrepareOptions, prepare

PATIENTS = ("QUXPATIENTA", "QUXPATIENTB", "QUXPATIENTC")
TEXT = b"QUXHEADERTEXT"
"""Every canary holds QUX, which no label, file ending or key of ours does."""


def nnunet(folder: Path, write) -> None:
    """Names in the files' names; text in the description of the NIfTI header and of the data set."""
    write.nnunet(folder, cases=3)
    for number, patient in enumerate(PATIENTS):
        for part, end in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
            old = folder / part / f"smith_{number:03d}{end}"
            header = bytearray(gzip.decompress(old.read_bytes()))
            header[148 : 148 + len(TEXT)] = header[228 : 228 + len(TEXT)] = TEXT
            (folder / part / f"{patient}{end}").write_bytes(gzip.compress(bytes(header)))
            old.unlink()
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(
        json.dumps({**content, "description": TEXT.decode(), "reference": PATIENTS[0]})
    )


def davis(folder: Path, write) -> None:
    """Names of folders; text in EXIF comments of the frames, and in meta.json."""
    from PIL import Image

    patients = {f"{patient}clip": patient for patient in PATIENTS[:2]}
    meta = {"modality": "US", "labels": {"organ": 1}, "fps": 10, "spacing_mm": 0.3, "patients": patients}
    write.davis(folder, meta=meta)
    for number, name in enumerate(patients):
        for part in ("JPEGImages", "Annotations"):
            (folder / part / f"clip{number}").rename(folder / part / name)
    for frame in folder.glob("JPEGImages/*/*.jpg"):
        picture = Image.open(frame)
        exif = picture.getexif()
        exif[0x010E] = TEXT.decode()
        picture.save(frame, exif=exif, comment=TEXT)


def videos(folder: Path, write) -> None:
    """Names of video files; text in a tag of the container."""
    write.videos(folder)
    for number, patient in enumerate(PATIENTS[:2]):
        video = folder / "videos" / f"v{number}.mp4"
        content = video.read_bytes()
        tag = len(TEXT) + 8
        video.unlink()
        (folder / "videos" / f"{patient}.mp4").write_bytes(content + tag.to_bytes(4, "big") + b"free" + TEXT)
        (folder / "masks" / f"v{number}").rename(folder / "masks" / patient)


def npz(folder: Path, write) -> None:
    """Names of files, one as DeepLesion writes them; text in an array of its own."""
    for number, name in enumerate((f"CT_{PATIENTS[0]}", f"CT_{PATIENTS[1]}", "CT_Lesion_QUX7_01_01_008-023")):
        path = write.npz(folder / f"{name}.npz", number)
        with np.load(path) as content:
            np.savez(path, **dict(content), patient=np.array(TEXT.decode()), raw=np.frombuffer(TEXT, np.uint8))


LAYOUTS = {"nnunet": nnunet, "davis": davis, "videos": videos, "npz": npz}


def holders(folder: Path, words: tuple[bytes, ...]) -> list[str]:
    """Files below `folder` in whose bytes or names one of `words` stands, in UTF-8 or UTF-16."""
    forms = [form for word in words for form in (word, word.decode().encode("utf-16-le"))]
    return [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if any(form in path.name.encode() or (path.is_file() and form in path.read_bytes()) for form in forms)
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_name_and_no_text_of_a_file_reaches_the_shards(layout: str, tmp_path: Path, write) -> None:
    source, out = tmp_path / "source" / f"set_{layout}", tmp_path / "shards"
    LAYOUTS[layout](source, write)
    refs = find_cases(source)
    assert len(refs) >= 2 and all("QUX" in ref.patient_id and "QUX" in ref.case_id for ref in refs)
    assert holders(source, (b"QUX",)) and (layout == "nnunet" or holders(source, (TEXT,)))

    summary = prepare(source, out, PrepareOptions()).summary
    assert summary["counts"]["cases"] == len(refs) and summary["failed_cases"] == 0
    assert holders(out, (b"QUX",)) == []
    paths = (str(tmp_path).encode(), source.parent.name.encode() + b"/")
    assert holders(out, paths) == [], "a path of the machine"

    remove_patients(out, [refs[0].patient_id])
    assert holders(out, (b"QUX",)) == []


def test_only_the_local_list_of_failed_cases_has_names(tmp_path: Path, write) -> None:
    source, out = tmp_path / "source", tmp_path / "shards"
    nnunet(source, write)
    (source / "imagesTr" / f"{PATIENTS[1]}_0000.nii.gz").write_bytes(TEXT)
    assert len(prepare(source, out, PrepareOptions()).failures) == 1
    assert holders(out, (b"QUX",)) == ["failures.jsonl"]
