"""The picture of docs/architecture.md: `python docs/figures/house.py` writes docs/images/house.svg.

Layers are those of pyproject.toml (import-linter), texts the first sentence of each package's docstring, arrows the
imports between packages. An arrow that follows from others is left out.
"""

import ast
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


def contents(name: str, letters: int) -> list[tuple[str, str]]:
    """(style, line): name, first sentence of the docstring and sub-packages; of a single file the name."""
    init = ROOT / "medsam2" / name / "__init__.py"
    document = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or "" if init.is_file() else ""
    sentence = textwrap.wrap(document.split("\n\n")[0].replace("`", ""), letters)
    parts = textwrap.wrap(
        " ".join(sorted(f"{path.parent.name}/" for path in init.parent.glob("*/__init__.py"))), letters
    )
    return [("name", name), *(("", line) for line in sentence), *(("parts", line) for line in parts)]


def imports(names: list[str]) -> list[tuple[str, str]]:
    """(importer, imported) between packages, without those that follow from others."""
    graph = grimp.build_graph("medsam2", cache_dir=None)
    for name in names:
        graph.squash_module(f"medsam2.{name}")
    edges = []
    for name in names:
        direct = graph.find_modules_directly_imported_by(f"medsam2.{name}")
        follows = {module for package in direct for module in graph.find_upstream_modules(package)}
        edges += [(name, other) for other in names if other != name and f"medsam2.{other}" in direct - follows]
    return edges


def arrow(source: Box, target: Box) -> str:
    """The path of an arrow: down to the next layer, or along the left wall, in the lane of the target's layer."""
    x, y, width, height, layer = source
    left, top, wide, high, below = target
    if below > layer + 1:
        return f"M{x},{y + height // 2}H{6 + 5 * below}V{top + high // 2}H{left}"
    start, end = x + width // 2, min(max(x + width // 2, left + 24), left + wide - 24)
    return f"M{start},{y + height}C{start},{top} {end},{y + height} {end},{top}"


def picture() -> str:
    """The SVG."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = project["tool"]["importlinter"]["contracts"][0]["layers"]
    drawn: list[str] = []
    rooms: dict[str, Box] = {}
    y = GAP // 2
    for layer, row in enumerate(layers):
        names = [name.strip() for name in row.split("|") if not name.strip().startswith("(")]
        widest = 500 if (ROOT / "medsam2" / names[0]).is_dir() else 140
        width = min(widest, (WIDTH - 2 * WALL + GAP) // len(names) - GAP)
        texts = [contents(name, (width - 20) // 8) for name in names]
        x, height = (WIDTH + GAP - (width + GAP) * len(names)) // 2, 16 + LINE * max(map(len, texts))
        for name, lines in zip(names, texts, strict=True):
            rooms[name] = (x, y, width, height, layer)
            box = f'x="{x}" y="{y}" width="{width}" height="{height}"'
            drawn.append(f'<rect {box} rx="8" fill="hsl({75 * layer % 360},60%,93%)"/>')
            for number, (style, line) in enumerate(lines):
                place = f'x="{x + width // 2}" y="{y + 23 + LINE * number}"'
                drawn.append(f'<text class="{style}" {place}>{escape(line)}</text>')
            x += width + GAP
        y += height + GAP
    edges = imports([name for name in rooms if (ROOT / "medsam2" / name).is_dir()])
    arrows = [f'<path d="{arrow(rooms[a], rooms[b])}" marker-end="url(#tip)"/>' for a, b in edges]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}">',
        f"<style>{STYLE}</style>{TIP}<path d='M0,0L8,4L0,8z' style='fill:#57606a;stroke:none'/></marker>",
        f'<rect x="1" y="1" width="{WIDTH - 2}" height="{y - 2}" rx="12" fill="#ffffff"/>',
    )
    return "\n".join([*head, *arrows, *drawn, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
