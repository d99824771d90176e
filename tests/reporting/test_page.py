"""A page holds every kind of block, escapes what is in them, and loads nothing."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from medsam2.reporting.page import Code, Facts, Folded, Gallery, Heading, Note, Page, Picture, Section, render
from medsam2.reporting.tables import Table, numbers, words

EVIL = "<script>alert(1)</script>"
TABLE = Table(EVIL, (*words(EVIL), *numbers("DSC")), ((EVIL, 0.5), ("all", None)), frozenset({1}), (EVIL,))
PICTURE = Picture(b"content", EVIL, colours=((EVIL, "#ff0000"),))


@pytest.fixture(scope="module")
def html() -> str:
    blocks = (TABLE, Note(EVIL, "warning"), Heading(EVIL), Facts(((EVIL, EVIL),)), PICTURE, Gallery((PICTURE,)),
              Folded(EVIL, (Code(EVIL), TABLE)))  # fmt: skip
    return render(Page(EVIL, EVIL, (Section("A & B", blocks), Section("Empty", ()))))


def test_names_from_data_are_words_and_not_html(html: str) -> None:
    tags: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append(tag)  # type: ignore[method-assign]
    parser.feed(html)
    assert "script" not in tags and html.count("&lt;script&gt;") > 12
    assert {"h1", "h2", "h3", "table", "details", "pre", "img", "figure"} <= set(tags)


def test_a_page_loads_nothing_and_links_to_its_sections(html: str) -> None:
    assert all(source.startswith(("data:", "#")) for source in re.findall(r'(?:src|href)="([^"]*)"', html))
    assert 'href="#A-B"' in html and 'id="A-B"' in html and "Empty" not in html


def test_totals_and_dashes_stand_in_the_table(html: str) -> None:
    assert html.count('<tr class="total">') == 2 and "<td>-</td>" in html and "<td>0.500</td>" in html
