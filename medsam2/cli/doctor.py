"""`medsam2 doctor`: check whether this machine is ready for training, with a remedy for each fault."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

GIB = 2**30
SHARED_MEMORY = Path("/dev/shm")
MIN_SHARED_MEMORY_GIB, MIN_MEMORY_GIB, MIN_DISK_GIB, MIN_OPEN_FILES = 2, 4, 10, 1024


class Finding(NamedTuple):
    """One checked item: the measured value, its state ("ok", "warning" or "error") and a remedy."""

    name: str
    value: str
    state: str = "ok"
    remedy: str = ""


def doctor(
    folder: Annotated[Path, typer.Option("--folder", "-f", help="Folder for runs.")] = Path("."),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check this machine: versions, GPUs, memory, shared memory, open files, disk and file locks.

    The exit status is 1 if a run would fail.

    [bold]Example[/bold]

      $ medsam2 doctor --folder /scratch/runs
    """
    from torch.utils import collect_env

    environment = collect_env.get_env_info()
    findings = [*check_gpus(environment), *check_limits(), check_disk(folder), check_disk(Path(tempfile.gettempdir()))]
    if as_json:
        print(json.dumps({"findings": [item._asdict() for item in findings], "environment": environment._asdict()}))
    else:
        print(collect_env.pretty_str(environment), end="\n\n")
        for item in findings:
            print(f"{item.state:<8} {item.name}: {item.value}" + (f"\n{'':9}-> {item.remedy}" if item.remedy else ""))
    if any(item.state == "error" for item in findings):
        raise typer.Exit(1)


def judge(name: str, text: str, value: float, minimum: float, remedy: str) -> Finding:
    """Rate a value: below its minimum is a warning, below an eighth of it an error; -1 means no limit.

    >>> judge("memory", "1 GiB", 1.0, 4.0, "close programs").state
    'warning'
    """
    if value < 0 or value >= minimum:
        return Finding(name, text)
    return Finding(name, text, "error" if value < minimum / 8 else "warning", remedy)


def check_gpus(environment: Any) -> Iterator[Finding]:
    """Check whether torch sees the GPUs of the driver, and whether they support bfloat16.

    Args:
        environment: `torch.utils.collect_env.get_env_info()`.
    """
    import torch

    driver = environment.nvidia_driver_version
    if not torch.cuda.is_available() and driver:
        remedy = (
            f"this torch is built for CUDA {torch.version.cuda or 'none'}: update the driver or install another torch; "
            "unset an empty CUDA_VISIBLE_DEVICES; start a container with --gpus all"
        )
        yield Finding("GPU", f"torch sees none, although driver {driver} is installed", "error", remedy)
    elif not torch.cuda.is_available():
        yield Finding("GPU", "none (use trainer=cpu)")
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        text = f"{torch.cuda.get_device_name(index)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        if torch.cuda.get_device_capability(index) < (8, 0):
            yield Finding(f"GPU {index}", f"{text}, no bfloat16", "warning", "set trainer.precision=16-mixed")
        else:
            yield judge(f"GPU {index}", text, free / total, 0.8, "another program uses it: nvidia-smi shows which")


def check_limits() -> Iterator[Finding]:
    """Check free memory, shared memory and the limit on open files."""
    import psutil

    free = psutil.virtual_memory().available / GIB
    remedy = "close other programs, or ask the scheduler for more (--mem)"
    yield judge("memory", f"{free:.1f} GiB free", free, MIN_MEMORY_GIB, remedy)
    free = shutil.disk_usage(SHARED_MEMORY).free / GIB if SHARED_MEMORY.is_dir() else 0.0
    remedy = "docker run --shm-size=8g (Kubernetes: an emptyDir of medium Memory), or set data.workers=0"
    yield judge("shared memory", f"{SHARED_MEMORY} has {free:.2f} GiB free", free, MIN_SHARED_MEMORY_GIB, remedy)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    remedy = f"ulimit -n {hard}; start a container with --ulimit nofile=65536"
    yield judge("open files", f"{soft} of {hard} allowed", soft, MIN_OPEN_FILES, remedy)


def check_disk(folder: Path) -> Finding:
    """Check whether a file can be written, synced and locked in a folder, or in its nearest existing parent."""
    folder = folder.expanduser().absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    free = shutil.disk_usage(existing).free / GIB
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".medsam2-doctor-") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        remedy = f"choose another folder, or correct permissions, space and locks of {existing}"
        return Finding(str(folder), f"no file can be written and locked ({error.strerror})", "error", remedy)
    remedy = "make room: checkpoints and shards are large"
    return judge(str(folder), f"{free:.1f} GiB free, writable", free, MIN_DISK_GIB, remedy)
