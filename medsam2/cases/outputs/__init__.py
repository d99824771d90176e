"""Output formats of masks, one file per library; see `registry` to add one."""

from medsam2.cases.outputs.masks import Masks, Output
from medsam2.cases.outputs.registry import check_free, find_output, output_for, outputs, write_masks

__all__ = ["Masks", "Output", "check_free", "find_output", "output_for", "outputs", "write_masks"]
