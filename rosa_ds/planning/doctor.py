"""What a machine has and lacks for a run, each finding with what to do about it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from packaging.requirements import Requirement

import rosa_kernels
from rosa_ds import distributed
from rosa_ds.utils.packages import torch_for_gpus
from rosa_ds.zero.group import shared_buffers
from rosa_ds.zero.ops import buildable_ops
from rosa_kernels.testing import random_positions, relative_rms

SHARED_BUFFER = 66 * 2**20  # of DeepSpeed's communication op for CPUs, a rank
_NETWORK_DISKS = ("nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "beegfs", "ceph", "fuse.sshfs", "9p")
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Finding:
    """``what`` was looked at, what was ``found``, and ``advice`` where something is to be done ("" is well)."""

    what: str
    found: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.what}: {self.found}" + (f"\n    → {self.advice}" if self.advice else "")


def examine(output: Path) -> list[Finding]:
    """All of this host and rank. ``output``: folder of runs, which need not exist."""
    groups = (versions(), accelerators(), compilers(), kernels(), network(), memory_and_limits(), disks(output))
    return [finding for group in groups for finding in group]


def examine_ranks(size: int) -> list[Finding]:
    """What only all ranks together show; collective. ``size``: bytes of the timed collectives."""
    ranks = distributed.world_size()
    mine = {
        "host": socket.gethostname(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    }
    everyone = distributed.gather_objects(mine)
    by_host = {
        host: sum(other["host"] == host for other in everyone) for host in dict.fromkeys(o["host"] for o in everyone)
    }
    found = [Finding("ranks", f"{ranks}: " + ", ".join(f"{host} × {count}" for host, count in by_host.items()))]
    for what in ("torch", "device"):
        values = sorted({other[what] for other in everyone})
        advice = f"the ranks differ in {what}: make them alike" if len(values) > 1 else ""
        found.append(Finding(f"{what} of all ranks", ", ".join(values), advice))
    if ranks == 1:
        advice = "start it as the run will be: torchrun --nproc_per_node N -m rosa_ds.commands.doctor"
        return [*found, Finding("collectives", "one rank has none", advice)]
    times = distributed.time_collectives(size)
    slowest = {name: max(o[name] for o in distributed.gather_objects(times)) for name in times}
    for name, seconds in slowest.items():
        weight = 2 if "reduce" in name else 1
        rate = weight * size * (ranks - 1) / ranks / seconds / 1e9
        slow = "first" not in name and torch.cuda.is_available() and rate < 5
        found.append(
            Finding(
                f"{name} of {size / 1e6:.0f} MB, {distributed.backend()}",
                f"{1000 * seconds:.1f} ms on the slowest rank, {rate:.2f} GB/s a rank",
                "NCCL_DEBUG=INFO says which way it takes; below 5 GB/s it is mostly sockets" if slow else "",
            )
        )
    return found


def versions() -> Iterator[Finding]:
    """Installed packages against what this project asks for."""
    yield Finding("python", sys.version.split()[0])
    every = [Requirement(text) for text in importlib.metadata.requires("rosa-ds") or []]
    always = {wanted.name for wanted in every if wanted.marker is None}
    for wanted in every:
        # The extra "gpu" asks for a newer torch: `accelerators` compares it, where there is a GPU.
        if wanted.marker is not None and (wanted.name in always or not wanted.marker.evaluate({"extra": "gpu"})):
            continue
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            optional = wanted.marker is not None
            advice = f"pip install '{wanted.name}{wanted.specifier}'" + (
                ", if this machine has a GPU" if optional else ""
            )
            yield Finding(wanted.name, "not installed", advice)
            continue
        fits = wanted.specifier.contains(version, prereleases=True)
        yield Finding(wanted.name, version, "" if fits else f"pip install '{wanted.name}{wanted.specifier}'")


def accelerators() -> Iterator[Finding]:
    """GPUs, or that there is none."""
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        advice = (
            f"torch is built for {built}, but no GPU answers: see nvidia-smi, and CUDA_VISIBLE_DEVICES"
            if built
            else "this torch is built for CPUs; on a machine with a GPU install the CUDA build (pip install torch)"
        )
        yield Finding("accelerator", f"none, {len(os.sched_getaffinity(0))} CPU cores", advice)
        return
    if problem := torch_for_gpus():
        yield Finding("torch for GPUs", torch.__version__, problem)
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        busy = total - free > 2 * _GIB
        yield Finding(
            f"GPU {index}",
            f"{properties.name}, sm_{properties.major}{properties.minor}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB free",
            "something else holds its memory: see nvidia-smi" if busy else "",
        )


def compilers() -> Iterator[Finding]:
    """What DeepSpeed compiles its operators with, and which of them can be had."""
    path = shutil.which("g++") or shutil.which("c++")
    if path is None:
        yield Finding(
            "compiler", "no g++", "apt-get install g++ (DeepSpeed compiles its communication op at first use)"
        )
    else:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, timeout=30).stdout
        yield Finding("compiler", said.splitlines()[0] if said else path)
    if torch.cuda.is_available():
        home = os.environ.get("CUDA_HOME") or shutil.which("nvcc")
        yield Finding(
            "CUDA toolkit", str(home or "not found"), "" if home else "only DeepSpeed's fused operators want it"
        )
    yield Finding("DeepSpeed ops that can be built", ", ".join(buildable_ops()) or "none")


def kernels() -> Iterator[Finding]:
    """What our operators run with on this rank's device, and whether the sampled product comes out right."""
    if importlib.util.find_spec("triton") is None:
        yield Finding("triton", "not installed", "pip install triton, if this machine has a GPU")
    try:
        choices = rosa_kernels.explain(distributed.device())
    except ValueError as error:
        yield Finding("kernels", "do not run", str(error))
        return
    for op, chosen in choices.items():
        yield Finding(f"kernel {op}", f"{chosen.implementation} ({chosen.reason})")
    yield probe(distributed.device())


def probe(device: torch.device) -> Finding:
    """Run one kernel, compiled at first use where it is Triton's, against a dense product in float64."""
    generator = torch.Generator().manual_seed(0)
    grad, x = (torch.randn(96, width, generator=generator).to(device) for width in (80, 112))
    positions = random_positions(80, 112, 0.05).to(device)
    begun = time.monotonic()
    advice = "ROSA_KERNELS=torch runs without Triton; is a C compiler there, and the Triton cache writable?"
    try:
        values = rosa_kernels.sddmm(grad, x, positions).cpu()
    except Exception as error:  # of the compiler, the driver, the cache
        return Finding("kernel tried", f"{type(error).__name__}: {error}", advice)
    seconds = time.monotonic() - begun
    off = relative_rms(values, (grad.double().T @ x.double()).flatten()[positions.long()].cpu())
    wrong = off > 1e-2  # TF32 and its like are within
    return Finding(
        "kernel tried",
        f"{seconds:.2f} s, relative error {off:.0e}",
        "its results are wrong: " + advice if wrong else "",
    )


def network() -> Iterator[Finding]:
    """Interfaces, and whether the host's own name leads to it."""
    up = []
    for _, name in socket.if_nameindex():
        folder = Path("/sys/class/net") / name
        try:
            state = (folder / "operstate").read_text().strip()
            speed = (folder / "speed").read_text().strip()
        except OSError:  # the loop-back and virtual ones have no speed
            state, speed = "unknown", "?"
        if name != "lo" and state != "down":
            up.append(f"{name} ({speed} Mbit/s)" if speed not in ("?", "-1") else name)
    chosen = {key: os.environ[key] for key in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME") if key in os.environ}
    several = len(up) > 1 and not chosen and distributed.world_size() > 1
    yield Finding(
        "network interfaces",
        ", ".join(up or ["lo alone"]) + "".join(f"; {key}={value}" for key, value in chosen.items()),
        "if ranks on several hosts do not find each other: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME"
        if several
        else "",
    )
    if Path("/sys/class/infiniband").is_dir():
        yield Finding(
            "InfiniBand", ", ".join(sorted(p.name for p in Path("/sys/class/infiniband").iterdir())) or "none"
        )
    try:
        address = socket.gethostbyname(socket.gethostname())
        yield Finding("host", f"{socket.gethostname()} = {address}")
    except OSError as error:
        yield Finding(
            "host", f"{socket.gethostname()}: {error}", "add it to /etc/hosts, or give MASTER_ADDR as a number"
        )


def memory_and_limits() -> Iterator[Finding]:
    """Shared memory and the limits that runs meet."""
    shared = shutil.disk_usage("/dev/shm")
    ranks = distributed.planned_local_size(1)
    short = shared.free < 2 * ranks * SHARED_BUFFER
    found = f"{shared.free / _GIB:.2f} of {shared.total / _GIB:.2f} GiB free; {len(shared_buffers())} of DeepSpeed's buffers in it"
    yield Finding("/dev/shm", found, "a container's is 64 MB by default: docker run --shm-size 8g" if short else "")
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield Finding("open files", str(files), "ulimit -n 65536" if files < 4096 else "")
    pages = os.sysconf("SC_PAGE_SIZE")
    yield Finding("host memory", f"{os.sysconf('SC_AVPHYS_PAGES') * pages / _GIB:.1f} GiB free")


def disks(output: Path) -> Iterator[Finding]:
    """Where caches and checkpoints are, and how fast the latter are written."""
    home = Path.home()
    cache = Path(os.environ.get("XDG_CACHE_HOME", home / ".cache"))
    hub = Path(os.environ.get("HF_HOME", cache / "huggingface"))
    places = {
        "model cache (HF_HOME)": (hub, False),
        "data cache (HF_DATASETS_CACHE)": (Path(os.environ.get("HF_DATASETS_CACHE", hub / "datasets")), False),
        "Triton cache (TRITON_CACHE_DIR)": (Path(os.environ.get("TRITON_CACHE_DIR", home / ".triton")), True),
        "op cache (TORCH_EXTENSIONS_DIR)": (
            Path(os.environ.get("TORCH_EXTENSIONS_DIR", cache / "torch_extensions")),
            True,
        ),
        "runs": (output, False),
    }
    for name, (path, local) in places.items():
        there = _existing(path)
        where, kind = _mount_of(there)
        free = shutil.disk_usage(there).free
        advice = ""
        if not os.access(there, os.W_OK):
            advice = "this user cannot write there: give another folder"
        elif local and kind in _NETWORK_DISKS:
            advice = "compiled code on a network disk: set the variable to a folder of the node"
        elif free < 10 * _GIB:
            advice = "less than 10 GiB are free"
        yield Finding(name, f"{path} on {where} ({kind}), {free / _GIB:.1f} GiB free", advice)
    yield _write_speed(_existing(output))


def _mount_of(path: Path) -> tuple[str, str]:
    """Mount point and type of the file system that a path is on."""
    best = ("/", "?")
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if path.is_relative_to(where) and len(where) >= len(best[0]):
            best = (where, kind)
    return best


def _existing(path: Path) -> Path:
    path = path.expanduser().absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _write_speed(folder: Path, size: int = 64 * 2**20) -> Finding:
    path = folder / f".doctor-{socket.gethostname()}-{os.getpid()}"
    try:
        begun = time.perf_counter()
        with path.open("wb") as stream:
            stream.write(os.urandom(size))
            stream.flush()
            os.fsync(stream.fileno())
        rate = size / (time.perf_counter() - begun) / 1e6
    except OSError as error:
        return Finding("write speed", f"{folder}: {error}", "give a folder that can be written with --output")
    finally:
        path.unlink(missing_ok=True)
    slow = rate < 50
    return Finding(
        "write speed", f"{rate:.0f} MB/s, with fsync", "checkpoints wait for it: use a faster disk" if slow else ""
    )
