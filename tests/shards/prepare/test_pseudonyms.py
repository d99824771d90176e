from __future__ import annotations

import re
import stat
from pathlib import Path

import pytest

from medsam2.errors import UserError
from medsam2.shards.prepare.pseudonyms import read_salt, salt_file, salted_hash, slug


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MEDSAM2_SALT")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path


def test_the_salt_is_made_once_for_its_owner_alone(config: Path):
    salt = read_salt()
    assert len(salt) == 64
    assert read_salt() == salt
    assert stat.S_IMODE(salt_file().stat().st_mode) == 0o600
    assert [p.name for p in salt_file().parent.iterdir()] == ["salt"]


def test_a_given_salt_makes_no_file(config: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MEDSAM2_SALT", "mine")
    assert read_salt() == b"mine"
    assert not salt_file().exists()


def test_an_empty_salt_is_refused(config: Path):
    salt_file().parent.mkdir(parents=True)
    salt_file().write_text("")
    with pytest.raises(UserError, match="is empty"):
        read_salt()


def test_hashes_depend_on_salt_kind_data_set_and_name():
    one = salted_hash(b"s", "case", "d", "smith")
    assert re.fullmatch("[0-9a-f]{16}", one)
    others = [salted_hash(b"t", "case", "d", "smith"), salted_hash(b"s", "patient", "d", "smith"),
              salted_hash(b"s", "case", "e", "smith"), salted_hash(b"s", "case", "d", "smit")]  # fmt: skip
    assert len({one, *others}) == 5


@pytest.mark.parametrize("name", ["a.b", "a b", "ä/ö", "...", "x" * 80, "-a"])
def test_odd_names_become_keys_without_dots(name: str):
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,45}", slug(name))


def test_plain_names_stay_and_odd_ones_do_not_meet():
    assert slug("Dataset001_CT") == "Dataset001_CT"
    assert slug("a.b") != slug("a b")
