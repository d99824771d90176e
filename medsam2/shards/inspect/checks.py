"""What looks wrong with a case: a list of small checks, each of one case at a time.

A check yields what it found and what to do about it. None of them is an error, since each can be right for some data
(a lesion drawn on one slice, an organ that leaves the field of view); they say where to look first.
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
from medsam2.shards.inspect.tables import FILLED, CaseView, ObjectView

DARK = 0.98
"""Share of pixels in the lowest of 32 bins. Air around a body takes up to 80 %; beyond this hardly anything is left."""
BRIGHT = 0.25
"""Share of pixels in the highest bin. Bone and contrast take a few percent; a quarter is tissue that was cut off."""
FEW_BINS, FEW_SHARE = 3, 0.995
"""So much in so few bins is a picture of a few grey values, such as a mask that stands where the image should."""
SMALL_OBJECT = 20
"""Pixels on the largest slice. Masks are predicted at 256 px: of a frame of 512 px, 5 px of it are left."""
SPACING_RATIO = 10.0
"""Slice over in-plane spacing: 5 mm slices of 0.5 mm pixels still are usual; beyond, a unit is probably wrong."""
SPACING_RANGE = (0.05, 20.0)
"""Millimetres that scanners give. Below is micrometres or metres, above is a localiser or an unset header."""
FINE_MODALITIES = ("MICROSCOPY", "PATHOLOGY")  # their pixels are far below 0.05 mm by nature
SHORT_CLIP = 8
"""Frames. Training clips have 8; a shorter clip is repeated to fill them and teaches little about time."""
NAMES = 4  # structures that a line names


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
"""(what, remedy) of everything that the check finds."""


def run_checks(views: Iterable[CaseView]) -> list[Finding]:
    """What all checks find, worst kind first, each kind in the order of the cases."""
    cases = list(views)
    return [
        Finding(kind, view.dataset, view.split, view.case, what, remedy)
        for kind, check in CHECKS.items()
        for view in cases
        for what, remedy in check(view)
    ]


def by_kind(findings: Sequence[Finding]) -> dict[str, list[Finding]]:
    """Findings by kind, which are sorted by it already."""
    return {kind: list(of_kind) for kind, of_kind in groupby(findings, attrgetter("kind"))}


def empty_masks(view: CaseView) -> Iterator[tuple[str, str]]:
    """A case, a segment or an object without a labelled pixel."""
    empty = [o for o in view.objects if not o.frames]
    if len(empty) == len(view.objects):
        yield "no object has a pixel", "label it or leave it out: there is nothing to learn from or to score"
        return
    if view.bare:
        yield f"{view.bare} of {view.segments} segments have no object", "prepare the case again from its source"
    if empty:
        yield f"{_some(empty, view)} declared without a pixel", "prepare the case again, or correct its object table"


def suspicious_window(view: CaseView) -> Iterator[tuple[str, str]]:
    """Intensities that nearly all fell into the lowest, or many into the highest bin, or into very few."""
    total = sum(view.histogram)
    if not total:
        return
    shares = [count / total for count in view.histogram]
    window = f"with window {view.window}"
    if shares[0] > DARK:
        yield f"{_percent(shares[0])} of its pixels are in the darkest of 32 bins {window}", _wider(view, "lower")
    elif shares[-1] > BRIGHT:
        yield f"{_percent(shares[-1])} of its pixels are in the brightest of 32 bins {window}", _wider(view, "upper")
    elif (share := sum(sorted(shares)[-FEW_BINS:])) > FEW_SHARE:
        what = f"{_percent(share)} of its pixels are in {FEW_BINS} of 32 intensity bins {window}"
        yield what, "look whether the image is a mask or was saved with too few grey values"


def whole_frames(view: CaseView) -> Iterator[tuple[str, str]]:
    """Every object covers the frame wherever it is: background and object are probably swapped."""
    seen = [o for o in view.objects if o.frames]
    if seen and all(o.fills for o in seen):
        what = f"{_some(seen, view)} on more than {_percent(FILLED)} of the frame, wherever seen"
        yield what, "look whether background and object are swapped"


def extreme_spacing(view: CaseView) -> Iterator[tuple[str, str]]:
    """Pixels of a size that no scanner gives, or slices far thicker than pixels."""
    axes = view.spacing if view.kind == "volume" else view.spacing[1:]
    text = " x ".join(f"{s:.3g}" for s in axes) + " mm"
    low = 0.0 if view.modality in FINE_MODALITIES else SPACING_RANGE[0]
    remedy = "compare with the header of the source: lengths and boundary scores rest on it"
    if not all(math.isfinite(s) and low < s <= SPACING_RANGE[1] for s in axes):
        yield f"spacing {text}, outside {low:g} to {SPACING_RANGE[1]:g} mm", remedy
    elif (ratio := max(axes) / min(axes)) > SPACING_RATIO:
        yield f"spacing {text}, a ratio of {ratio:.0f} to 1", remedy


def one_slice(view: CaseView) -> Iterator[tuple[str, str]]:
    """A volume, or an object of a volume, with nothing to track."""
    if view.kind != "volume":
        return
    if view.shape[0] == 1:
        yield "a volume of one slice", "there is nothing to track: check that its slices belong together"
        return
    single = [o for o in view.objects if o.frames == 1]
    if single:
        what = f"{_some(single, view)} on one slice only"
        yield what, "label the neighbouring slices, or expect no propagation to be learnt from it"


def small_objects(view: CaseView) -> Iterator[tuple[str, str]]:
    """Objects too small to be seen by the model."""
    small = [o for o in view.objects if 0 < o.largest < SMALL_OBJECT]
    if small:
        what = f"{_some(small, view)} below {SMALL_OBJECT} px on the largest slice"
        yield what, f"prepare with --min-pixels {SMALL_OBJECT}, or with a larger --max-side if frames were reduced"


def short_clips(view: CaseView) -> Iterator[tuple[str, str]]:
    """Clips that do not fill a training clip."""
    if view.kind == "clip" and view.shape[0] < SHORT_CLIP:
        what = f"a clip of {view.shape[0]} frame{'s' if view.shape[0] > 1 else ''}"
        yield what, f"join it with its neighbours; training takes {SHORT_CLIP} frames at a time"


CHECKS: dict[str, Check] = {
    "empty masks": empty_masks,
    "suspicious window": suspicious_window,
    "object fills the frame": whole_frames,
    "extreme spacing": extreme_spacing,
    "one slice": one_slice,
    "very small object": small_objects,
    "short clip": short_clips,
}
"""By kind, worst first: what cannot be learnt from, then what is learnt wrongly, then what is learnt less well."""


def _some(objects: Sequence[ObjectView], view: CaseView) -> str:
    """'2 of 5 objects (kidney, lesion)'."""
    names = list(Counter(o.name for o in objects))
    more = f" and {len(names) - NAMES} more" if len(names) > NAMES else ""
    return f"{len(objects)} of {len(view.objects)} objects ({', '.join(names[:NAMES])}{more})"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _wider(view: CaseView, bound: str) -> str:
    """Another window, reaching further at its 'lower' or 'upper' bound, if the one that was used has bounds of HU."""
    used = re.fullmatch(r"(\S+?):(\S+) HU( .*)?", view.window)
    if not used:
        return "look at the case; if it looks wrong, prepare it from the native intensities of the scan"
    low, high = float(used[1]), float(used[2])
    fitting = {n: w for n, w in WINDOW_PRESETS.items() if (w[0] < low if bound == "lower" else w[1] > high)}
    if not fitting:
        return "no preset reaches further: check that the source is in Hounsfield units"
    # of the windows that reach further, the narrowest keeps the most contrast
    name, (to_low, to_high) = min(fitting.items(), key=lambda item: item[1][1] - item[1][0])
    return f"try medsam2 prepare --window {name} ({to_low:g}:{to_high:g} HU)"
