"""Checks of one case at a time for what looks wrong.

A check yields problems with remedies. They are warnings, not errors, since each can be right for some data (a lesion
drawn on one slice, an organ that leaves the field of view): they show where to look first.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter

from medsam2.cases.settings import WINDOW_PRESETS
from medsam2.shards.inspect.tables import FILLED_SHARE, CaseView, ObjectView

MAX_DARKEST_SHARE = 0.98
"""Share of pixels in the lowest of 32 bins. Air around a body takes up to 80 %; above this, little is visible."""
MAX_BRIGHTEST_SHARE = 0.25
"""Share of pixels in the highest bin. Bone and contrast take a few percent; a quarter means that tissue is clipped."""
NUM_FULLEST_BINS, MAX_FULLEST_SHARE = 3, 0.995
"""An image with a larger share of its pixels in these bins has a few grey values only, like a mask in its place."""
MIN_OBJECT_PIXELS = 20
"""On the largest slice. Masks are predicted at 256 px: in a frame of 512 px, 20 px become 5."""
MAX_SPACING_RATIO = 10.0
"""Slice over in-plane spacing: 5 mm over 0.5 mm is common; above this, a unit is probably wrong."""
SPACING_RANGE_MM = (0.05, 20.0)
"""Spacings that scanners give. Values below are in micrometres or metres, values above are localisers or unset."""
FINE_MODALITIES = ("MICROSCOPY", "PATHOLOGY")  # their pixels are far smaller than 0.05 mm
MIN_CLIP_FRAMES = 8
"""Training clips have 8 frames; a shorter clip is repeated to fill them and teaches little about time."""
MAX_NAMES = 4  # of structures per line


@dataclass(frozen=True)
class Finding:
    """One warning about one case."""

    kind: str
    dataset: str
    split: str
    case: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.dataset} {self.split}, case {self.case}: {self.what}; {self.remedy}"


Check = Callable[[CaseView], Iterator[tuple[str, str]]]
"""Yields (what, remedy) for each problem of a case."""


def run_checks(views: Iterable[CaseView]) -> list[Finding]:
    """Run all checks; findings are sorted by kind, worst first, then by the order of the cases."""
    cases = list(views)
    return [
        Finding(kind, view.dataset, view.split, view.case, what, remedy)
        for kind, check in CHECKS.items()
        for view in cases
        for what, remedy in check(view)
    ]


def by_kind(findings: Sequence[Finding]) -> dict[str, list[Finding]]:
    """Group findings by kind; they are sorted by it already."""
    return {kind: list(of_kind) for kind, of_kind in groupby(findings, attrgetter("kind"))}


def empty_masks(view: CaseView) -> Iterator[tuple[str, str]]:
    """Find cases, segments and objects without a labelled pixel."""
    empty = [o for o in view.objects if not o.frames]
    if len(empty) == len(view.objects):
        yield "no object has a pixel", "label it or leave it out: there is nothing to learn from or to score"
        return
    if view.empty_segments:
        what = f"{view.empty_segments} of {view.segments} segments have no object"
        yield what, "prepare the case again from its source"
    if empty:
        yield f"{_count(empty, view)} declared without a pixel", "prepare the case again, or correct its object table"


def suspicious_window(view: CaseView) -> Iterator[tuple[str, str]]:
    """Find intensities nearly all in the lowest bin, many in the highest bin, or nearly all in very few bins."""
    total = sum(view.histogram)
    if not total:
        return
    shares = [count / total for count in view.histogram]
    window = f"with window {view.window}"
    if shares[0] > MAX_DARKEST_SHARE:
        what = f"{_percent(shares[0])} of its pixels are in the darkest of 32 bins {window}"
        yield what, _suggest_window(view, "lower")
    elif shares[-1] > MAX_BRIGHTEST_SHARE:
        what = f"{_percent(shares[-1])} of its pixels are in the brightest of 32 bins {window}"
        yield what, _suggest_window(view, "upper")
    elif (share := sum(sorted(shares)[-NUM_FULLEST_BINS:])) > MAX_FULLEST_SHARE:
        what = f"{_percent(share)} of its pixels are in {NUM_FULLEST_BINS} of 32 intensity bins {window}"
        yield what, "check whether the image is a mask or was saved with too few grey values"


def whole_frames(view: CaseView) -> Iterator[tuple[str, str]]:
    """Find cases whose objects all fill their frames: background and object are probably swapped."""
    visible = [o for o in view.objects if o.frames]
    if visible and all(o.fills for o in visible):
        what = f"{_count(visible, view)} cover more than {_percent(FILLED_SHARE)} of every frame that shows them"
        yield what, "check whether background and object are swapped"


def extreme_spacing(view: CaseView) -> Iterator[tuple[str, str]]:
    """Find pixels of a size that no scanner gives, and slices far thicker than pixels."""
    axes = view.spacing if view.kind == "volume" else view.spacing[1:]
    text = " x ".join(f"{s:.3g}" for s in axes) + " mm"
    low = 0.0 if view.modality in FINE_MODALITIES else SPACING_RANGE_MM[0]
    remedy = "compare with the header of the source: lengths and boundary scores depend on it"
    if not all(math.isfinite(s) and low < s <= SPACING_RANGE_MM[1] for s in axes):
        yield f"spacing {text}, outside {low:g} to {SPACING_RANGE_MM[1]:g} mm", remedy
    elif (ratio := max(axes) / min(axes)) > MAX_SPACING_RATIO:
        yield f"spacing {text}, a ratio of {ratio:.0f} to 1", remedy


def one_slice(view: CaseView) -> Iterator[tuple[str, str]]:
    """Find volumes and objects of one slice, which have nothing to track."""
    if view.kind != "volume":
        return
    if view.shape[0] == 1:
        yield "a volume of one slice", "check whether its slices became separate volumes: there is nothing to track"
        return
    single = [o for o in view.objects if o.frames == 1]
    if single:
        what = f"{_count(single, view)} on one slice only"
        yield what, "label the neighbouring slices; the model learns no propagation from one slice"


def small_objects(view: CaseView) -> Iterator[tuple[str, str]]:
    """Find objects that are too small for the model."""
    small = [o for o in view.objects if 0 < o.largest < MIN_OBJECT_PIXELS]
    if small:
        what = f"{_count(small, view)} below {MIN_OBJECT_PIXELS} px on the largest slice"
        yield what, f"prepare with --min-pixels {MIN_OBJECT_PIXELS}, or with a larger --max-side if frames were reduced"


def short_clips(view: CaseView) -> Iterator[tuple[str, str]]:
    """Find clips that are shorter than a training clip."""
    if view.kind == "clip" and view.shape[0] < MIN_CLIP_FRAMES:
        what = f"a clip of {view.shape[0]} frame{'s' if view.shape[0] > 1 else ''}"
        yield what, f"join it with its neighbours; training takes {MIN_CLIP_FRAMES} frames per clip"


CHECKS: dict[str, Check] = {
    "empty masks": empty_masks,
    "suspicious window": suspicious_window,
    "object fills the frame": whole_frames,
    "extreme spacing": extreme_spacing,
    "one slice": one_slice,
    "very small object": small_objects,
    "short clip": short_clips,
}
"""By kind, worst first: unusable data, then data that teach something wrong, then data that teach little."""


def _count(objects: Sequence[ObjectView], view: CaseView) -> str:
    """Count and name objects: '2 of 5 objects (kidney, lesion)'."""
    names = list(Counter(o.name for o in objects))
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return f"{len(objects)} of {len(view.objects)} objects ({', '.join(names[:MAX_NAMES])}{more})"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _suggest_window(view: CaseView, bound: str) -> str:
    """Suggest a preset that extends the 'lower' or 'upper' bound of a window in HU."""
    match = re.fullmatch(r"(\S+?):(\S+) HU( .*)?", view.window)
    if not match:
        return "look at the case; if it looks wrong, prepare it from the original intensities of the scan"
    low, high = float(match[1]), float(match[2])
    wider = {n: w for n, w in WINDOW_PRESETS.items() if (w[0] < low if bound == "lower" else w[1] > high)}
    if not wider:
        return "no preset is wider: check that the source is in Hounsfield units"
    # The narrowest of the wider windows keeps the most contrast.
    name, (to_low, to_high) = min(wider.items(), key=lambda item: item[1][1] - item[1][0])
    return f"try medsam2 prepare --window {name} ({to_low:g}:{to_high:g} HU)"
