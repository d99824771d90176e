"""train.py as a user runs it: a run folder, exact resumption, clear refusals."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
import yaml

from medsam2.config import compose
from medsam2.errors import UserError
from medsam2.model.build import load_model
from medsam2.training.fit import fit
from medsam2.training.module import merge_datasets
from medsam2.training.run_folder.checkpoints import LOCK, locked

Train = Callable[..., CompletedProcess[str]]


def rows(folder: Path) -> dict[int, dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return {int(row["step"]): row for row in csv.DictReader(file)}


def losses(folder: Path) -> dict[int, str]:
    return {step: row["train/loss"] for step, row in rows(folder).items() if row["train/loss"]}


def test_run_folder_holds_what_a_user_needs(tiny_run: Path) -> None:
    config = yaml.safe_load((tiny_run / "config.yaml").read_text())
    assert config["trainer"]["max_steps"] == 6 and config["model"]["name"] == "hiera_nano"
    assert json.loads((tiny_run / "environment.json").read_text())["versions"]["torch"]
    assert sorted(p.name for p in (tiny_run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt", "previous.ckpt"]
    assert len(losses(tiny_run)) == 6
    scores = [float(row["val/dsc"]) for row in rows(tiny_run).values() if row["val/dsc"]]
    assert len(scores) == 2 and all(0 <= score <= 1 for score in scores)


def test_checkpoint_loads_without_unpickling_and_knows_its_cases(tiny_run: Path) -> None:
    checkpoint = torch.load(tiny_run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 6
    assert len(checkpoint["medsam2"]["content_hashes"]) >= 4
    datasets = checkpoint["medsam2"]["datasets"]
    assert len(datasets) == 2 and all(set(entry) == {"source", "licence"} for entry in datasets.values())
    loaded = load_model(str(tiny_run))
    assert loaded.spec.name == "hiera_nano" and loaded.provenance.spec == loaded.spec


def test_source_and_licence_of_earlier_training_stay_known() -> None:
    earlier = {"a": {"source": "x", "licence": "CC0"}, "b": {"source": "y", "licence": ""}}
    now = {"a": {"source": "", "licence": "CC-BY-4.0"}, "c": {"source": "", "licence": ""}}
    assert merge_datasets(now, earlier) == {
        "a": {"source": "x", "licence": "CC-BY-4.0"}, "b": earlier["b"], "c": now["c"]
    }  # fmt: skip
    assert merge_datasets({}, {}) == {}


@pytest.mark.slow  # tests/faults/test_resume.py kills such runs
def test_interrupted_run_goes_on_exactly(train: Train, tiny_run: Path, phantom_shards: Path, tmp_path: Path) -> None:
    """Three steps, then the rest from the checkpoint, give the losses and weights of six undisturbed ones."""
    data, output = f"data.shards={phantom_shards}", tmp_path / "parts"
    # the schedule is that of the whole run: the first part is stopped by its checkpoint, as a kill would leave it
    done = train(data, f"output={output}")
    assert done.returncode == 0, done.stderr[-3000:]
    (output / "checkpoints" / "previous.ckpt").replace(output / "checkpoints" / "last.ckpt")
    done = train(data, f"output={output}", "resume=auto")
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(output) == losses(tiny_run)
    ours, theirs = (torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in (output, tiny_run))
    assert all(torch.equal(ours["state_dict"][name], value) for name, value in theirs["state_dict"].items())


def test_refused_resume_leaves_the_run_as_it_was(
    tiny_run: Path, tiny_arguments: tuple[str, ...], phantom_shards: Path
) -> None:
    before = {path: path.read_bytes() for path in tiny_run.rglob("*") if path.is_file()}
    given = [*tiny_arguments, f"data.shards={phantom_shards}", f"output={tiny_run}", "resume=auto", "seed=4"]
    with pytest.raises(UserError, match="seed was 3"):
        fit(compose("train", given))
    assert {path: path.read_bytes() for path in tiny_run.rglob("*") if path.is_file()} == before


def test_a_second_process_does_not_train_into_the_same_folder(tmp_path: Path) -> None:
    other = "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); print('', flush=True)"
    command = [sys.executable, "-c", f"{other}; sys.stdin.read()", str(tmp_path / LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        with pytest.raises(UserError, match="another process is training into output="), locked(tmp_path):
            pass
        process.communicate()
    (tmp_path / ".metrics.csv.1.partial").touch()
    with locked(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_resume_with_another_seed_is_refused(
    tiny_arguments: tuple[str, ...], tiny_run: Path, phantom_shards: Path, tmp_path: Path
) -> None:
    resume = f"resume={tiny_run / 'checkpoints' / 'previous.ckpt'}"
    arguments = (f"data.shards={phantom_shards}", f"output={tmp_path / 'run'}", resume, "seed=4")
    with pytest.raises(UserError, match="seed was 3"):
        fit(compose("train", [*tiny_arguments, *arguments]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optim.lrr=1e-4"], "Did you mean 'optim.lr'?"),
        (["optim.lr=fast"], "optim.lr"),
        (["experiment=quikstart"], "Did you mean 'quickstart'?"),
        (["start=nanoo"], "nanoo"),
        (["module=medsam2.training.module.FineTunr"], "FineTunr"),
        (["adaptation.train=[mask_decodr]"], "mask_decodr"),
        (["resume=nowhere.ckpt"], "nowhere.ckpt"),
    ],
)
def test_mistake_gets_one_clear_error(phantom_shards: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    given = ["experiment=quickstart", "start=random", f"data.shards={phantom_shards}", f"output={tmp_path / 'run'}"]
    with pytest.raises(UserError, match=re.escape(message)):
        fit(compose("train", [*given, *arguments]))
    assert not (tmp_path / "run").exists()


def test_wrong_shard_folder_names_the_closest(
    tiny_arguments: tuple[str, ...], phantom_shards: Path, tmp_path: Path
) -> None:
    arguments = (f"data.shards={phantom_shards}x", f"output={tmp_path / 'run'}")
    with pytest.raises(UserError, match=re.escape(f"{phantom_shards}x")):
        fit(compose("train", [*tiny_arguments, *arguments]))


def test_existing_run_is_not_overwritten(tiny_arguments: tuple[str, ...], tiny_run: Path, phantom_shards: Path) -> None:
    before = (tiny_run / "metrics.csv").read_bytes()
    with pytest.raises(UserError, match="resume=auto"):
        fit(compose("train", [*tiny_arguments, f"data.shards={phantom_shards}", f"output={tiny_run}"]))
    assert (tiny_run / "metrics.csv").read_bytes() == before
