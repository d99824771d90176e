"""Which frames and objects of a segment make a clip: decided from its object tables, before anything is decoded.

Legend: T frames of the segment, n frames of the clip, O objects of the segment.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from medsam2.data.counter import Counter
from medsam2.data.settings import DataSettings


def reflect(positions: np.ndarray, length: int) -> np.ndarray:
    """Positions outside 0..length-1 folded back in time: 0 1 2 1 0 1 ... for length 3."""
    if length == 1:
        return np.zeros_like(positions)
    period = 2 * (length - 1)
    folded: np.ndarray = np.abs(positions) % period
    folded = np.where(folded < length, folded, period - folded)
    return folded


def choose_window(pixels: np.ndarray, settings: DataSettings, draw: Counter, prompt_frame: int = 0) -> np.ndarray:
    """Frame positions [n] of a clip around one object with `pixels` [T] on each frame of its segment.

    The object is present on the clip's `prompt_frame`. The drawn stride and direction are given up, in this order,
    before a clip is reflected at an end of its segment; a segment that is shorter than the clip is always reflected.
    `pixels` must reach `settings.min_pixels` somewhere.
    """
    length, count = len(pixels), settings.clip_frames
    widest = min(settings.stride_max, max(1, (length - 1) // max(1, count - 1)))
    stride = 1 + draw.integer(widest)
    backward = draw.uniform() < settings.reverse_probability
    want_absence = draw.uniform() < settings.absence_probability
    fallback: np.ndarray | None = None
    for windows in _options(pixels, stride, backward, settings, prompt_frame):
        if want_absence:
            ending = windows[(pixels[windows] == 0).any(axis=1)]
            if len(ending):
                return _pick(ending, draw)
        if fallback is None:
            fallback = windows
        if not want_absence:
            break
    assert fallback is not None, "an eligible object has a frame"
    return _pick(fallback, draw)


def _options(
    pixels: np.ndarray, stride: int, backward: bool, settings: DataSettings, prompt_frame: int
) -> Iterator[np.ndarray]:
    """Non-empty sets of allowed windows [K, n], the most wanted first; reflected ones only if no other exists."""
    length, places = len(pixels), np.arange(settings.clip_frames) - prompt_frame
    prompted = np.flatnonzero(pixels >= settings.min_pixels)[:, None]
    directions = [backward]
    if 0.0 < settings.reverse_probability < 1.0:
        directions.append(not backward)
    reflected: list[np.ndarray] = []
    some_fit = False
    for step in dict.fromkeys((stride, 1)):
        for back in directions:
            windows = prompted + (-step if back else step) * places
            first, last = windows[:, 0], windows[:, -1]
            fits = (np.minimum(first, last) >= 0) & (np.maximum(first, last) < length)
            if fits.any():
                some_fit = True
                yield windows[fits]
            elif not some_fit:
                reflected.append(reflect(windows, length))
    if not some_fit:
        yield from reflected


def _pick(windows: np.ndarray, draw: Counter) -> np.ndarray:
    picked: np.ndarray = windows[draw.integer(len(windows))]
    return picked


def choose_objects(
    pixels: np.ndarray, weights: np.ndarray, settings: DataSettings, draw: Counter, prompt_frame: int = 0
) -> tuple[tuple[int, ...], np.ndarray]:
    """Objects of a clip and its frame positions [n].

    One object is drawn by weight and gets a window; up to `max_objects - 1` others that are present on the clip's
    `prompt_frame` join it, drawn by weight without replacement.

    Args:
        pixels: [O, T] counts. weights: [O], zero where an object must not be used; not all zero.
    """
    eligible = np.where((pixels >= settings.min_pixels).any(axis=1), weights, 0.0)
    first = draw.weighted(eligible)
    frames = choose_window(pixels[first], settings, draw, prompt_frame)
    present = (pixels[:, frames[prompt_frame]] >= settings.min_pixels) & (eligible > 0)
    others = [int(index) for index in np.flatnonzero(present) if index != first]
    # The smallest of exponential times with these rates: weighted sampling without replacement.
    race = sorted((draw.exponential() / float(eligible[index]), index) for index in others)
    return (first, *(index for _, index in race[: settings.max_objects - 1])), frames


def largest_window(pixels: np.ndarray, count: int) -> np.ndarray:
    """The fixed validation window [n] of an object: from its largest frame towards the longer side of the segment."""
    length, start = len(pixels), int(np.argmax(pixels))
    step = 1 if length - start >= start + 1 else -1
    return reflect(start + step * np.arange(count), length)
