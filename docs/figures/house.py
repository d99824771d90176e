"""The picture of docs/architecture.md: `python docs/figures/house.py` writes docs/images/house.svg.

Layers are those of pyproject.toml (import-linter), texts the first sentence of each package's docstring, arrows the
imports between packages. An arrow that follows from others is left out.
"""

import ast
import colorsys
import re
import textwrap
import tomllib
from html import escape
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "images" / "house.svg"
WIDTH, WALL, GAP, LINE = 900, 60, 40, 18  # pixels: of the picture, beside the rooms, between them, of a line of text
STYLE = """text{font:14px Arial,sans-serif;fill:#1f2328;text-anchor:middle}.name{font-weight:700;font-size:17px}
.parts{font:13px monospace;fill:#57606a}rect{stroke:#8c959f}path{fill:none;stroke:#57606a;stroke-width:1.6}"""
Box = tuple[int, int, int, int, int]  # x, y, width and height in pixels, and the number of the layer
TIP = "<marker id='tip' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' markerHeight='7' orient='auto'>"


def shade(layer: int) -> str:
    """The light colour of a layer."""
    return "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(75 * layer % 360 / 360, 0.93, 0.6))


def contents(name: str, letters: int) -> list[tuple[str, str]]:
    """(style, line): name, first sentence of the docstring and sub-packages; of a single file the name."""
    init = ROOT / "medsam2" / name / "__init__.py"
    document = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or "" if init.is_file() else ""
    sentence = textwrap.wrap(document.split("\n\n")[0].replace("`", ""), letters)
    parts = textwrap.wrap(
        " ".join(sorted(f"{path.parent.name}/" for path in init.parent.glob("*/__init__.py"))), letters
    )
    return [("name", name), *(("", line) for line in sentence), *(("parts", line) for line in parts)]


def imports(layers: dict[str, int]) -> list[tuple[str, str]]:
    """(importer, imported) from packages to those of lower layers, without those that follow from others."""
    graph = grimp.build_graph("medsam2", cache_dir=None)
    for name in layers:
        graph.squash_module(f"medsam2.{name}")
    direct = {
        name: {
            other
            for other in layers
            if layers[other] > layers[name]
            and f"medsam2.{other}" in graph.find_modules_directly_imported_by(f"medsam2.{name}")
        }
        for name in layers
    }
    reached: dict[str, set[str]] = {}
    for name in sorted(layers, key=lambda name: -layers[name]):
        reached[name] = direct[name].union(*(reached[other] for other in direct[name]))
    return [
        (name, other)
        for name, others in direct.items()
        for other in sorted(others)
        if not any(other in reached[between] for between in others)
    ]


def arrow(source: Box, target: Box, first: bool) -> str:
    """The path of an arrow: down to the next layer, or along the left wall, in the lane of the target's layer.

    Args:
        first: the target is the first room of its layer; others are reached through the gap above them.
    """
    x, y, width, height, layer = source
    left, top, wide, high, below = target
    if below == layer + 1:
        start, end = x + width // 2, min(max(x + width // 2, left + 24), left + wide - 24)
        return f"M{start},{y + height}C{start},{top} {end},{y + height} {end},{top}"
    lane = f"M{x},{y + height // 2}H{6 + 4 * below}"
    return f"{lane}V{top + high // 2}H{left}" if first else f"{lane}V{top - GAP // 2}H{left + wide // 2}V{top}"


def picture() -> str:
    """The SVG."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = project["tool"]["importlinter"]["contracts"][0]["layers"]
    drawn: list[str] = []
    rooms: dict[str, Box] = {}
    firsts: list[str] = []
    y = GAP // 2
    for layer, row in enumerate(layers):
        names = re.split(r"\s*[|:]\s*", row)
        firsts.append(names[0])
        widest = 500 if (ROOT / "medsam2" / names[0]).is_dir() else 140
        width = min(widest, (WIDTH - 2 * WALL + GAP) // len(names) - GAP)
        texts = [contents(name, (width - 20) // 8) for name in names]
        x, height = (WIDTH + GAP - (width + GAP) * len(names)) // 2, 16 + LINE * max(map(len, texts))
        for name, lines in zip(names, texts, strict=True):
            rooms[name] = (x, y, width, height, layer)
            box = f'x="{x}" y="{y}" width="{width}" height="{height}"'
            drawn.append(f'<rect {box} rx="8" fill="{shade(layer)}"/>')
            for number, (style, line) in enumerate(lines):
                place = f'x="{x + width // 2}" y="{y + 23 + LINE * number}"'
                drawn.append(f'<text class="{style}" {place}>{escape(line)}</text>')
            x += width + GAP
        y += height + GAP
    packages = {name: room[4] for name, room in rooms.items() if (ROOT / "medsam2" / name).is_dir()}
    arrows = [
        f'<path d="{arrow(rooms[a], rooms[b], firsts[packages[b]] == b)}" marker-end="url(#tip)"/>'
        for a, b in imports(packages)
    ]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}">',
        f"<style>{STYLE}</style>{TIP}<path d='M0,0L8,4L0,8z' style='fill:#57606a;stroke:none'/></marker>",
        f'<rect x="1" y="1" width="{WIDTH - 2}" height="{y - 2}" rx="12" fill="#ffffff"/>',
    )
    return "\n".join([*head, *arrows, *drawn, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
