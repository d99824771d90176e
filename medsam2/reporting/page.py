"""One self-contained HTML page: a title, and sections of tables, pictures, curves and notes.

    page = Page("nano", "3 of 3 cases.", (Section("Scores", (table, Folded("All scores", (wide_table,)))),))
    write_page(folder / "report.html", page)

All text is escaped; empty sections are left out. A block is a `tables.Table` or one of the classes below.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medsam2.files import atomic_write
from medsam2.reporting import style
from medsam2.reporting.tables import Table


@dataclass(frozen=True)
class Note:
    """A paragraph. level: "plain", "mark" (highlighted) or "warning"."""

    text: str
    level: str = "plain"


@dataclass(frozen=True)
class Heading:
    """A heading within a section."""

    text: str


@dataclass(frozen=True)
class Facts:
    """Short values in boxes: (value, name)."""

    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Code:
    """Preformatted text, such as a configuration."""

    text: str


@dataclass(frozen=True)
class Picture:
    """An image. content: the file's bytes. kind: webp, jpeg, png or svg+xml. colours: (name, colour) of outlines."""

    content: bytes = field(repr=False)
    caption: str = ""
    kind: str = "webp"
    colours: tuple[tuple[str, str], ...] = ()
    alt: str = ""

    @property
    def source(self) -> str:
        """The image as a data URL."""
        return f"data:image/{self.kind};base64,{base64.b64encode(self.content).decode()}"


@dataclass(frozen=True)
class Gallery:
    """Images in a grid. width: minimum width of each in CSS pixels."""

    pictures: tuple[Picture, ...]
    width: int = 186


@dataclass(frozen=True)
class Folded:
    """Blocks that the reader can fold. open: they are unfolded at first."""

    summary: str
    blocks: tuple[Block, ...]
    open: bool = False


Block = Table | Note | Heading | Facts | Code | Picture | Gallery | Folded


@dataclass(frozen=True)
class Section:
    """A part of the page with an entry in its navigation. The title may be empty in the first section."""

    title: str
    blocks: tuple[Block, ...]

    @property
    def anchor(self) -> str:
        """The target of the link in the navigation."""
        return re.sub(r"\W+", "-", self.title)


@dataclass(frozen=True)
class Page:
    """A page. lead: the paragraph below the title."""

    title: str
    lead: str
    sections: Sequence[Section]


def render(page: Page) -> str:
    """Render the page as HTML."""
    from jinja2 import Environment, FileSystemLoader

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["kind"] = lambda block: type(block).__name__
    sections = [section for section in page.sections if section.blocks]
    return environment.get_template("page.html.jinja").render(page=page, sections=sections, style=style)


def write_page(path: Path, page: Page) -> None:
    """Write the page atomically."""
    with atomic_write(path, "w") as file:
        file.write(render(page))
