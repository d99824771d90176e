"""The whole evaluation: files, table, leaks, and the errors of `python evaluate.py` as a user meets them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from medsam2.config import compose
from medsam2.errors import UserError
from medsam2.evaluation.evaluate import evaluate
from medsam2.evaluation.report.report import Report
from medsam2.evaluation.run.checkpoints import short_names
from medsam2.evaluation.settings import (
    CorruptionSettings,
    EvaluateSettings,
    ProtocolSettings,
    SourceSettings,
    load_settings,
)
from medsam2.model.build import find_device, load_model, save_asset
from medsam2.prompts.settings import PromptSettings
from medsam2.shards.index import read_index

ROOT = Path(__file__).resolve().parents[2]


def _settings(checkpoints: tuple[Path, ...], source: Path, output: Path, **more: object) -> EvaluateSettings:
    return EvaluateSettings(
        checkpoint=tuple(map(str, checkpoints)),
        data=SourceSettings(source=str(source)),
        protocol=ProtocolSettings(name="largest_box_both"),
        output=str(output),
        **{"resamples": 200, **more},  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def result(checkpoints: tuple[Path, Path], shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    output = tmp_path_factory.mktemp("evaluation") / "out"
    return evaluate(_settings(checkpoints, shards, output, split="all", limit=1, overlays=1))


def _output(report: Report) -> Path:
    return Path(report.settings.output)


def test_there_is_one_row_per_checkpoint_case_and_object(result: Report) -> None:
    rows = result.rows
    assert set(rows["checkpoint"]) == {"before", "after"}
    assert not rows.duplicated(["checkpoint", "dataset", "case", "object"]).any()
    first, second = (rows[rows["checkpoint"] == label] for label in ("before", "after"))
    keys = ["dataset", "case", "object", "structure", "voxels"]
    assert first[keys].to_records(index=False).tolist() == second[keys].to_records(index=False).tolist()


def test_the_folder_holds_equal_tables_and_a_documented_summary(result: Report) -> None:
    parquet, csv = (
        pd.read_parquet(_output(result) / "cases.parquet"),
        pd.read_csv(_output(result) / "cases.csv"),
    )
    assert len(parquet) == len(csv) == len(result.rows)
    assert parquet["dsc"].tolist() == pytest.approx(csv["dsc"].tolist())
    summary = json.loads((_output(result) / "summary.json").read_text())
    assert summary == json.loads(json.dumps(result.summary))
    assert summary["checkpoints"] == ["before", "after"] and summary["grid"] == "stored"
    total = summary["groups"][-1]
    assert (total["modality"], total["structure"]) == ("all", "all")
    assert set(total["dsc"]) == {"before", "after"}
    assert set(total["dsc_change"]) == {"from", "to", "mean", "low", "high"}
    assert summary["groups"] == summary["protocols"][0]["groups"] and summary["failures"] == []
    assert [model["label"] for model in summary["models"]] == ["before", "after"]
    assert not any(model["records_cases"] for model in summary["models"])
    assert {g["modality"] for g in summary["groups"]} == {"CT", "US", "ENDOSCOPY", "all"}


def test_the_page_is_self_contained_and_shows_the_pictures(result: Report) -> None:
    page = (_output(result) / "report.html").read_text()
    pictures = [
        *_output(result).glob("overlays/*/*.png"),
        *_output(result).glob("worst/*/*.png"),
    ]
    assert pictures and page.count("data:image/webp;base64,") == len(pictures)
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "unknown: the file does not record its training cases" in page
    assert page.count("<tr") == page.count("</tr>") and "largest_box_both" in page


def test_every_form_says_how_many_cases_a_limit_took(result: Report) -> None:
    available, taken = result.summary["available"], result.summary["cases"]
    assert available == 11 and taken < available
    for name in ("report.html", "summary.md", "summary.tex"):
        assert f"{taken} of {available} (limit=1)." in (_output(result) / name).read_text()


def test_names_of_patients_are_nowhere(result: Report) -> None:
    for path in _output(result).rglob("*"):
        if path.is_file():
            assert b"smith" not in path.read_bytes() and "smith" not in path.name


def test_the_worst_objects_of_the_last_checkpoint_have_pictures(result: Report) -> None:
    after = result.rows[result.rows["checkpoint"] == "after"].sort_values("dsc", kind="stable")
    names = sorted(path.name for path in _output(result).glob("worst/largest_box_both/*.png"))
    assert len(names) == min(6, len(after))
    for place, (name, row) in enumerate(zip(names, after.to_dict("records"), strict=False), 1):
        assert name.startswith(f"{place:02d}_{row['modality']}_{row['structure']}_") and row["case"][:8] in name


def test_a_case_that_was_trained_on_is_reported_as_a_leak(
    checkpoints: tuple[Path, Path], shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_model(checkpoints[0])
    table = read_index(shards).table
    trained_on = table["content_hash"].to_pylist()[table["split"].to_pylist().index("val")]
    save_asset(tmp_path / "leaky.safetensors", loaded.sam.state_dict(), loaded.spec, {"content_hashes": [trained_on]})
    pair = (checkpoints[0], tmp_path / "leaky.safetensors")
    report = evaluate(_settings(pair, shards, tmp_path / "out", overlays=0))
    assert report.summary["leaks"] == {"before": 0, "leaky": 1}
    rows = report.rows
    assert rows[rows["leak"]]["checkpoint"].unique().tolist() == ["leaky"]
    printed = capsys.readouterr().out
    assert "Leak: leaky was trained on 1 of these cases" in printed and "leaky‡" in printed
    assert re.search(r"split\s+val:\s+(\d+)\s+of\s+\1\s+cases\.", printed)
    for name in ("report.html", "summary.md", "summary.tex"):
        text = (tmp_path / "out" / name).read_text()
        assert "Leak: leaky was trained on 1 of these cases" in text
        assert "trained on 1 of these cases" in text


def test_raw_data_scores_as_its_shards_do(
    checkpoints: tuple[Path, Path], raw_folder: Path, shards: Path, tmp_path: Path
) -> None:
    recist = raw_folder / "recist"
    raw = evaluate(_settings(checkpoints[:1], recist, tmp_path / "raw", overlays=0)).rows
    stored = evaluate(_settings(checkpoints[:1], shards, tmp_path / "stored", overlays=0, split="all")).rows
    merged = raw.merge(stored, on=["dataset", "case", "structure"], suffixes=("", "_stored"))
    whole = merged[merged["frames"] == merged["frames_stored"]]
    assert len(whole) and whole["dsc"].tolist() == pytest.approx(whole["dsc_stored"].tolist())
    assert whole["nsd"].tolist() == pytest.approx(whole["nsd_stored"].tolist())


def test_an_unreadable_case_is_named_to_the_user_and_without_its_name_in_the_failure_sheet(
    checkpoints: tuple[Path, Path], write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write.nnunet(tmp_path / "Dataset009_Broken", cases=2)
    broken = folder / "imagesTr" / "smith_000_0000.nii.gz"
    broken.write_bytes(broken.read_bytes()[:400])
    report = evaluate(_settings(checkpoints[:1], folder, tmp_path / "out", overlays=0, max_failed=0.5))
    assert report.summary["failed"] == 1 and report.summary["cases"] == 2 and report.rows["case"].nunique() == 1
    captured = capsys.readouterr()
    assert "1 of 2 cases failed" in captured.out and "smith_000" in captured.err.replace("\n", "")
    sheet = pd.read_csv(tmp_path / "out" / "failures.csv")
    assert sheet["stage"].tolist() == ["read"] and sheet["case"].iloc[0] not in set(report.rows["case"])
    for name in ("failures.csv", "summary.json", "summary.md", "summary.tex", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        assert "(case)" in text and "smith" not in text


@pytest.mark.slow
def test_several_protocols_and_corruptions_have_tables_of_their_own(
    checkpoints: tuple[Path, Path], write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    protocols = (ProtocolSettings(name="box"), ProtocolSettings(name="first_mask", slices="first", prompt="mask"))
    damage = CorruptionSettings(names=("gaussian_noise",), severities=(1, 5))
    report = evaluate(
        _settings(
            checkpoints, write.nnunet(tmp_path / "Dataset003_Few", cases=3), tmp_path / "out",
            protocols=protocols, corruption=damage, overlays=0, worst=0,
        )
    )  # fmt: skip
    rows = report.rows
    counts = rows.groupby(["protocol", "corruption", "severity"]).size()
    assert counts.to_dict() == {
        (protocol, *version): 12
        for protocol in ("box", "first_mask")
        for version in (("", 0), ("gaussian_noise", 1), ("gaussian_noise", 5))
    }
    clean, noisy = (rows[rows["severity"] == severity]["dsc"].to_numpy() for severity in (0, 5))
    assert (clean != noisy).any()
    entries = report.summary["protocols"]
    assert [entry["protocol"]["name"] for entry in entries] == ["box", "first_mask"]
    for entry in entries:
        clean = rows[(rows["protocol"] == entry["protocol"]["name"]) & (rows["corruption"] == "")]
        assert entry["groups"][-1]["dsc"]["after"] == pytest.approx(clean[clean["checkpoint"] == "after"]["dsc"].mean())
        assert entry["robustness"][0]["corruption"] == "gaussian_noise"
        assert {test["to"] for test in entry["comparisons"]} == {"after"}
    out = capsys.readouterr().out
    assert all(
        out.count(f"{name}: {table}") == 1 for name in ("box", "first_mask") for table in ("scores", "robustness")
    )
    assert max(len(line) for line in out.splitlines() if "report.html" not in line) <= 80
    page, tex = (tmp_path / "out" / "report.html").read_text(), (tmp_path / "out" / "summary.tex").read_text()
    assert page.count("data:image/png") == 2
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") == 10


def test_protocols_are_named_matched_by_pattern_or_defined_whole() -> None:
    required = ["checkpoint=nano", "data.source=shards", "output=out"]
    protocols = "protocols=[first_mask_forward,dong_largest_box_b*,{name:mine,slices:middle,prompt:click}]"
    settings = load_settings(compose("evaluate", [*required, protocols]))
    names = [protocol.name for protocol in settings.all_protocols]
    assert names[0] == "first_mask_forward" and "dong_largest_box_both" in names and names[-1] == "mine"
    assert settings.all_protocols[0].prompt == "mask" and settings.all_protocols[-1].slices == "middle"
    assert [p.name for p in load_settings(compose("evaluate", required)).all_protocols] == ["largest_box_both"]
    with pytest.raises(UserError, match="Did you mean 'first_mask_forward'"):
        load_settings(compose("evaluate", [*required, "protocols=[first_mask_forwar]"]))
    with pytest.raises(UserError, match="used twice"):
        load_settings(compose("evaluate", [*required, "protocols=[dong_spread_box_both,dong_s*]"]))


def test_the_yaml_says_what_the_settings_default_to() -> None:
    settings = load_settings(compose("evaluate", ["checkpoint=nano", "data.source=shards", "output=out"]))
    plain = EvaluateSettings(checkpoint="nano", data=SourceSettings(source="shards"), output="out")
    assert settings.model_dump(exclude={"protocol"}) == plain.model_dump(exclude={"protocol"})


def test_a_protocol_outside_of_what_a_checkpoint_was_trained_with_is_marked_everywhere(
    checkpoints: tuple[Path, Path], shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_model(checkpoints[0])
    recipe = {"recipe": {"prompts": PromptSettings(kinds={"mask": 1.0}).model_dump(mode="json")}}
    save_asset(tmp_path / "masks.safetensors", loaded.sam.state_dict(), loaded.spec, recipe)
    pair = (checkpoints[0], tmp_path / "masks.safetensors")
    report = evaluate(_settings(pair, shards, tmp_path / "out", overlays=0, worst=0, limit=1))
    assert list(report.summary["protocols"][0]["outside"]) == ["masks"]
    assert report.rows.groupby("checkpoint")["outside"].all().to_dict() == {"before": False, "masks": True}
    assert "masks†" in capsys.readouterr().out
    assert "masks†" in (tmp_path / "out" / "report.html").read_text()
    assert "masks†" in (tmp_path / "out" / "summary.md").read_text()
    assert r"masks$\dagger$" in (tmp_path / "out" / "summary.tex").read_text()


def test_gpus_are_dealt_out_among_the_ranks_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [find_device("auto", i).index for i in range(4)] == [0, 1, 0, 1]
    assert find_device("cuda:1", 0).index == 1 and find_device("cpu", 1).type == "cpu"


def test_an_output_folder_that_holds_something_is_refused_before_any_work(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        evaluate(_settings((Path("nowhere.pt"),), shards, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_labels_are_short_and_unique() -> None:
    names = ("nano", "runs/mine/checkpoints/best.ckpt", "a/tiny.pt", "b/tiny.pt", "runs/other")
    assert short_names(names) == ("nano", "mine", "tiny-1", "tiny-2", "other")


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment, line = {**os.environ, "OMP_NUM_THREADS": "1"}, [sys.executable, "evaluate.py", *arguments]
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_the_command_prints_one_table(checkpoints: tuple[Path, Path], shards: Path, tmp_path: Path) -> None:
    done = _command(
        f"checkpoint=[{checkpoints[0]},{checkpoints[1]}]", f"data.source={shards}", f"output={tmp_path / 'out'}",
        "structures=[lesion]", "protocol=largest_click_both", "limit=1", "overlays=0", "resamples=200",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.count("largest_click_both: scores") == 1
        and "report.html" in done.stdout
        and "lesion" in done.stdout
    )
    assert "organ" not in done.stdout


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ("protocol=largest_box_bothh", "Did you mean 'largest_box_both'?"),
        ("data.source=nowhere/at/all", "nowhere"),
        ("data.config=nowhere.yaml", "data.config=nowhere.yaml: no such file"),
        ("metrics.nsd_m=3", "Did you mean 'metrics.nsd_mm'?"),
        ("protocols=[largest_box_bothh]", "Did you mean 'largest_box_both'?"),
        ("corruption.names=[gausian_noise]", "Did you mean 'gaussian_noise'?"),
    ],
)
def test_a_mistake_gives_one_clear_error(wrong: str, what: str, shards: Path, tmp_path: Path) -> None:
    required = {"checkpoint": "nano", "data.source": str(shards), "output": str(tmp_path / "out")}
    arguments = [f"{key}={value}" for key, value in required.items() if not wrong.startswith(f"{key}=")]
    with pytest.raises(UserError) as error:
        evaluate(load_settings(compose("evaluate", [*arguments, wrong])))
    assert what in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_command_ends_with_status_2_on_a_mistake(shards: Path, tmp_path: Path) -> None:
    done = _command("checkpoint=nano", f"data.source={shards}", f"output={tmp_path / 'out'}", "limit=none")
    assert done.returncode == 2
    assert "limit=" in done.stderr and "Traceback" not in done.stderr
