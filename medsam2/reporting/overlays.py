"""Draw outlines, boxes and points over frames, singly or as a sheet of strips with captions and a legend.

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
MIN_SHEET_WIDTH = 360  # pixels: room for title and legend with a single narrow frame
OUTLINE_WIDTH, DASH_LENGTH, POINT_RADIUS = 2, 5, 5  # pixels of the drawn frame
FILL_OPACITY = 0.18
MIN_MASK_SHARE = 0.25  # of a drawn pixel, to belong to a reduced mask; 0.5 would lose thin structures
GAP = 6  # pixels between frames
MARGIN_SHARE = 0.35  # of the object's longer side, on each side of it
MIN_CROP_SIDE = 48  # pixels of the frame
NUM_FRAMES = 5


@dataclass(frozen=True, eq=False)
class Outline:
    """The inner edge of a mask bool [H, W]. filled: tint the area inside. dashed: draw dashes, as for prompts."""

    mask: np.ndarray
    colour: str
    filled: bool = False
    dashed: bool = False


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame with its overlays.

    Attributes:
        image: uint8 [H, W] or [H, W, 3]. outlines: later ones cover earlier ones.
        points: (x, y, positive) in pixels of the frame.
        title: text in the upper left corner. note: text in the lower right corner.
    """

    image: np.ndarray
    outlines: tuple[Outline, ...] = ()
    points: tuple[tuple[float, float, bool], ...] = ()
    title: str = ""
    note: str = ""


@dataclass(frozen=True, eq=False)
class Strip:
    """Frames side by side, below a caption: label and value in the strip's colour, and a detail."""

    frames: tuple[Frame, ...]
    label: str = ""
    value: str = ""
    detail: str = ""
    colour: str = TEXT


def box_outline(shape: tuple[int, int], box: Sequence[float], colour: str = PROMPT) -> Outline:
    """Make a dashed box. shape: (H, W) of the frame. box: (x0, y0, x1, y1), the outermost pixels inside."""
    x0, y0, x1, y1 = (int(round(float(value))) for value in box)
    mask = np.zeros(shape, bool)
    mask[max(y0, 0) : y1 + 1, max(x0, 0) : x1 + 1] = True
    return Outline(mask, colour, dashed=True)


def choose_frames(mask: np.ndarray, prompted: Sequence[int], count: int = NUM_FRAMES) -> tuple[int, ...]:
    """Choose up to `count` frames of a mask bool [T, H, W]: the prompted ones, and others spread over the object.

    The others reach from one frame before the object to one after it.
    """
    present = np.flatnonzero(mask.any((1, 2)))
    first, last = max(int(present[0]) - 1, 0), min(int(present[-1]) + 1, len(mask) - 1)
    others = [frame for frame in range(first, last + 1) if frame not in prompted]
    places = np.linspace(0, len(others) - 1, min(max(count - len(prompted), 0), len(others))).round().astype(int)
    return tuple(sorted([*prompted[:count], *(others[place] for place in places)]))


def crop_around(mask: np.ndarray, margin: float = MARGIN_SHARE) -> tuple[slice, slice]:
    """Rows and columns of a square around the object of a mask bool [H, W], at most the whole frame.

    Args:
        margin: added on each side, as a share of the object's longer side.
    """
    extents = [np.flatnonzero(mask.any(axis)) for axis in (1, 0)]
    side = max(int(extent[-1] - extent[0]) + 1 for extent in extents)
    reach = max(int(side * (0.5 + margin)), MIN_CROP_SIDE // 2)
    spans = []
    for extent, length in zip(extents, mask.shape, strict=True):
        start = max(min(int(extent[0] + extent[-1]) // 2 - reach, length - 2 * reach), 0)
        spans.append(slice(start, min(start + 2 * reach, length)))
    return spans[0], spans[1]


# ------------------------------------------------------------------------------------------------------- drawing


def draw_frame(frame: Frame, side: int = FRAME_SIDE, aspect: float = 1.0) -> Image.Image:
    """Draw the frame in RGB, its longer side `side` pixels long. aspect: height over width of a pixel."""
    height, width = frame.image.shape[:2]
    ratio = min(max(height * aspect / width, 1 / 3), 3.0)
    size = (max(round(side / ratio), 1), side) if ratio > 1 else (side, max(round(side * ratio), 1))
    source = Image.fromarray(np.ascontiguousarray(frame.image)).convert("RGB")
    pixels = np.array(source.resize(size, Image.Resampling.BILINEAR))
    for outline in frame.outlines:
        _draw_outline(pixels, outline)
    drawn = Image.fromarray(pixels)
    pen = ImageDraw.Draw(drawn)
    for x, y, positive in frame.points:  # a disc for a positive point, a ring for a negative one
        left, top = (x + 0.5) * size[0] / width - POINT_RADIUS, (y + 0.5) * size[1] / height - POINT_RADIUS
        circle = (left, top, left + 2 * POINT_RADIUS, top + 2 * POINT_RADIUS)
        pen.ellipse(circle, PROMPT if positive else None, "white" if positive else PROMPT, 2)
    for text, place, anchor in ((frame.title, (4, 3), "la"), (frame.note, (size[0] - 4, size[1] - 4), "rs")):
        pen.text(
            place, _fit_text(text, _font(12), size[0]), "white", _font(12), anchor, stroke_width=2, stroke_fill="black"
        )
    return drawn


def _draw_outline(pixels: np.ndarray, outline: Outline) -> None:
    from scipy.ndimage import binary_erosion

    height, width = pixels.shape[:2]
    reduced = outline.mask.shape[0] > height
    resampling = Image.Resampling.BOX if reduced else Image.Resampling.NEAREST
    grey = Image.fromarray(outline.mask.astype(np.uint8) * 255).resize((width, height), resampling)
    mask = np.asarray(grey) >= 255 * (MIN_MASK_SHARE if reduced else 0.5)
    edge = mask & ~binary_erosion(mask, iterations=OUTLINE_WIDTH)
    if outline.dashed:
        edge &= np.add.outer(np.arange(height), np.arange(width)) // DASH_LENGTH % 2 == 0
    colour = np.array(rgb(outline.colour))
    if outline.filled:
        pixels[mask] = (pixels[mask] * (1 - FILL_OPACITY) + colour * FILL_OPACITY).astype(np.uint8)
    pixels[edge] = colour


def draw_sheet(
    strips: Sequence[Strip],
    title: str = "",
    subtitle: str = "",
    legend: Sequence[tuple[str, str]] = (),
    side: int = FRAME_SIDE,
    aspect: float = 1.0,
) -> Image.Image:
    """Draw strips below each other, with a title above and a legend below; long text wraps.

    Args:
        legend: (name, colour). side: longer side of each frame in pixels. aspect: height over width of a pixel.
    """
    rows = [[draw_frame(frame, side, aspect) for frame in strip.frames] for strip in strips]
    cell = max(panel.width for row in rows for panel in row)
    width = max(map(len, rows)) * (cell + GAP) - GAP
    width = max(width, MIN_SHEET_WIDTH) if title or legend else width
    blocks = [_text_block([(title, TEXT, "")], width, 17), _text_block([(subtitle, DIM, "")], width)]
    for strip, row in zip(strips, rows, strict=True):
        caption = [(strip.label, strip.colour, ""), (strip.value, strip.colour, ""), (strip.detail, DIM, "")]
        band = Image.new("RGB", (width, max(panel.height for panel in row) + GAP), GROUND)
        for place, panel in enumerate(row):
            band.paste(panel, (place * (cell + GAP), 0))
        blocks += [_text_block(caption, width, 14), band]
    blocks.append(_text_block([(name, TEXT, colour) for name, colour in legend], width))
    return Image.fromarray(np.concatenate([np.asarray(block) for block in blocks]))


def encode(image: Image.Image, kind: str = "WEBP", quality: int = 80) -> bytes:
    """Encode the image. kind: WEBP, JPEG or PNG."""
    content = io.BytesIO()
    image.convert("RGB").save(content, kind, quality=quality)
    return content.getvalue()


def _text_block(parts: Sequence[tuple[str, str, str]], width: int, size: int = 12) -> Image.Image:
    """Draw wrapped text; of height 0 without words. parts: (text, its colour, colour of a dot before it)."""
    font, line = _font(size, bold=size > 12), size + 8
    words: list[tuple[float, int, str, str, str]] = []
    x, y = 0.0, 0
    for text, colour, dot in parts:
        for place, word in enumerate(text.split()):
            word, indent = _fit_text(word, font, width - size), size if dot and not place else 0
            if x and x + indent + font.getlength(word) > width:
                x, y = 0.0, y + line
            words.append((x, y, word, colour, dot if indent else ""))
            x += indent + font.getlength(f"{word} ")
        x += GAP
    block = Image.new("RGB", (width, y + line if words else 0), GROUND)
    pen = ImageDraw.Draw(block)
    for x, y, word, colour, dot in words:
        if dot:
            pen.ellipse((x, y + 6, x + size - 4, y + size + 2), dot)
        pen.text((x + size * bool(dot), y + size + 1), word, colour, font, anchor="ls")
    return block


def _fit_text(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Shorten the text in the middle until it is at most `width` pixels wide."""
    shortened, length = text, len(text)
    while length > 1 and font.getlength(shortened) > width:
        length -= 1
        shortened = shorten(text, length)
    return shortened


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Load the font of matplotlib, which has Greek, Cyrillic and accents, unlike Pillow's. size: in pixels."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)
