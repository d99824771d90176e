"""The pages and pictures of docs/ that are made from the code are current, and every key is described."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import yaml

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture(scope="module")
def configuration() -> str:
    return str(runpy.run_path(str(DOCS / "reference" / "configuration.py"))["page"]())


def test_the_reference_of_all_keys_is_current(configuration: str) -> None:
    page = (DOCS / "reference" / "configuration.md").read_text(encoding="utf-8")
    assert page == configuration, "run `make docs-pages` and commit docs/reference/configuration.md"


def test_every_key_is_described(configuration: str) -> None:
    rows = [line.strip("| ").split(" | ") for line in configuration.splitlines() if line.startswith("| `")]
    assert len(rows) > 150
    assert [row[0] for row in rows if len(row) < 2 or not row[-1].strip()] == []


def test_the_picture_of_the_house_is_current() -> None:
    picture = (DOCS / "images" / "house.svg").read_text(encoding="utf-8")
    current = runpy.run_path(str(DOCS / "figures" / "house.py"))["picture"]()
    assert picture == current, "run `make docs-pages` and commit docs/images/house.svg"


def test_every_page_stands_in_the_navigation() -> None:
    def pages(entry: object) -> list[str]:
        if isinstance(entry, dict):
            return [page for inner in entry.values() for page in pages(inner)]
        return [page for inner in entry for page in pages(inner)] if isinstance(entry, list) else [str(entry)]

    text = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    listed = pages(yaml.safe_load(text.replace("!!python/object/apply:pymdownx.slugs.slugify", ""))["nav"])
    assert sorted(listed) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
