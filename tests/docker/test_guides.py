"""The commands of the guides to machines are true: they compose, and what they name exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from medsam2.cli.main import build_app
from medsam2.config import compose, validate
from medsam2.training.settings import TrainSettings

ROOT = Path(__file__).resolve().parents[2]
HOW_TO = ("one-gpu", "one-node", "slurm", "kubernetes", "remote-shards", "train")
TUTORIALS = ("quick-start", "your-first-dataset")
GUIDES = [ROOT / "docs" / "how-to" / f"{name}.md" for name in HOW_TO]
GUIDES += [ROOT / "docs" / "tutorials" / f"{name}.md" for name in TUTORIALS]
COMMAND = re.compile(r"^ {4}\S.*", re.MULTILINE)


def commands(word: str) -> list[tuple[str, list[str]]]:
    """(guide, words behind `word`) of every command that calls it, continued lines joined."""
    found = []
    for guide in GUIDES:
        for text in COMMAND.findall(guide.read_text().replace("\\\n", " ")):
            for part in re.split(r" && | & |;", text):
                words = shlex.split(part, comments=True)
                if word in words:
                    found.append((guide.stem, words[words.index(word) + 1 :]))
    return found


@pytest.mark.parametrize(("guide", "words"), commands("train.py"))
def test_every_run_of_a_guide_composes(guide: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    sweep = "--multirun" in words
    given = [word for word in words if "=" in word and not word.startswith(("--", "hydra"))]
    for key, value in (("data.shards", "S"), ("output", "O")):  # "..." stands for what the reader has
        given += [f"{key}={value}"] * (not any(word.startswith(f"{key}=") for word in given))
    given = [word.split(",")[0] for word in given] if sweep else given
    assert validate(TrainSettings, compose("train", given)).output


def test_the_guides_call_train_py_and_doctor() -> None:
    assert {guide for guide, _ in commands("train.py")} == {*HOW_TO, *TUTORIALS} - {"kubernetes"}
    assert [guide for guide, _ in commands("doctor")] == ["one-gpu", "one-gpu", "one-node"]


@pytest.mark.parametrize("words", [words for guide, words in commands("doctor") if "--folder" in words])
def test_every_call_of_doctor_is_understood(words: list[str]) -> None:
    done = CliRunner().invoke(build_app(["doctor"]), ["doctor", *words, "--help"])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_what_a_guide_links_to_and_names_exists(guide: Path) -> None:
    text = guide.read_text()
    for target in re.findall(r"\]\(([\w./-]+\.md)\)", text):
        assert (guide.parent / target).is_file(), target
    for name in re.findall(r"docker/[\w.]+", text):
        assert (ROOT / name.rstrip(".")).is_file(), name
