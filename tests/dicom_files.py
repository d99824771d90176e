"""DICOM files as scanners write them, with text in the tags that must never come out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

CANARIES = ("CANARY^NAME", "CANARYID77", "CANARY STUDY", "CANARY CLINIC", "CANARYACC", "CANARY SERIES")
CT = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"
US = "1.2.840.10008.5.1.4.1.1.3.1"


def header(uid: str, sop: str = CT, modality: str = "CT") -> Any:
    """A data set with everything but the pixels; `uid` tells series apart."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = sop
    dataset.SOPClassUID, dataset.SOPInstanceUID, dataset.Modality = sop, generate_uid(), modality
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.PatientName, dataset.PatientID, dataset.StudyDescription = CANARIES[:3]
    dataset.InstitutionName, dataset.AccessionNumber, dataset.SeriesDescription = CANARIES[3:]
    dataset.PatientBirthDate, dataset.PatientSex = "19700101", "O"
    dataset.StudyDate, dataset.StudyTime = "20200101", "101010"
    dataset.StudyID, dataset.ReferringPhysicianName = "1", ""
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.3.987654", f"1.2.3.987654.{uid}"
    dataset.FrameOfReferenceUID, dataset.SeriesNumber = f"1.2.3.987654.9.{uid}", int(uid)
    return dataset


def pixels(dataset: Any, array: np.ndarray, kind: str = "MONOCHROME2") -> Any:
    """Put [Y, X], [Y, X, 3] or frames of them into a data set."""
    colour = array.shape[-1] == 3 and array.ndim > 2
    dataset.Rows, dataset.Columns = array.shape[-3:-1] if colour else array.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = (3 if colour else 1), kind
    if colour:
        dataset.PlanarConfiguration = 0
    bits = array.dtype.itemsize * 8
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
    dataset.PixelRepresentation = int(array.dtype.kind == "i")
    if array.ndim - colour == 3:
        dataset.NumberOfFrames = array.shape[0]
    dataset.PixelData = array.tobytes()
    return dataset


def write_series(
    folder: Path,
    array: np.ndarray,
    uid: str = "1",
    spacing: tuple[float, float, float] = (4.0, 1.5, 1.25),
    orientation: Sequence[float] = (1, 0, 0, 0, 1, 0),
    slope: float = 1,
    intercept: float = -1000,
    skip: Sequence[int] = (),
    **tags: Any,
) -> list[Path]:
    """A CT series of [Z, Y, X] stored values, one file a slice under names that say nothing of the order."""
    folder.mkdir(parents=True, exist_ok=True)
    normal = np.cross(*np.reshape(orientation, (2, 3)))
    paths = []
    for z, plane in enumerate(array):
        if z in skip:
            continue
        dataset = pixels(header(uid), plane)
        dataset.ImageOrientationPatient = list(orientation)
        dataset.ImagePositionPatient = [round(float(v), 6) for v in np.array([-20.0, 30, 5]) + normal * spacing[0] * z]
        dataset.PixelSpacing, dataset.SliceThickness = [spacing[1], spacing[2]], spacing[0]
        dataset.RescaleSlope, dataset.RescaleIntercept, dataset.InstanceNumber = slope, intercept, z + 1
        dataset.WindowCenter, dataset.WindowWidth = [60, 500], [300, 2000]
        for key, value in tags.items():
            setattr(dataset, key, value)
        path = folder / f"{uid}_{(z * 7) % 97:03d}.dcm"
        dataset.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def write_enhanced(path: Path, array: np.ndarray, step: float = 4.0) -> Path:
    """An enhanced CT of [Z, Y, X] stored values in one file, 1.5 x 1.25 mm, placed as `write_series` places slices."""
    from pydicom.dataset import Dataset

    def group(**tags: Any) -> list[Dataset]:
        entry = Dataset()
        for key, value in tags.items():
            setattr(entry, key, value)
        return [entry]

    dataset = pixels(header("1", ENHANCED_CT), array)
    shared = Dataset()
    shared.PixelMeasuresSequence = group(PixelSpacing=[1.5, 1.25], SliceThickness=step, SpacingBetweenSlices=step)
    shared.PlaneOrientationSequence = group(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    shared.PixelValueTransformationSequence = group(RescaleSlope=1, RescaleIntercept=-1000, RescaleType="HU")
    dataset.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for z in range(array.shape[0]):
        frame = Dataset()
        frame.PlanePositionSequence = group(ImagePositionPatient=[-20.0, 30.0, 5.0 + step * z])
        frames.append(frame)
    dataset.PerFrameFunctionalGroupsSequence = frames
    dataset.save_as(path, enforce_file_format=True)
    return path


def write_seg(path: Path, slices: Sequence[Path], masks: dict[str, np.ndarray], kind: str = "BINARY") -> Path:
    """A DICOM-SEG of named masks [Z, Y, X] (Z in the order of `slices`), or of fractions."""
    import highdicom
    import pydicom
    from pydicom.sr.codedict import codes

    sources = [pydicom.dcmread(p) for p in slices]
    maker = highdicom.AlgorithmIdentificationSequence("hand", codes.DCM.ArtificialIntelligence, "1")
    descriptions = [
        highdicom.seg.SegmentDescription(
            number, name, codes.SCT.Tissue, codes.SCT.Organ, highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC, maker
        )
        for number, name in enumerate(masks, start=1)
    ]
    stacked = np.stack(list(masks.values()), -1).astype(np.uint8 if kind == "BINARY" else np.float32)
    seg = highdicom.seg.Segmentation(
        sources, stacked, highdicom.seg.SegmentationTypeValues(kind), descriptions,
        "1.2.3.987654.77", 77, highdicom.UID(), 1, "maker", "model", "1", "serial",
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    seg.save_as(path)
    return path
