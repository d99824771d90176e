"""Text of DICOM tags: nowhere in what is written or printed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from dicom_files import CANARIES, write_seg, write_series

STORED = np.random.default_rng(0).integers(0, 3000, (6, 20, 24)).astype(np.uint16)
MASK = np.zeros((6, 20, 24), bool)
MASK[1:5, 4:12, 5:20] = True


def test_no_text_of_a_tag_is_written_or_printed(tmp_path: Path):
    for number in range(1, 4):
        slices = write_series(tmp_path / "raw" / f"scan{number}", STORED + number, uid=str(number))
        write_seg(tmp_path / "raw" / f"scan{number}" / "seg.dcm", slices, {"organ": MASK})
    write_series(tmp_path / "raw" / "no_mask", STORED, uid="7")
    broken = write_series(tmp_path / "raw" / "broken", STORED, uid="8")
    write_seg(tmp_path / "raw" / "broken" / "seg.dcm", broken, {"organ": MASK})
    broken[2].write_bytes(broken[2].read_bytes()[:-50])
    commands = (
        ("prepare", "raw", "--out", "shards", "--dry-run"),
        ("prepare", "raw", "--out", "shards"),
        ("inspect", "shards", "--html", "shards.html"),
        ("inspect", "raw", "--html", "raw.html"),
    )
    printed = ""
    for command in commands:
        run = subprocess.run(
            [sys.executable, "-m", "medsam2.cli.main", *command], cwd=tmp_path, capture_output=True, text=True
        )
        assert run.returncode in (0, 1), run.stderr
        printed += run.stdout + run.stderr
    assert "2 cases failed" in printed
    written = [p for p in tmp_path.rglob("*") if p.is_file() and "raw" not in p.relative_to(tmp_path).parts]
    assert {"index.arrow", "index.json", "failures.jsonl", "shards.html", "raw.html"} <= {p.name for p in written}
    for canary in (*CANARIES, "1.2.3.987654"):
        assert canary not in printed, canary
        for path in written:
            assert canary.encode() not in path.read_bytes(), (canary, path)


def test_no_text_of_a_tag_is_inside_of_what_is_compressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import tarfile

    import zstandard

    from medsam2.shards.prepare.run import PrepareOptions, prepare

    monkeypatch.chdir(tmp_path)
    for number in range(1, 4):
        slices = write_series(Path("raw") / f"scan{number}", STORED + number, uid=str(number))
        write_seg(Path("raw") / f"scan{number}" / "seg.dcm", slices, {"organ": MASK})
    prepare("raw", "shards", PrepareOptions())
    texts = [path.read_bytes() for path in Path("shards").rglob("*") if path.is_file()]
    members = 0
    for path in Path("shards").rglob("*.tar"):
        with tarfile.open(path) as tar:
            for entry in tar:
                texts.append(entry.name.encode())
                content = tar.extractfile(entry)
                if content is not None and entry.name.endswith(".zst"):
                    texts.append(zstandard.ZstdDecompressor().decompressobj().decompress(content.read()))
                    members += 1
    assert members >= 12
    for canary in (*CANARIES, "1.2.3.987654"):
        assert not any(canary.encode() in text for text in texts), canary
