"""What `medsam2 doctor` looks at on one machine: each probe gives findings, none of them changes anything.

A probe is a function that takes a `Place` and yields findings. A new one is a function and a row in `PROBES`.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from medsam2.training.machine import GIB, available

State = Literal["ok", "warning", "error"]
DRIVER = Path("/proc/driver/nvidia/version")
LIBRARIES = ("lightning", "torchvision", "rf-sam-2", "monai", "SimpleITK", "transformers", "peft", "hydra-core")


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and where it is not as it should be how to mend it.

    Attributes:
        shared: whether all ranks of a job should have the same value.
    """

    name: str
    value: str
    state: State = "ok"
    advice: str = ""
    shared: bool = False


@dataclass(frozen=True)
class Place:
    """Where a run would be: the folder that it would write to, and the cache of remote shards."""

    folder: Path = Path(".")
    cache: Path | None = None


@dataclass(frozen=True)
class Report:
    """What one rank found on its machine."""

    host: str
    rank: int
    findings: tuple[Finding, ...]

    @property
    def state(self) -> State:
        states = {finding.state for finding in self.findings}
        return "error" if "error" in states else "warning" if "warning" in states else "ok"

    def to_dict(self) -> dict[str, Any]:
        return {
            "host": self.host,
            "rank": self.rank,
            "state": self.state,
            "findings": [asdict(f) for f in self.findings],
        }

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Report:
        return cls(given["host"], given["rank"], tuple(Finding(**found) for found in given["findings"]))


def examine(place: Place, rank: int = 0) -> Report:
    """Run every probe; one that fails itself is a finding, too."""
    found: list[Finding] = []
    for probe in PROBES:
        try:
            found += probe(place)
        except Exception as error:  # a machine may be odd in ways that nobody has met
            name = probe.__name__.replace("_", " ")
            found.append(Finding(name, f"{type(error).__name__}: {error}", "warning", "this could not be looked at"))
    return Report(socket.gethostname(), rank, tuple(found))


# ------------------------------------------------------------------------------------------------- versions


def versions(place: Place) -> Iterator[Finding]:
    import torch

    yield Finding("medsam2", _version("medsam2"), shared=True)
    yield Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}", shared=True)
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    yield Finding("torch", f"{torch.__version__} ({cuda})", shared=True)
    if torch.version.cuda:
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none"
        yield Finding("cuDNN", str(torch.backends.cudnn.version()), shared=True)
        if nccl == "none":
            yield Finding("NCCL", nccl, "warning", "several GPUs need it: install another build of torch", shared=True)
        else:
            yield Finding("NCCL", nccl, shared=True)
    yield Finding("libraries", ", ".join(f"{name} {_version(name)}" for name in LIBRARIES), shared=True)


def requirements(place: Place) -> Iterator[Finding]:
    """Whether what the package needs is installed, in versions that it takes."""
    from packaging.requirements import Requirement

    wrong = []
    needed = [Requirement(text) for text in metadata.requires("medsam2") or ()]
    needed = [each for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})]
    for each in needed:
        found = _version(each.name)
        if found == "missing" or not each.specifier.contains(found, prereleases=True):
            wrong.append(f"{each} (found: {found})")
    if wrong:
        remedy = "pip install -e . -c constraints.txt, or reinstall the wheel"
        yield Finding("requirements", "; ".join(wrong), "error", remedy)
    else:
        yield Finding("requirements", f"{len(needed)} of {len(needed)} as needed")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


# -------------------------------------------------------------------------------------------------- devices


def devices(place: Place) -> Iterator[Finding]:
    import torch

    driver = driver_version()
    if driver:
        yield Finding("driver", driver, shared=True)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        yield _no_gpu(driver, torch.version.cuda)
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"{properties.major}.{properties.minor}"
        text = f"{properties.name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, compute capability {capability}"
        busy = free < 0.8 * total
        advice = "another program uses it: nvidia-smi shows which" if busy else ""
        yield Finding(f"GPU {index}", text, "warning" if busy else "ok", advice)
        yield _kernels(index, (properties.major, properties.minor), torch.cuda.get_arch_list())


def _no_gpu(driver: str, built_for: str | None) -> Finding:
    if not driver and not Path("/dev/nvidiactl").exists():
        return Finding("GPU", "none (trainer=cpu)")
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return Finding(
            "GPU", "hidden", "error", "CUDA_VISIBLE_DEVICES is empty: unset it, or ask the scheduler for GPUs"
        )
    if built_for is None:
        remedy = "this torch is for CPUs: pip install torch from the index of your CUDA version (pytorch.org)"
        return Finding("GPU", f"not used, though driver {driver or 'files'} exist", "error", remedy)
    remedy = (
        f"torch is built for CUDA {built_for}: update the driver, or install a torch for an older CUDA; in a container "
        "start it with --gpus all"
    )
    return Finding("GPU", f"torch sees none, driver {driver or 'unknown'}", "error", remedy)


def _kernels(index: int, capability: tuple[int, int], built: list[str]) -> Finding:
    """bf16 and flash attention need Ampere (8.0); older ones run, slower and in float16."""
    name = f"GPU {index} kernels"
    own = [int(arch.rpartition("_")[2].rstrip("a")) for arch in built if arch.startswith("sm_")]
    if own and 10 * capability[0] + capability[1] < min(own):
        remedy = f"this torch has kernels from {min(own) / 10} on: install an older torch, or use another GPU"
        return Finding(name, f"none for {capability[0]}.{capability[1]}", "error", remedy)
    if capability >= (8, 0):
        return Finding(name, "bf16 yes, flash attention yes")
    return Finding(name, "bf16 no, flash attention no", "warning", "use trainer.precision=16-mixed or 32-true")


def driver_version() -> str:
    """Of the NVIDIA driver; "" where there is none."""
    if DRIVER.exists():
        words = DRIVER.read_text().split()
        return next((word for word in words if word.count(".") >= 1 and word[0].isdigit()), "")
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.split()[0] if done.returncode == 0 and done.stdout.split() else ""


def cores_and_memory(place: Place) -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(Path("/sys/fs/cgroup/cpu.max"))
    text = f"{cores}" if quota is None or quota >= cores else f"{cores}, of whose time a container may use {quota:g}"
    few = min(cores, quota or cores) < 2
    yield Finding("cores", text, "warning" if few else "ok", "readers and training share one: set data.workers=1" * few)
    free = available()
    little = free < 4 * GIB
    advice = "close other programs, or ask for more memory (--mem)" if little else ""
    yield Finding("memory", f"{free / GIB:.1f} GiB free", "warning" if little else "ok", advice)


def cpu_quota(path: Path) -> float | None:
    """Cores' worth of time that a container may use; None for all."""
    try:
        quota, period = path.read_text().split()[:2]
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


# --------------------------------------------------------------------------------------------------- limits


def shared_memory(place: Place) -> Iterator[Finding]:
    """Workers hand batches over through /dev/shm; where it is full they die with a bus error."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        yield Finding("shared memory", "no /dev/shm", "warning", "set data.workers=0 if workers fail")
        return
    usage = shutil.disk_usage(folder)
    yield judge_shared_memory(usage.free, usage.total)


def judge_shared_memory(free: int, total: int) -> Finding:
    text = f"/dev/shm: {free / GIB:.2f} of {total / GIB:.2f} GiB free"
    if free >= 2 * GIB:
        return Finding("shared memory", text)
    remedy = "docker run --shm-size=8g (compose: shm_size; Kubernetes: an emptyDir of medium Memory), or data.workers=0"
    return Finding("shared memory", text, "error" if free < GIB // 8 else "warning", remedy)


def descriptors(place: Place) -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield judge_descriptors(soft, hard)


def judge_descriptors(soft: int, hard: int) -> Finding:
    text = f"{soft} of {hard} files may be open"
    if soft >= 1024 or soft == resource.RLIM_INFINITY:
        return Finding("descriptors", text)
    remedy = f"ulimit -n {hard}" if hard >= 1024 else "raise LimitNOFILE, or the container's --ulimit nofile=65536"
    return Finding("descriptors", text, "error" if soft < 256 else "warning", f"{remedy} before the run")


# ---------------------------------------------------------------------------------------------------- disks


def disks(place: Place) -> Iterator[Finding]:
    places = {"output folder": place.folder, "TMPDIR": Path(tempfile.gettempdir())}
    if place.cache is not None:
        places["cache of shards"] = place.cache
    for name, folder in places.items():
        yield judge_disk(name, folder)


def judge_disk(name: str, folder: Path) -> Finding:
    """Whether a file can be written, synced and removed there, and how much room there is.

    A folder that does not exist is not made: the nearest one above it is looked at.
    """
    there = folder.expanduser().absolute()
    there = next(parent for parent in (there, *there.parents) if parent.is_dir())
    free = shutil.disk_usage(there).free
    text = f"{folder}: {free / GIB:.1f} GiB free"
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".medsam2-doctor-") as file:
            begun = time.perf_counter()
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
            took = time.perf_counter() - begun
    except OSError as error:
        remedy = f"choose another folder, or mend rights and space of {there}"
        return Finding(name, f"{text}, not writable ({error.strerror})", "error", remedy)
    if free < 10 * GIB:
        return Finding(name, text, "error" if free < GIB else "warning", "make room: checkpoints and shards are large")
    if took > 1:
        return Finding(name, f"{text}, 1 MiB takes {took:.1f} s", "warning", "a slow disk: checkpoints hold the run up")
    return Finding(name, f"{text}, writable")


# -------------------------------------------------------------------------------------------------- network


def network(place: Place) -> Iterator[Finding]:
    try:
        with socket.socket() as found:
            found.bind(("", 0))
            found.listen(1)
            port = found.getsockname()[1]
            with socket.create_connection(("127.0.0.1", port), timeout=5):
                pass
        yield Finding("ports", f"one can be bound and reached ({port})")
    except OSError as error:
        remedy = "ranks meet on a port: a firewall or sandbox forbids it"
        yield Finding("ports", f"none can be used ({error.strerror or error})", "error", remedy)
    yield from _master()
    yield from _interfaces()


def _master() -> Iterator[Finding]:
    address = os.environ.get("MASTER_ADDR")
    if address is None:
        return
    try:
        numbers = sorted({str(found[4][0]) for found in socket.getaddrinfo(address, None)})
        yield Finding("MASTER_ADDR", f"{address} is {', '.join(numbers)}")
    except OSError as error:
        remedy = "give the name or number by which all nodes reach the node of rank 0"
        yield Finding("MASTER_ADDR", f"{address} is not known ({error.strerror or error})", "error", remedy)


def _interfaces() -> Iterator[Finding]:
    names = [name for _, name in socket.if_nameindex()]
    yield Finding("interfaces", ", ".join(f"{name} {_up(name)}" for name in names) or "none")
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        wanted = [text for text in os.environ.get(variable, "").split(",") if text]
        if wanted and not any(text.startswith("^") for text in wanted):
            known = [text for text in wanted if any(name.startswith(text.lstrip("=")) for name in names)]
            if not known:
                remedy = f"name one of {', '.join(names)}, or unset it"
                yield Finding(variable, f"{','.join(wanted)} is no interface here", "error", remedy)


def _up(name: str) -> str:
    try:
        return Path(f"/sys/class/net/{name}/operstate").read_text().strip()
    except OSError:
        return "unknown"


PROBES: tuple[Callable[[Place], Iterator[Finding]], ...] = (
    versions, requirements, devices, cores_and_memory, shared_memory, descriptors, disks, network,
)  # fmt: skip
