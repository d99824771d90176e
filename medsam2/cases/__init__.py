"""Raw data to `Case`: types, file formats, dataset layouts, intensity presets and generated cases."""

from medsam2.cases.case import Case, CaseError, Label

__all__ = ["Case", "CaseError", "Label"]
