"""One label map as MetaImage."""

from medsam2.cases.outputs.volume import write

__all__ = ["DEFAULT_FOR", "ENDINGS", "NAME", "WRITES", "write"]

NAME = "mha"
WRITES = "MetaImage (.mha)"
ENDINGS = (".mha",)
DEFAULT_FOR = (".mha", ".mhd")
