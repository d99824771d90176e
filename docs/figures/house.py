"""The picture of docs/architecture.md: `python docs/figures/house.py` writes docs/images/house.svg.

Rooms and layers are those of pyproject.toml (import-linter), texts the first sentence of each package's docstring,
arrows the imports that the code has. An arrow that follows from others is left out, as are those to single files.
"""

from __future__ import annotations

import ast
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "images" / "house.svg"
WIDTH, MARGIN, GAP, LINE = 900, 60, 34, 18  # pixels
ROOM, FILE = 500, 140  # widest room, widest file
COLOURS = ("#e8f0fb", "#e6f4ea", "#fdf3dc", "#f6e8f5", "#e4f3f5", "#fbe9e4")
STYLE = """text{font-family:Arial,sans-serif;font-size:14px;fill:#1f2328}.name{font-weight:700;font-size:17px}
.parts{font-family:monospace;font-size:13px;fill:#57606a}rect{stroke:#8c959f}
path{fill:none;stroke:#57606a;stroke-width:1.6}"""


@dataclass(frozen=True)
class Room:
    """A package of the house, or a file that stands alone, and its box in pixels."""

    name: str
    lines: tuple[str, ...]
    parts: tuple[str, ...]
    level: int
    x: int
    y: int
    width: int
    height: int

    @property
    def middle(self) -> int:
        return self.x + self.width // 2


def layers() -> list[list[str]]:
    """Names of the rooms of each layer, the highest first."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    rows = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    names = [[name.strip() for name in row.split("|")] for row in rows]
    return [[name for name in row if not name.startswith("(")] for row in names]


def rooms() -> Iterator[Room]:
    """All rooms with their places."""
    y = MARGIN // 2
    for level, names in enumerate(layers()):
        packages = [(ROOT / "medsam2" / name).is_dir() for name in names]
        most = ROOM if any(packages) else FILE
        width = min(most, (WIDTH - 2 * MARGIN - GAP * (len(names) - 1)) // len(names))
        left = (WIDTH - width * len(names) - GAP * (len(names) - 1)) // 2
        texts = [contents(name, width) for name in names]
        height = 34 + LINE * max(len(lines) + len(parts) for lines, parts in texts)
        for place, (name, (lines, parts)) in enumerate(zip(names, texts, strict=True)):
            yield Room(name, lines, parts, level, left + place * (width + GAP), y, width, height)
        y += height + GAP + 8 * any(packages)


def contents(name: str, width: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(first sentence of a package's docstring, its sub-packages), each wrapped to the width of the box."""
    folder = ROOT / "medsam2" / name
    if not folder.is_dir():
        return (), ()
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    sentence = " ".join(text.split("\n\n")[0].split()).replace("`", "")
    parts = sorted(f"{path.parent.name}/" for path in folder.glob("*/__init__.py"))
    return tuple(textwrap.wrap(sentence, (width - 20) // 8)), tuple(textwrap.wrap("  ".join(parts), (width - 20) // 8))


def imports(names: set[str]) -> set[tuple[str, str]]:
    """(importer, imported) between rooms, without those that follow from others."""
    graph = grimp.build_graph("medsam2", cache_dir=None)
    home = {module: module.split(".")[1] for module in graph.modules if module.count(".")}
    edges = {
        (home[module], home[target])
        for module in home
        for target in graph.find_modules_directly_imported_by(module)
        if home.get(target) != home[module] and {home[module], home.get(target)} <= names
    }

    def reaches(start: str, end: str) -> bool:
        return any(a == start and (b == end or reaches(b, end)) for a, b in edges)

    return {(a, b) for a, b in edges if not any(c == a and d != b and reaches(d, b) for c, d in edges)}


def arrow(source: Room, target: Room, between: list[Room]) -> str:
    """A path from one room down to another, past the rooms between them."""
    free = (source.middle, target.middle, MARGIN // 2, WIDTH - MARGIN // 2, WIDTH // 2)
    blocked = [(room.x - 8, room.x + room.width + 8) for room in between]
    lane = next(x for x in free if not any(low < x < high for low, high in blocked))
    start = min(max(lane, source.x + 24), source.x + source.width - 24)
    end = min(max(lane, target.x + 24), target.x + target.width - 24)
    top, bottom = source.y + source.height, target.y - 4
    if start == lane == end:
        return f"M{start},{top}V{bottom}"
    leave, arrive = top + GAP, between[-1].y + between[-1].height if between else top
    down = f"M{start},{top}C{start},{leave} {lane},{top} {lane},{leave}V{arrive}" if between else f"M{start},{top}"
    return f"{down}C{lane},{bottom} {end},{arrive} {end},{bottom}"


def picture() -> str:
    """The SVG."""
    every = {room.name: room for room in rooms()}
    packages = {name for name in every if (ROOT / "medsam2" / name).is_dir()}
    height = max(room.y + room.height for room in every.values()) + MARGIN // 2
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">',
        f"<style>{STYLE}</style><defs><marker id='tip' viewBox='0 0 8 8' refX='5' refY='4' markerWidth='7' "
        "markerHeight='7' orient='auto'><path d='M0,0L8,4L0,8z' style='fill:#57606a;stroke:none'/></marker></defs>",
        f'<rect x="1" y="1" width="{WIDTH - 2}" height="{height - 2}" rx="12" fill="#ffffff"/>',
    ]
    for a, b in sorted(imports(packages)):
        source, target = every[a], every[b]
        between = [room for room in every.values() if source.level < room.level < target.level]
        drawn.append(f'<path d="{arrow(source, target, between)}" marker-end="url(#tip)"/>')
    for room in every.values():
        colour = COLOURS[room.level % len(COLOURS)]
        box = f'x="{room.x}" y="{room.y}" width="{room.width}" height="{room.height}"'
        drawn.append(f'<rect {box} rx="8" fill="{colour}"/>')
        lines = [("name", room.name), *(("", line) for line in room.lines), *(("parts", line) for line in room.parts)]
        for number, (kind, line) in enumerate(lines):
            place = f'x="{room.middle}" y="{room.y + 23 + LINE * number}" text-anchor="middle"'
            drawn.append(f'<text class="{kind}" {place} xml:space="preserve">{escape(line)}</text>')
    return "\n".join([*drawn, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
