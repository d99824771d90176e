"""Mask formats that are written, one file each; see `registry` to add one."""

from medsam2.cases.outputs.masks import Masks
from medsam2.cases.outputs.registry import (
    Output,
    check_free,
    check_masks,
    find_output,
    output_for,
    outputs,
    write_masks,
)

__all__ = ["Masks", "Output", "check_free", "check_masks", "find_output", "output_for", "outputs", "write_masks"]
