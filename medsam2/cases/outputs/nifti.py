"""One label map as NIfTI."""

from medsam2.cases.outputs.volume import write

__all__ = ["DEFAULT_FOR", "ENDINGS", "NAME", "WRITES", "write"]

NAME = "nifti"
WRITES = "NIfTI (.nii.gz, .nii)"
ENDINGS = (".nii.gz", ".nii")
DEFAULT_FOR = (".nii.gz", ".nii", "npz")
