"""docker/: linted, valid, and what its scripts do (the images themselves need a daemon, the jobs a cluster)."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from medsam2.config import compose, validate
from medsam2.training.settings import TrainSettings

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
JOBS = sorted(DOCKER.glob("*.sbatch"))
SCRIPTS = [*JOBS, *sorted(DOCKER.glob("*.sh"))]


def tool(name: str) -> str:
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is None:
        pytest.skip(f"{name} is not installed (pip install -e '.[dev]')")
    return found


def settings(overrides: list[str]) -> TrainSettings:
    """The overrides of a guide or script, composed and validated."""
    return validate(TrainSettings, compose("train", overrides))


# ---------------------------------------------------------------------------------------------------- images


def test_the_dockerfile_is_clean() -> None:
    done = subprocess.run([tool("hadolint"), str(DOCKER / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stdout


def test_the_image_runs_as_a_user_and_is_given_no_secret() -> None:
    text = (DOCKER / "Dockerfile").read_text()
    users = re.findall(r"^USER (.*)$", text, re.MULTILINE)
    assert users == ["1000"]
    assert not re.search(r"(?i)(token|secret|password|api_key)", text)
    ignored = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignored and "**/.env" in ignored


def test_all_that_is_copied_exists_and_is_let_through() -> None:
    text = (DOCKER / "Dockerfile").read_text()
    ignored = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE):
        for source in [word for word in line.split()[:-1] if not word.startswith("--")]:
            assert (ROOT / source).exists(), source
            assert f"!{source}" in ignored, source


def test_the_dependencies_of_the_image_are_those_of_the_package() -> None:
    done = subprocess.run(
        [sys.executable, str(DOCKER / "requirements.py"), "slurm,tensorboard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert done.stdout.splitlines() == [*project["dependencies"], *extras["slurm"], *extras["tensorboard"]]
    wrong = subprocess.run([sys.executable, str(DOCKER / "requirements.py"), "gpu"], cwd=ROOT, capture_output=True)
    assert wrong.returncode == 1 and b"no extra 'gpu'" in wrong.stderr


@pytest.mark.parametrize(
    ("arguments", "called"),
    [
        ("train.py trainer=gpu", "python /opt/medsam2/train.py trainer=gpu"),
        ("evaluate.py checkpoint=x", "python /opt/medsam2/evaluate.py checkpoint=x"),
        ("torchrun --nnodes=2 x", "torchrun --nnodes=2 x"),
        ("doctor --json", "medsam2 doctor --json"),
        ("", "medsam2"),
    ],
)
def test_the_entry_point_calls_what_is_named(tmp_path: Path, arguments: str, called: str) -> None:
    for name in ("python", "torchrun", "medsam2"):
        fake(tmp_path / name, f'echo {name} "$@"')
    command = ["sh", str(DOCKER / "entrypoint.sh"), *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert done.stdout.strip() == called


# --------------------------------------------------------------------------------------------------- compose


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return dict(yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"])


def test_compose_has_one_gpu_and_all_of_them(services: dict[str, Any]) -> None:
    counts = {}
    for name, service in services.items():
        assert service["shm_size"] == "8gb" and service["stop_grace_period"] == "2m" and "privileged" not in service
        assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).exists()
        devices = service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
        counts[name] = [device["count"] for device in devices]
    assert counts == {"doctor": [], "cpu": [], "one-gpu": [1], "all-gpus": ["all"]}


@pytest.mark.parametrize("name", ["cpu", "one-gpu", "all-gpus"])
def test_the_recipes_of_compose_are_valid(services: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    script, *overrides = services[name]["entrypoint"][1:]
    assert script == "train.py"
    found = settings([re.sub(r"\$\{\w+:-(\w+)\}", r"\1", text) for text in (*overrides, *services[name]["command"])])
    assert found.resume == "auto" and found.output == name.replace("-", "_")


# ------------------------------------------------------------------------------------------------ kubernetes


def test_the_kubernetes_job_is_consistent(monkeypatch: pytest.MonkeyPatch) -> None:
    service, job = yaml.safe_load_all((DOCKER / "kubernetes.yaml").read_text())
    pod, name = job["spec"]["template"]["spec"], job["metadata"]["name"]
    assert pod["subdomain"] == service["metadata"]["name"] and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": name}
    assert pod["securityContext"]["runAsNonRoot"]
    (container,) = pod["containers"]
    given = {word for word in container["args"] if word.startswith("--")}
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2 and "--nnodes=2" in given
    assert f"--master-addr={name}-0.{pod['subdomain']}" in given
    assert f"--nproc-per-node={container['resources']['limits']['nvidia.com/gpu']}" in given
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")  # as torchrun sets it
    found = settings([word for word in container["args"][1:] if "=" in word and not word.startswith("--")])
    assert found.trainer.num_nodes == 2 and found.trainer.devices == 8 and found.resume == "auto"


# ----------------------------------------------------------------------------------------------------- slurm


def fake(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script: Path) -> None:
    done = subprocess.run([tool("shellcheck"), str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", JOBS, ids=lambda path: path.name)
def test_jobs_are_requeued_and_warned_in_time(script: Path) -> None:
    text = script.read_text()
    for line in ("--requeue", "--signal=B:USR1@120", "--open-mode=append", "--time="):
        assert re.search(rf"^#SBATCH {re.escape(line)}", text, re.MULTILINE), line
    assert not re.search(r"^#SBATCH --ntasks=", text, re.MULTILINE)  # Lightning takes tasks a node only


@pytest.mark.parametrize(
    ("script", "slurm", "nodes", "devices"),
    [
        ("one_gpu", {"SLURM_NTASKS_PER_NODE": "1"}, 1, 1),
        ("one_node", {"SLURM_NTASKS_PER_NODE": "4"}, 1, 4),
        ("many_nodes", {"SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "3", "SLURM_JOB_NUM_NODES": "3"}, 3, 4),
    ],
)
def test_a_job_starts_the_run_that_fits_its_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, slurm: dict[str, str], nodes: int, devices: int
) -> None:
    fake(tmp_path / "srun", f'printf "%s\\n" "$*" >> {shlex.quote(str(tmp_path / "calls"))}')
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", str(DOCKER / f"{script}.sbatch"), "data.shards=x", "output=y", "optim.lr=1e-5"]
    environment = {"PATH": path, "SLURM_SUBMIT_DIR": str(ROOT), **slurm}
    subprocess.run(command, env=environment, check=True, timeout=30)
    *before, call = (tmp_path / "calls").read_text().splitlines()
    words = call.split()
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    found = settings(words[words.index("train.py") + 1 :])
    assert (found.trainer.num_nodes, found.trainer.devices, found.resume) == (nodes, devices, "auto")
    assert found.trainer.accelerator == "gpu" and found.optim.lr == 1e-5 and "--kill-on-bad-exit=1" in words
    assert [("doctor" in line and "--ntasks=3" in line) for line in before] == [True] * (script == "many_nodes")


@pytest.mark.parametrize(("name", "status"), [("USR1", 7), ("TERM", 143)])
def test_a_signal_to_the_batch_shell_reaches_the_run_which_ends_as_it_likes(
    tmp_path: Path, name: str, status: int
) -> None:
    """The shell is interrupted several times, and waits all the same until the run has saved."""
    body = 'trap "sleep 0.2; echo saved; exit 7" USR1\necho ready\nwhile :; do sleep 0.02; done'
    run = fake(tmp_path / "run", body)
    shell = subprocess.Popen(["bash", str(DOCKER / "forward.sh"), str(run)], stdout=subprocess.PIPE, text=True)
    assert shell.stdout is not None and shell.stdout.readline() == "ready\n"
    for _ in range(3):
        shell.send_signal(getattr(signal, f"SIG{name}"))
        time.sleep(0.02)
    output, _ = shell.communicate(timeout=10)
    assert shell.returncode == status and output == ("saved\n" if name == "USR1" else "")


@pytest.mark.parametrize("status", [0, 2, 143])
def test_without_a_signal_the_shell_ends_with_the_status_of_the_run(status: int) -> None:
    done = subprocess.run(["bash", str(DOCKER / "forward.sh"), "bash", "-c", f"exit {status}"], timeout=10)
    assert done.returncode == status
