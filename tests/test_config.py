"""Composing and validating configurations: what a mistake is told, and that Hydra's global state stays as it was."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from medsam2.cases.settings import DatasetSettings
from medsam2.config import compose, configs_dir, describe_groups, hydra_entry, validate
from medsam2.errors import UserError

FILES = {
    "main.yaml": """
defaults:
  - optim: adam
  - _self_
  - experiment: null
data:
  shards: ???
  workers: 2
seed: 0
doubled: ${data.workers}
""",
    "optim/adam.yaml": "lr: 0.1\nbetas: [0.9, 0.99]\n",
    "optim/sgd.yaml": "lr: 1.0\n",
    "experiment/quickstart.yaml": "# @package _global_\noptim: {lr: 0.5}\ndata: {shards: here}\n",
    "experiment/broken.yaml": "# @package _global_\ndefaults:\n  - override /optim: adamw\n",
    "experiment/dangling.yaml": "# @package _global_\ndata: {shards: '${nowhere}'}\n",
}
HAVE = ["data.shards=x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("configs")
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder


def mistake(folder: Path, overrides: list[str], name: str = "main") -> str:
    with pytest.raises(UserError) as caught:
        compose(name, overrides, folder)
    return str(caught.value)


def test_composed_configuration_is_resolved_plain_python(folder: Path) -> None:
    config = compose("main", ["data.shards=x", "optim=sgd", "data.workers=5", "seed=3"], folder)
    assert config == {"optim": {"lr": 1.0}, "data": {"shards": "x", "workers": 5}, "seed": 3, "doubled": 5}
    assert type(config["optim"]) is dict


def test_experiment_overrides_what_the_defaults_say(folder: Path) -> None:
    assert compose("main", ["experiment=quickstart"], folder)["optim"]["lr"] == 0.5


@pytest.mark.parametrize(
    ("override", "closest"),
    [
        ("sed=1", "seed"),
        ("optim.lrr=1", "optim.lr"),
        ("optm.lr=1", "optim.lr"),
        ("lr=1", "optim.lr"),
        ("data.worker=1", "data.workers"),
        ("experimnt=quickstart", "experiment"),
    ],
)
def test_misspelt_key_is_named_with_the_closest_one(folder: Path, override: str, closest: str) -> None:
    message = mistake(folder, [*HAVE, override])
    assert f"unknown key {override.split('=')[0]!r}" in message
    assert f"Did you mean {closest!r}?" in message


@pytest.mark.parametrize("key", ["optim.module_lr.memory_encoder", "callbacks.mine._target_"])
def test_key_that_a_user_may_add_is_refused_with_the_override_that_adds_it(key: str) -> None:
    required = ["experiment=quickstart", "data.shards=shards", "output=run"]
    with pytest.raises(UserError) as caught:
        compose("train", [*required, f"{key}=1"])
    assert str(caught.value).endswith(f"To add it, write +{key}=...")
    assert compose("train", [*required, f"+{key}=1"])


def test_key_below_a_value_is_explained(folder: Path) -> None:
    assert "'seed' is a value, not a section" in mistake(folder, [*HAVE, "seed.more=1"])


def test_misspelt_group_option_is_named_with_the_closest_one(folder: Path) -> None:
    message = mistake(folder, ["experiment=quikstart"])
    assert "experiment=quikstart" in message and "Did you mean 'quickstart'?" in message


def test_missing_option_inside_a_yaml_is_explained(folder: Path) -> None:
    message = mistake(folder, [*HAVE, "experiment=broken"])
    assert "adamw" in message and "adam" in message


def test_all_values_that_must_be_given_are_named(folder: Path) -> None:
    assert "data.shards must be set: add data.shards=..." in mistake(folder, [])


def test_dangling_reference_is_explained(folder: Path) -> None:
    assert "nowhere" in mistake(folder, ["experiment=dangling"])


@pytest.mark.parametrize("override", ["optim.lr", "data.shards=a b=c,[", "=3"])
def test_unreadable_override_is_quoted(folder: Path, override: str) -> None:
    assert repr(override) in mistake(folder, [override])


def test_unknown_configuration_is_named_with_the_closest_one(folder: Path) -> None:
    assert "Did you mean 'main'?" in mistake(folder, [], name="mian")


def test_hydra_is_left_as_it_was_found(folder: Path) -> None:
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.version import VersionBase

    compose("main", HAVE, folder)
    assert not GlobalHydra.instance().is_initialized()
    with hydra.initialize_config_dir(str(folder), version_base="1.2"):
        before, base = GlobalHydra.instance().hydra, VersionBase.instance().version_base
        compose("main", HAVE, folder)
        mistake(folder, ["sed=1"])
        assert GlobalHydra.instance().hydra is before
        assert VersionBase.instance().version_base == base


def test_repository_configs_are_found() -> None:
    assert (configs_dir() / "train.yaml").is_file()


@pytest.mark.parametrize(
    ("program", "its_own", "not_its_own"),
    [("train", "adaptation: ", "protocol: "), ("evaluate", "protocol: ", "adaptation: ")],
)
def test_help_lists_the_groups_of_the_program_alone(program: str, its_own: str, not_its_own: str) -> None:
    lines = describe_groups(program, configs_dir()).splitlines()
    assert any(line.startswith(its_own) for line in lines)
    assert not any(line.startswith(not_its_own) for line in lines)
    assert not any(word in line for line in lines for word in ("_options", "_peft", "papers"))


def test_a_group_of_another_program_is_refused_with_those_it_takes() -> None:
    with pytest.raises(UserError, match=r"protocol=custom: train has no such group; its groups are model, adaptation"):
        compose("train", ["protocol=custom", "data.shards=x", "output=y"])


def test_users_model_may_set_how_the_network_runs(tmp_path: Path) -> None:
    shutil.copytree(configs_dir(), tmp_path / "configs")
    (tmp_path / "configs" / "model" / "mine.yaml").write_text("defaults: [hiera_tiny]\ncompile: [image_encoder]\n")
    config = compose("train", ["model=mine", "data.shards=x", "output=y"], tmp_path / "configs")
    assert (config["model"]["compile"], config["model"]["onednn"]) == (["image_encoder"], True)


def test_help_lists_options_of_the_users_folder_too(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 3\n")
    script = (
        f"from medsam2.config import hydra_entry; hydra_entry('train', print, ['--help', '--config-dir', '{tmp_path}'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert "experiment: medsam2, mine, quickstart" in done.stdout, done.stderr


def test_model_with_its_side_in_the_name_is_answered_by_the_line_that_works() -> None:
    with pytest.raises(UserError, match=r"Write model=hiera_tiny model\.image_size=512\."):
        compose("train", ["model=hiera_tiny_512", "data.shards=x", "output=y"])


def test_group_without_an_option_is_answered_by_the_line_that_works() -> None:
    with pytest.raises(UserError, match=r"debug=null: configs/debug has no such option; write debug=\[\]"):
        compose("train", ["debug=null", "data.shards=x", "output=y"])
    assert "debug" not in compose("train", ["debug=[]", "data.shards=x", "output=y"])


def test_several_options_without_brackets_are_answered_by_both_ways_to_write_them() -> None:
    with pytest.raises(UserError, match=r"logger=csv,wandb.*key=\[value1,value2\].*--multirun"):
        compose("train", ["logger=csv,wandb", "data.shards=x", "output=y"])


# ------------------------------------------------------------------------------------------------ validation


class Optim(BaseModel):
    model_config = ConfigDict(extra="forbid")
    lr: float = Field(gt=0)
    schedule: Literal["cosine", "constant"] = "cosine"


class Main(BaseModel):
    model_config = ConfigDict(extra="forbid")
    optim: Optim
    phases: list[Optim] = []
    spare: Optim | None = None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"optim": {"lr": 1, "shedule": "cosine"}}, "unknown key 'optim.shedule'. Did you mean 'schedule'?"),
        ({"optim": {"lr": 1}, "phases": [{"lr": 1, "lrr": 2}]}, "unknown key 'phases.0.lrr'. Did you mean 'lr'?"),
        ({"optim": {"lr": 1}, "spare": {"lr": 1, "lrr": 2}}, "unknown key 'spare.lrr'. Did you mean 'lr'?"),
        ({"optim": {"lr": 1, "schedule": "cosin"}}, "Did you mean 'cosine'?"),
        ({"optim": {"lr": -1}}, "optim.lr=-1: it must be greater than 0"),
        ({"optim": {"lr": "fast"}}, "optim.lr='fast'"),
        ({"optim": {}}, "the key 'optim.lr' must be given"),
        ({"optm": {"lr": 1}}, "Did you mean 'optim'?"),
    ],
)
def test_invalid_values_name_key_value_and_what_is_allowed(data: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(Main, data, "train.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("train.yaml: ")


def test_message_ends_once() -> None:
    with pytest.raises(UserError, match=r"Did you mean 'lung'\?$"):
        validate(DatasetSettings, {"window": "lng"})


def test_valid_data_becomes_the_model() -> None:
    assert validate(Main, {"optim": {"lr": 2}}).optim.lr == 2.0


# ------------------------------------------------------------------------------------------------ entry points

SCRIPT = """
import sys
from pathlib import Path
from medsam2.config import hydra_entry
from medsam2.errors import UserError

def run(config):
    print("ran", config["seed"], config["optim"]["lr"], Path.cwd().name)
    if config["seed"] == 7:
        raise UserError("seven is not allowed")

hydra_entry("main", run, folder=Path(sys.argv.pop(1)))
"""


def start(folder: Path, where: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = where / "script.py"
    script.write_text(SCRIPT)
    return subprocess.run(
        [sys.executable, str(script), str(folder), *arguments], cwd=where, capture_output=True, text=True, timeout=60
    )


def test_entry_runs_in_the_working_folder_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    done = start(folder, tmp_path, *HAVE, "optim.lr=2")
    assert done.stdout.strip() == f"ran 0 2 {tmp_path.name}", done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]


def test_entry_explains_mistakes_without_traceback(folder: Path, tmp_path: Path) -> None:
    for arguments, message in [((*HAVE, "sed=1"), "'seed'"), ((*HAVE, "seed=7"), "seven"), ((), "data.shards")]:
        done = start(folder, tmp_path, *arguments)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert done.stderr.startswith("error: ") and message in done.stderr


def test_multirun_runs_every_combination_also_with_flags_between(folder: Path, tmp_path: Path) -> None:
    done = start(folder, tmp_path, HAVE[0], "-m", "seed=1,2")
    assert "ran 1 0.1" in done.stdout and "ran 2 0.1" in done.stdout, done.stderr


def test_configuration_can_be_printed(folder: Path, tmp_path: Path) -> None:
    done = start(folder, tmp_path, "--cfg", "job", *HAVE)
    assert "shards: x" in done.stdout and "ran" not in done.stdout


def test_entry_restores_the_command_line(folder: Path) -> None:
    before, seen = list(sys.argv), []
    hydra_entry("main", lambda config: seen.append(config["seed"]), [*HAVE, "seed=4"], folder)
    assert seen == [4] and sys.argv == before
