"""Frames with outlines, boxes and points over them, alone or as a sheet of strips with captions and a legend.

    frame = Frame(image, (Outline(truth, TRUTH), Outline(prediction, PREDICTIONS[0], filled=True)), title="slice 12")
    sheet = draw_sheet([Strip((frame,), label="nano", value="0.912")], "liver", "CT, case 0a1b2c3d", [("truth", TRUTH)])
    content = encode(sheet)           # bytes of a WebP; encode(sheet, "PNG")

Legend: T frames, H and W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from medsam2.reporting.style import DIM, GROUND, PROMPT, TEXT, rgb
from medsam2.reporting.tables import shorten

FRAME_SIDE = 224  # pixels of the longer side of a drawn frame
MIN_SHEET_WIDTH = 360  # pixels, so that titles and legends find room beside a single narrow frame
OUTLINE_WIDTH, DASH_LENGTH, POINT_RADIUS = 2, 5, 5  # pixels of the drawn frame
FILL_OPACITY = 0.18
THIN_SHARE = 0.25  # of a drawn pixel: so much of a mask shows it, so that thin structures survive a reduction
LABEL_WIDTH, GAP, LINE_HEIGHT = 150, 6, 18  # pixels
MARGIN_SHARE = 0.35  # of the object's side, on each side of it
MIN_CROP = 48  # pixels of the frame
FRAMES_SHOWN = 5


@dataclass(frozen=True, eq=False)
class Outline:
    """The inner edge of a mask bool [H, W]. filled: with a faint area inside. dashed: as prompts are drawn."""

    mask: np.ndarray
    colour: str
    filled: bool = False
    dashed: bool = False


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame and what is drawn over it.

    Attributes:
        image: uint8 [H, W] or [H, W, 3]. outlines: later ones cover earlier ones.
        points: (x, y, positive) in pixels of the frame. title: above it. note: in its lower right corner.
    """

    image: np.ndarray
    outlines: tuple[Outline, ...] = ()
    points: tuple[tuple[float, float, bool], ...] = ()
    title: str = ""
    title_colour: str = DIM
    note: str = ""


@dataclass(frozen=True, eq=False)
class Strip:
    """Frames side by side. On their left: label, a large value, and a small line of detail."""

    frames: tuple[Frame, ...]
    label: str = ""
    value: str = ""
    detail: str = ""
    colour: str = TEXT


def box_outline(shape: tuple[int, int], box: Sequence[float], colour: str = PROMPT) -> Outline:
    """A dashed box. shape: (H, W) of the frame. box: (x0, y0, x1, y1), the outermost pixels that are inside."""
    x0, y0, x1, y1 = (int(round(float(value))) for value in box)
    mask = np.zeros(shape, bool)
    mask[max(y0, 0) : y1 + 1, max(x0, 0) : x1 + 1] = True
    return Outline(mask, colour, dashed=True)


def choose_frames(mask: np.ndarray, prompted: Sequence[int], count: int = FRAMES_SHOWN) -> tuple[int, ...]:
    """Up to `count` frames of a mask bool [T, H, W] in order: the prompted ones, others from before to behind it."""
    present = np.flatnonzero(mask.any((1, 2)))
    first, last = max(int(present[0]) - 1, 0), min(int(present[-1]) + 1, len(mask) - 1)
    frames = set(prompted[:count])
    for end in (first, last):
        if len(frames) < count:
            frames.add(end)
    while len(frames) < count:  # halve the widest gap
        order = sorted(frames)
        width, start = max(((b - a, -a) for a, b in zip(order, order[1:], strict=False)), default=(0, 0))
        if width < 2:
            break
        frames.add(-start + width // 2)
    return tuple(sorted(frames))


def crop_around(mask: np.ndarray, margin: float = MARGIN_SHARE) -> tuple[slice, slice]:
    """Rows and columns of a square around the object of a mask bool [H, W], at most the whole frame.

    Args:
        margin: share of the object's longer side that is left on each side of it.
    """
    extents = [np.flatnonzero(mask.any(axis)) for axis in (1, 0)]
    side = max(int(extent[-1] - extent[0]) + 1 for extent in extents)
    reach = max(int(side * (0.5 + margin)), MIN_CROP // 2)
    spans = []
    for extent, length in zip(extents, mask.shape, strict=True):
        start = max(min(int(extent[0] + extent[-1]) // 2 - reach, length - 2 * reach), 0)
        spans.append(slice(start, min(start + 2 * reach, length)))
    return spans[0], spans[1]


# ------------------------------------------------------------------------------------------------------- drawing


def draw_frame(frame: Frame, side: int = FRAME_SIDE, aspect: float = 1.0) -> Image.Image:
    """The frame as RGB, its longer side `side` pixels long. aspect: height over width of a pixel."""
    height, width = frame.image.shape[:2]
    ratio = min(max(height * aspect / width, 1 / 3), 3.0)
    size = (max(round(side / ratio), 1), side) if ratio > 1 else (side, max(round(side * ratio), 1))
    source = Image.fromarray(np.ascontiguousarray(frame.image)).convert("RGB")
    pixels = np.array(source.resize(size, Image.Resampling.BILINEAR))
    for outline in frame.outlines:
        _draw_outline(pixels, outline)
    drawn = Image.fromarray(pixels)
    pen = ImageDraw.Draw(drawn)
    for x, y, positive in frame.points:
        _draw_point(pen, ((x + 0.5) * size[0] / width, (y + 0.5) * size[1] / height), positive)
    if frame.note:
        place = (size[0] - 4, size[1] - 3)
        pen.text(place, frame.note, "white", _font(12), anchor="rs", stroke_width=2, stroke_fill="black")
    return drawn


def _draw_outline(pixels: np.ndarray, outline: Outline) -> None:
    from scipy.ndimage import binary_erosion

    height, width = pixels.shape[:2]
    reduced = outline.mask.shape[0] > height
    how = Image.Resampling.BOX if reduced else Image.Resampling.NEAREST
    grey = Image.fromarray(outline.mask.astype(np.uint8) * 255).resize((width, height), how)
    mask = np.asarray(grey) >= 255 * (THIN_SHARE if reduced else 0.5)
    edge = mask & ~binary_erosion(mask, iterations=OUTLINE_WIDTH)
    if outline.dashed:
        edge &= np.add.outer(np.arange(height), np.arange(width)) // DASH_LENGTH % 2 == 0
    colour = np.array(rgb(outline.colour))
    if outline.filled:
        pixels[mask] = (pixels[mask] * (1 - FILL_OPACITY) + colour * FILL_OPACITY).astype(np.uint8)
    pixels[edge] = colour


def _draw_point(pen: ImageDraw.ImageDraw, centre: tuple[float, float], positive: bool) -> None:
    """A disc for a positive point, a cross for a negative one, in the colour of prompts."""
    (x, y), r = centre, POINT_RADIUS
    if positive:
        pen.ellipse((x - r, y - r, x + r, y + r), PROMPT, "white")
        return
    for colour, width in (("white", 5), (PROMPT, 3)):
        pen.line((x - r, y - r, x + r, y + r), colour, width)
        pen.line((x - r, y + r, x + r, y - r), colour, width)


def draw_sheet(
    strips: Sequence[Strip],
    title: str = "",
    subtitle: str = "",
    legend: Sequence[tuple[str, str]] = (),
    side: int = FRAME_SIDE,
    aspect: float = 1.0,
) -> Image.Image:
    """Strips below each other, with a title above and a legend below; both wrap, so that nothing is cut.

    Args:
        legend: (name, colour). side: pixels of the longer side of each frame. aspect: height over width of a pixel.
    """
    panels = [[draw_frame(frame, side, aspect) for frame in strip.frames] for strip in strips]
    cell = max(panel.width for row in panels for panel in row)
    left = LABEL_WIDTH if any(strip.label or strip.value for strip in strips) else 0
    width = left + max(map(len, panels)) * (cell + GAP) - GAP
    width = max(width, MIN_SHEET_WIDTH if title or legend else 0)
    head = [(line, _font(17, bold=True), TEXT) for line in _wrapped(title, _font(17, bold=True), width)]
    head += [(line, _font(12), DIM) for line in _wrapped(subtitle, _font(12), width)]
    rows = _legend_rows(legend, width)
    heights = [
        max(p.height for p in row) + LINE_HEIGHT * _titled(strip) for row, strip in zip(panels, strips, strict=True)
    ]
    height = len(head) * (LINE_HEIGHT + 4) + sum(heights) + GAP * (len(strips) - 1) + len(rows) * LINE_HEIGHT
    sheet = Image.new("RGB", (width, height + GAP * bool(rows)), GROUND)
    pen, top = ImageDraw.Draw(sheet), 0
    for line, font, colour in head:
        pen.text((0, top + LINE_HEIGHT), line, colour, font, anchor="ls")
        top += LINE_HEIGHT + 4
    for strip, row, tall in zip(strips, panels, heights, strict=True):
        _draw_labels(pen, strip, top + tall // 2)
        below = top + LINE_HEIGHT * _titled(strip)
        for place, (frame, panel) in enumerate(zip(strip.frames, row, strict=True)):
            x = left + place * (cell + GAP)
            pen.text((x, below - 5), _short(frame.title, _font(12), cell), frame.title_colour, _font(12), anchor="ls")
            sheet.paste(panel, (x, below))
        top += tall + GAP
    for legend_row in rows:
        for x, name, colour in legend_row:
            pen.line((x, top + LINE_HEIGHT // 2, x + 16, top + LINE_HEIGHT // 2), colour, 3)
            pen.text((x + 21, top + LINE_HEIGHT // 2), name, TEXT, _font(12), anchor="lm")
        top += LINE_HEIGHT
    return sheet


def encode(image: Image.Image, kind: str = "WEBP", quality: int = 80) -> bytes:
    """The picture as a file's content. kind: WEBP, JPEG or PNG."""
    content = io.BytesIO()
    image.convert("RGB").save(content, kind, quality=quality)
    return content.getvalue()


def _titled(strip: Strip) -> bool:
    return any(frame.title for frame in strip.frames)


def _draw_labels(pen: ImageDraw.ImageDraw, strip: Strip, middle: int) -> None:
    right = LABEL_WIDTH - 2 * GAP
    for text, offset, size, colour in (
        (strip.label, -18, 13, strip.colour), (strip.value, 2, 20, strip.colour), (strip.detail, 20, 11, DIM),
    ):  # fmt: skip
        font = _font(size, bold=size > 11)
        pen.text((right, middle + offset), _short(text, font, right), colour, font, anchor="rm")


def _legend_rows(legend: Sequence[tuple[str, str]], width: int) -> list[list[tuple[int, str, str]]]:
    """The entries (x, name, colour) of each line of the legend."""
    rows: list[list[tuple[int, str, str]]] = []
    x = width + 1
    for name, colour in legend:
        name = _short(name, _font(12), width - 21)
        needed = 21 + int(_font(12).getlength(name))
        if x + needed > width:
            rows.append([])
            x = 0
        rows[-1].append((x, name, colour))
        x += needed + 3 * GAP
    return rows


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of at most `width` pixels."""
    lines: list[str] = []
    for word in text.split():
        word = _short(word, font, width)
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _short(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, left out in the middle where it is wider than `width` pixels."""
    shown, letters = text, len(text)
    while letters > 1 and font.getlength(shown) > width:
        letters -= 1
        shown = shorten(text, letters)
    return shown


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The font that comes with matplotlib: unlike Pillow's it has Greek, Cyrillic and accents. size: in pixels."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)
