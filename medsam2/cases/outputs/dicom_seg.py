"""DICOM-SEG through highdicom: binary segments that refer to the slices of the series that they belong to."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medsam2 import __version__
from medsam2.cases.geometry import to_source
from medsam2.cases.outputs.masks import Masks, Output
from medsam2.errors import UserError

if TYPE_CHECKING:
    from pydicom import Dataset

SERIES_NUMBER = 900
IDENTITY = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")


def check(masks: Masks) -> None:
    """Whether a DICOM-SEG can refer to the source.

    Raises:
        UserError: the input is no DICOM, has no place in the patient, or says nothing of which series it is.
    """
    for header in _sources(masks):
        missing = [tag for tag in IDENTITY if not str(header.get(tag) or "").strip()]
        if missing:
            raise UserError(
                f"{masks.where}: its slices have no {', '.join(missing)}, by which a DICOM-SEG refers to them; write "
                "--format nifti or nrrd instead, or export the series again with its identifiers."
            )


def write(path: Path, masks: Masks) -> None:
    """One segment an object, numbered from 1 in the order of the objects, on the grid of the source series.

    Raises:
        UserError: as `check`, or a tag that a DICOM object must have is missing or odd.
    """
    import highdicom

    sources = _sources(masks)
    array, _ = to_source(masks.volume(), masks.orientation, None)
    table = np.zeros(max(masks.values) + 1, np.uint8 if len(masks.names) < 256 else np.uint16)
    for number, value in enumerate(masks.values, start=1):
        table[value] = number
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom quotes values of the files
            seg = highdicom.seg.Segmentation(
                source_images=sources,
                pixel_array=_placed(table[array], sources),
                segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
                segment_descriptions=_descriptions(masks.names),
                series_instance_uid=highdicom.UID(),
                series_number=SERIES_NUMBER,
                sop_instance_uid=highdicom.UID(),
                instance_number=1,
                manufacturer="medsam2",
                manufacturer_model_name="medsam2",
                software_versions=__version__,
                device_serial_number="0",
                series_description="medsam2 predict",
                specific_character_set="ISO_IR 192",  # names of objects may hold any letter; some sources state none
            )
            seg.save_as(path)
    except Exception as error:  # highdicom and pydicom raise many kinds, whose text may quote the header
        raise UserError(
            f"{masks.where}: cannot be referred to by a DICOM-SEG ({type(error).__name__}: a tag that it needs is "
            "missing or odd); write --format nifti instead, or export the series again with its study and patient tags."
        ) from None


def _sources(masks: Masks) -> list[Dataset]:
    """The source's files in the order of its array, without their pixels.

    Raises:
        UserError: they are not DICOM, or say nothing of where they lie.
    """
    import pydicom

    from medsam2.cases.formats.dicom_series import is_dicom

    if not masks.sources or not all(is_dicom(path) for path in masks.sources):
        raise UserError(f"{masks.where}: DICOM-SEG needs a DICOM input; write --format nifti, nrrd or frames instead.")
    if masks.affine is None or masks.moving:
        raise UserError(
            f"{masks.where}: the file does not say where it lies in the patient, which DICOM-SEG needs; write --format "
            "frames, mp4 or nifti instead."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read: list[Dataset] = [pydicom.dcmread(path, stop_before_pixels=True) for path in masks.sources]
    if len(read) == 1:
        return read
    normal = np.cross(*np.reshape(np.array(read[0].ImageOrientationPatient, float), (2, 3)))
    return sorted(read, key=lambda header: float(np.dot(normal, np.array(header.ImagePositionPatient, float))))


def _placed(labels: np.ndarray, sources: list[Dataset]) -> Any:
    """[Z, Y, X] as it is for a series; for a volume in one file on that file's own grid, whatever order its frames
    have."""
    import highdicom

    if len(sources) > 1 or int(sources[0].get("NumberOfFrames") or 1) == 1:
        return labels
    geometry = highdicom.Image.from_dataset(sources[0], copy=True).get_volume_geometry()
    if geometry is None:
        raise ValueError("frames make no regular volume")
    return geometry.with_array(labels)


def _descriptions(names: tuple[str, ...]) -> list[Any]:
    """Segments under their names; what they are is "an anatomical structure", since nobody said more."""
    import highdicom
    from pydicom.sr.codedict import codes

    maker = highdicom.AlgorithmIdentificationSequence("medsam2", codes.DCM.ArtificialIntelligence, __version__)
    return [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name[:64],
            segmented_property_category=codes.SCT.AnatomicalStructure,
            segmented_property_type=codes.SCT.AnatomicalStructure,
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.SEMIAUTOMATIC,
            algorithm_identification=maker,
        )
        for number, name in enumerate(names, start=1)
    ]


OUTPUTS = (Output("dicom-seg", "DICOM-SEG (.dcm), for DICOM inputs", (".dcm",), ("dicom_series",), write, check),)
