"""The palette of pages, curves and images: a light page, and outlines that stand out on grey and coloured frames."""

from __future__ import annotations

GROUND, TEXT, DIM, RULE, PANEL = "#ffffff", "#1f2328", "#59636e", "#d8dee4", "#f6f8fa"
LINK = "#0550ae"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # of curves, by Okabe and Ito
OTHERS = "#999999"  # of all further series
TRUTH, PROMPT = "#22c55e", "#0ea5e9"
PREDICTIONS = ("#f59e0b", "#ec4899", "#a855f7", "#ef4444")  # one per checkpoint
OBJECTS = ("#ff5050", "#50dc64", "#5a96ff", "#ffd23c", "#e66ef0", "#50e6e6")  # one per structure in a frame


def prediction_colour(place: int) -> str:
    """The colour of checkpoint number `place`."""
    return PREDICTIONS[place % len(PREDICTIONS)]


def rgb(colour: str) -> tuple[int, int, int]:
    """Convert `#22c55e` to (34, 197, 94)."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
