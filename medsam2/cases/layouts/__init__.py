"""Dataset layouts, one file each: where images, masks and names lie in a folder. See `registry` to add one."""

from medsam2.cases.layouts.registry import Layout, find_cases, layouts, load_case

__all__ = ["Layout", "find_cases", "layouts", "load_case"]
