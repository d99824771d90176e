"""Three ways to begin: a new run from any weights, an interrupted run, a run made longer."""

from __future__ import annotations

import csv
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import SMALLEST

from medsam2.config import compose, validate
from medsam2.errors import UserError
from medsam2.export.run import export_model
from medsam2.model.build import load_model
from medsam2.training.fit import fit
from medsam2.training.module import FineTuner
from medsam2.training.optim import OptimSettings, rate_at
from medsam2.training.run_folder.resume import STATED, differences, recipe, recipe_changes
from medsam2.training.settings import TrainSettings

LORA = ("start=nano", "adaptation=lora_encoder")


def run(shards: Path, output: Path, *more: str) -> Path:
    steps = ("trainer.max_steps=4", "trainer.checkpoint_every=2", "trainer.progress=none", "optim.warmup_steps=0")
    return fit(compose("train", [*SMALLEST, *steps, f"data.shards={shards}", f"output={output}", *more]))


def last(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return content


def same_weights(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    return all(torch.equal(ours["state_dict"][name], value) for name, value in theirs["state_dict"].items())


def column(folder: Path, name: str) -> dict[int, str]:
    with open(folder / "metrics.csv", newline="") as file:
        return {int(row["step"]): row[name] for row in csv.DictReader(file) if row.get(name)}


@pytest.fixture(scope="module")
def lora(phantom_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of an adapter on the shipped model; read only."""
    return run(phantom_shards, tmp_path_factory.mktemp("lora") / "run", *LORA)


@pytest.fixture(scope="module")
def plain(phantom_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of the whole model; read only."""
    return run(phantom_shards, tmp_path_factory.mktemp("plain") / "run")


# --------------------------------------------------------------------------------------------------- new runs


@pytest.mark.slow
def test_an_adapter_is_trained_resumed_exported_and_started_from(
    lora: Path, phantom_shards: Path, tmp_path: Path
) -> None:
    parts = run(phantom_shards, tmp_path / "parts", *LORA)
    (parts / "checkpoints" / "previous.ckpt").replace(parts / "checkpoints" / "last.ckpt")
    run(phantom_shards, parts, *LORA, "resume=auto")
    assert last(lora)["global_step"] == 4 and same_weights(last(parts), last(lora))

    (adapter,) = (result.folder for result in export_model(lora, "adapter", tmp_path / "adapter"))
    (official,) = (result.folder for result in export_model(lora, "sam2", tmp_path / "official"))
    merged, exported, direct = (load_model(path) for path in (adapter, official, lora))
    states = [model.sam.state_dict() for model in (merged, exported, direct)]
    for name, value in states[0].items():
        assert torch.equal(value, states[2][name])
        assert torch.allclose(value, states[1][name], atol=1e-6)
    assert not all(torch.equal(value, load_model("nano").sam.state_dict()[name]) for name, value in states[0].items())
    assert list(merged.provenance.content_hashes) == last(lora)["medsam2"]["content_hashes"]

    new = run(phantom_shards, tmp_path / "new", f"start={adapter}", "trainer.max_steps=1", "optim.lr=1e-30")
    assert last(new)["global_step"] == 1 and last(new)["medsam2"]["start"] == str(adapter)
    begun = load_model(new).sam.state_dict()
    assert all(torch.allclose(begun[name], value, rtol=0, atol=1e-20) for name, value in states[0].items())


@pytest.mark.parametrize("kind", ["official", "bare state", "ours", "run folder", "lightning", "ddp and compile"])
def test_a_new_run_starts_from_any_checkpoint(plain: Path, tmp_path: Path, kind: str) -> None:
    wanted = load_model(plain).sam.state_dict()
    path = tmp_path / "weights.pt"
    if kind == "official":
        torch.save({"model": wanted}, path)
    elif kind == "bare state":
        torch.save(wanted, path)
    elif kind == "lightning":  # of another project: its own prefix, and parts that are not SAM 2's
        other = {f"net.sam2.{name}": value for name, value in wanted.items()} | {"criterion.weight": torch.ones(2)}
        torch.save({"state_dict": other, "epoch": 3, "global_step": 5, "pytorch-lightning_version": "2.0.0"}, path)
    elif kind == "ddp and compile":
        torch.save({"model": {f"module._orig_mod.{name}": value for name, value in wanted.items()}}, path)
    else:
        path = plain / "checkpoints" / "last.ckpt" if kind == "ours" else plain
    found = load_model(path).sam.state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("word", ["start", "resume"])
def test_a_checkpoint_that_carries_code_never_runs_it(phantom_shards: Path, tmp_path: Path, word: str) -> None:
    canary = tmp_path / "canary"

    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(canary),)

    path = tmp_path / "harm.ckpt"
    torch.save({"state_dict": {}, "global_step": 1, "harm": Harm()}, path)
    with pytest.raises(UserError, match=r"harm\.ckpt"):
        run(phantom_shards, tmp_path / "run", f"{word}={path}")
    assert not canary.exists()
    with open(path, "rb"), pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


def test_weights_alone_are_not_resumed_but_started_from(phantom_shards: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"model": load_model("nano").sam.state_dict()}, path)
    with pytest.raises(UserError, match=r"not the state of a run.*start="):
        run(phantom_shards, tmp_path / "run", f"resume={path}")


# --------------------------------------------------------------------------------------------------- resumption


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("adaptation.peft.r=4", r"adaptation\.peft\.r was 8 and is now 4"),
        ("adaptation.peft.targets=[mask_decoder]", r"adaptation\.peft\.targets was .*image_encoder.* is now"),
        ("adaptation=decoder", r"adaptation\.train was \[\] and is now"),
        ("optim.lr=1e-3", r"optim\.lr was 0\.0004 and is now 0\.001"),
    ],
)
def test_resume_with_another_adaptation_or_optimiser_names_the_field(
    lora: Path, phantom_shards: Path, tmp_path: Path, change: str, named: str
) -> None:
    resume = f"resume={lora / 'checkpoints' / 'last.ckpt'}"
    with pytest.raises(UserError, match=named):
        run(phantom_shards, tmp_path / "run", *LORA, resume, "trainer.max_steps=6", change)


def test_a_change_of_the_prompts_on_the_way_is_stated(plain: Path, phantom_shards: Path, tmp_path: Path) -> None:
    resume = f"resume={plain / 'checkpoints' / 'last.ckpt'}"
    with pytest.warns(UserWarning, match=r"prompts\.kinds\.box was 0\.55 and is now 0\.5"):
        run(phantom_shards, tmp_path / "run", resume, "trainer.max_steps=5", "prompts.kinds.box=0.5")


def test_prompts_recorded_before_they_were_grouped_are_no_change() -> None:
    """The shipped nano records its prompts side by side, as every checkpoint did then."""
    flat = load_model("nano").provenance.recipe["prompts"]
    words = [
        *SMALLEST,
        "data.shards=s",
        "output=o",
        *(f"prompts.kinds.{kind}={flat[kind]}" for kind in ("mask", "box", "click")),
    ]
    words += [f"prompts.{name}={flat[name]}" for name in ("corrections", "correction_frames", "correction_probability")]
    settings = validate(TrainSettings, compose("train", words), "the test")
    before = {**recipe(settings), "prompts": flat}
    before["augment"] = {**before["augment"], "elastic": {"probability": 0.0}, "min_pixels": 4}
    changes = recipe_changes({"medsam2": {"recipe": before}}, settings, STATED)
    assert not [row for row in changes if "None" in (str(row[1]), str(row[2]))], changes


def test_differences_are_named_leaf_by_leaf() -> None:
    before, now = {"a": 1, "b": {"c": [1], "d": None}}, {"a": 1, "b": {"c": [2], "d": {"e": 1}}, "f": 0}
    found = differences("x", before, now)
    assert found == [("x.b.c", [1], [2]), ("x.b.d", None, {"e": 1}), ("x.f", None, 0)]


# --------------------------------------------------------------------------------------------------- more steps


def test_a_run_planned_longer_goes_on_exactly(phantom_shards: Path, tmp_path: Path) -> None:
    """Four steps of a schedule of six, then two more, are six undisturbed ones."""
    whole = run(phantom_shards, tmp_path / "whole", "trainer.max_steps=6")
    parts = run(phantom_shards, tmp_path / "parts", "trainer.max_steps=4", "trainer.schedule_steps=6")
    assert last(parts)["global_step"] == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(phantom_shards, parts, "resume=auto", "trainer.max_steps=6")
    assert same_weights(last(parts), last(whole))
    assert column(parts, "train/loss") == column(whole, "train/loss")


def test_a_run_made_longer_follows_the_new_schedule_or_stays_at_the_old_ones_end(
    plain: Path, phantom_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resume, found = f"resume={plain / 'checkpoints' / 'last.ckpt'}", {}
    for name, more in (("new", ()), ("old", ("trainer.schedule_steps=4",))):
        folder = run(phantom_shards, tmp_path / name, resume, "trainer.max_steps=8", *more)
        header = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
        rate = next(title for title in header if title.startswith("lr-") and "mask_decoder" in title)
        found[name] = {step: float(value) for step, value in column(folder, rate).items()}
        assert ("was of 4 steps and is now of 8" in capsys.readouterr().out) == (name == "new")
    settings = OptimSettings.model_validate(compose("train", [*SMALLEST, "data.shards=x", "output=y"])["optim"])
    settings = settings.model_copy(update={"warmup_steps": 0})
    for step in (4, 5, 7):
        assert found["new"][step] == pytest.approx(settings.lr * rate_at(step, 8, settings), rel=1e-6)
        assert found["old"][step] == pytest.approx(settings.lr * settings.final_lr, rel=1e-6)


def test_a_finished_run_says_how_to_make_it_longer_and_does_nothing(
    phantom_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("trainer.max_steps=2", "trainer.val_every=2", "validation.clips=1")
    folder = run(phantom_shards, tmp_path / "run", *words)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    run(phantom_shards, folder, *words, "resume=auto")
    assert "this run is finished" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_run_whose_last_validation_was_cut_off_repeats_it_and_is_not_called_finished(
    phantom_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(*_: object) -> None:
        raise KeyboardInterrupt

    words = ("trainer.max_steps=2", "trainer.val_every=2", "validation.cases=1")
    with monkeypatch.context() as patched, pytest.raises((KeyboardInterrupt, SystemExit)):
        patched.setattr(FineTuner, "validation_step", cut_off)
        run(phantom_shards, tmp_path / "run", *words)
    assert not column(tmp_path / "run", "val/dsc")
    run(phantom_shards, tmp_path / "run", *words, "resume=auto")
    said = capsys.readouterr().out
    assert "its validation was cut off and is repeated" in said and "finished" not in said
    assert [*column(tmp_path / "run", "val/dsc")] == [1]


# ------------------------------------------------------------------------------------------------ process start


@pytest.mark.slow
def test_the_start_of_a_run_imports_nothing_slow_that_lightning_does_not() -> None:
    """Of five CPU seconds Lightning's own imports take nearly all; what few runs need stays out until it is used."""
    script = (
        "import sys, lightning; before = set(sys.modules); import medsam2.training.fit; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    found = set(done.stdout.split())
    assert "medsam2" in found
    assert not found & {"monai", "wandb", "peft", "pandas", "gradio", "matplotlib", "SimpleITK", "transformers", "sam2"}
