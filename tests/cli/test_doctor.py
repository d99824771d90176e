"""`medsam2 doctor`: what it reports of this machine and of broken ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_disk import small_disk

from medsam2.cli.doctor import check_disk, check_gpus, judge


def test_the_machine_is_described_and_checked(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "medsam2.cli.main", "doctor", "--folder", str(tmp_path / "not" / "made"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    report = json.loads(done.stdout)
    states = {finding["name"]: finding["state"] for finding in report["findings"]}
    assert {"memory", "shared memory", "open files", str(tmp_path / "not" / "made")} <= states.keys()
    assert done.returncode == int("error" in states.values())
    assert report["environment"]["torch_version"] and not list(tmp_path.iterdir())
    assert all(finding["remedy"] for finding in report["findings"] if finding["state"] != "ok")


@pytest.mark.parametrize(("value", "state"), [(4, "ok"), (1, "warning"), (0.1, "error"), (-1, "ok")])
def test_a_value_is_judged_by_its_minimum(value: float, state: str) -> None:
    assert judge("memory", "", value, 2, "close programs").state == state


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "100k") as disk:
        finding = check_disk(disk)
    assert finding.state == "error" and str(disk) in finding.remedy


def test_a_driver_without_a_visible_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    (finding,) = check_gpus(SimpleNamespace(nvidia_driver_version="550.54"))
    assert finding.state == "error" and "550.54" in finding.value and "--gpus all" in finding.remedy
    (finding,) = check_gpus(SimpleNamespace(nvidia_driver_version=None))
    assert finding.state == "ok" and "trainer=cpu" in finding.value


def test_an_old_or_busy_gpu_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: (7, 5) if index == 0 else (9, 0))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda index: (2**33, 2**36))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "H100")
    old, busy = check_gpus(SimpleNamespace(nvidia_driver_version="550.54"))
    assert "16-mixed" in old.remedy and "nvidia-smi" in busy.remedy
