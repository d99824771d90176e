"""Dataset layouts, one file each: where images, masks and names lie in a folder. See `registry` to add one."""

from medsam2.cases.layouts.registry import CaseRef, Layout, find_cases, layouts

__all__ = ["CaseRef", "Layout", "find_cases", "layouts"]
