"""One label map as NRRD."""

from medsam2.cases.outputs.volume import write

__all__ = ["DEFAULT_FOR", "ENDINGS", "NAME", "WRITES", "write"]

NAME = "nrrd"
WRITES = "NRRD (.nrrd)"
ENDINGS = (".nrrd",)
DEFAULT_FOR = (".nrrd", ".nhdr")
