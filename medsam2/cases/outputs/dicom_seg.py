"""Write DICOM-SEG through highdicom: binary segments that refer to the slices of their source series."""

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
IDENTIFYING_TAGS = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")


def check(masks: Masks) -> None:
    """Check that a DICOM-SEG can refer to the source.

    Raises:
        UserError: the input is not DICOM, has no position in the patient, or lacks an identifier of its series.
    """
    for header in _source_headers(masks):
        missing = [tag for tag in IDENTIFYING_TAGS if not str(header.get(tag) or "").strip()]
        if missing:
            raise UserError(
                f"{masks.where}: its slices lack {', '.join(missing)}, which a DICOM-SEG needs to refer to them; use "
                "--format nifti or nrrd, or export the series again with its identifiers."
            )


def write(path: Path, masks: Masks) -> None:
    """Write one segment per object, numbered from 1 in the order of the objects, on the grid of the source series.

    Raises:
        UserError: as in `check`, or a tag that every DICOM object needs is missing or invalid.
    """
    import highdicom

    sources = _source_headers(masks)
    array, _ = to_source(masks.volume(), masks.orientation, None)
    table = np.zeros(max(masks.values) + 1, np.uint8 if len(masks.names) < 256 else np.uint16)
    for number, value in enumerate(masks.values, start=1):
        table[value] = number
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom quotes header values, which may name a patient
            seg = highdicom.seg.Segmentation(
                source_images=sources,
                pixel_array=_to_frame_order(table[array], sources),
                segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
                segment_descriptions=_segment_descriptions(masks.names),
                series_instance_uid=highdicom.UID(),
                series_number=SERIES_NUMBER,
                sop_instance_uid=highdicom.UID(),
                instance_number=1,
                manufacturer="medsam2",
                manufacturer_model_name="medsam2",
                software_versions=__version__,
                device_serial_number="0",
                series_description="medsam2 predict",
                specific_character_set="ISO_IR 192",  # UTF-8: object names may hold any letter
            )
            seg.save_as(path)
    except Exception as error:  # highdicom and pydicom raise many kinds, whose text may quote the header
        raise UserError(
            f"{masks.where}: a DICOM-SEG cannot refer to it ({type(error).__name__}: a required tag is missing or "
            "invalid); use --format nifti, or export the series again with its study and patient tags."
        ) from None


def _source_headers(masks: Masks) -> list[Dataset]:
    """Read the headers of the source files, in the order of the slices of its array.

    Raises:
        UserError: the files are not DICOM, or do not state their position in the patient.
    """
    import pydicom

    from medsam2.cases.formats.dicom_series import is_dicom

    if not masks.sources or not all(is_dicom(path) for path in masks.sources):
        raise UserError(f"{masks.where}: DICOM-SEG needs a DICOM input; use --format nifti, nrrd or frames.")
    if masks.affine is None or masks.moving:
        raise UserError(
            f"{masks.where}: the file does not state its position in the patient, which DICOM-SEG needs; use --format "
            "frames, mp4 or nifti."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        headers: list[Dataset] = [pydicom.dcmread(path, stop_before_pixels=True) for path in masks.sources]
    if len(headers) == 1:
        return headers
    normal = np.cross(*np.reshape(np.array(headers[0].ImageOrientationPatient, float), (2, 3)))
    return sorted(headers, key=lambda header: float(np.dot(normal, np.array(header.ImagePositionPatient, float))))


def _to_frame_order(labels: np.ndarray, sources: list[Dataset]) -> Any:
    """Return labels [Z, Y, X] unchanged for a series; for a multi-frame file, reorder them to its stored frames."""
    import highdicom

    if len(sources) > 1 or int(sources[0].get("NumberOfFrames") or 1) == 1:
        return labels
    geometry = highdicom.Image.from_dataset(sources[0], copy=True).get_volume_geometry()
    if geometry is None:
        raise ValueError("the frames do not form a regular volume")
    return geometry.with_array(labels)


def _segment_descriptions(names: tuple[str, ...]) -> list[Any]:
    """Describe each segment by its name; its type is the general "anatomical structure", since no other is known."""
    import highdicom
    from pydicom.sr.codedict import codes

    algorithm = highdicom.AlgorithmIdentificationSequence("medsam2", codes.DCM.ArtificialIntelligence, __version__)
    return [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name[:64],
            segmented_property_category=codes.SCT.AnatomicalStructure,
            segmented_property_type=codes.SCT.AnatomicalStructure,
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.SEMIAUTOMATIC,
            algorithm_identification=algorithm,
        )
        for number, name in enumerate(names, start=1)
    ]


OUTPUTS = (Output("dicom-seg", "DICOM-SEG (.dcm), for DICOM inputs", (".dcm",), ("dicom_series",), write, check),)
