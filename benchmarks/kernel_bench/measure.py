"""Times and memory of several candidates on one noisy machine, and which machine it was."""

from __future__ import annotations

import datetime
import importlib.metadata
import itertools
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

import rosa_kernels

Call: TypeAlias = Callable[[], Any]

COLD_BYTES = {"cpu": 128 * 2**20, "cuda": 256 * 2**20}  # more than the last-level cache holds
MAX_SETS = 64  # of small inputs, whose making would take longer than the measurement
SLEEP_CYCLES = 1_000_000  # about half a millisecond, in which the host gets ahead of the GPU


def number_of_sets(bytes_a_set: int, calls: int, device: torch.device) -> int:
    """Sets of inputs of which a call finds none in the cache: as many as exceed it, 2 to 64, no more than calls."""
    enough = -(-COLD_BYTES.get(device.type, COLD_BYTES["cuda"]) // max(bytes_a_set, 1)) + 1
    return max(2, min(enough, calls, MAX_SETS))


def _timed(call: Call, device: torch.device) -> float:
    """Milliseconds of one call."""
    if device.type == "cpu":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    torch.cuda._sleep(SLEEP_CYCLES)  # launches queue up behind it: the GPU's time, not the host's, as in training
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return float(begin.elapsed_time(end))


def interleaved(calls: Mapping[str, Sequence[Call]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of each repeat of each candidate, one after another (A, B, C, A, B, C, ...): a slow spell hits all.

    Args:
        calls: candidate -> its call on every set of inputs. Each call, of whichever candidate, takes the next set.
    """
    for bound in calls.values():
        bound[0]()  # what a first call compiles or allocates is not measured
    times: dict[str, list[float]] = {name: [] for name in calls}
    turn = itertools.count()
    for _ in range(repeats):
        for name, bound in calls.items():
            times[name].append(_timed(bound[next(turn) % len(bound)], device))
    return times


def median(times: Sequence[float]) -> float:
    """Of milliseconds."""
    return statistics.median(times)


def peak_bytes(call: Call, device: torch.device) -> int:
    """Most memory that one call holds at a time beyond what was there before, results included.

    On the CPU what torch allocates, from the profiler; what a library takes for itself is not seen.
    """
    if device.type != "cpu":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else two lines on stderr for every profile
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    del result
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes, initial=0))


def saved_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps from ``forward`` to backward, storages of ``parameters`` left out, each storage once."""
    known = {tensor.untyped_storage().data_ptr() for tensor in parameters}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = tensor  # alive, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _commit() -> str:
    """The checkout's commit, with ``+`` where files differ from it; ``none`` outside one."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != here.parent.parent:
            return "none"  # installed inside another project's checkout
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return "none"


def device_name(device: torch.device) -> str:
    """The model of the GPU or the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure depends on beside the code: machine, versions, commit, date (UTC).

    ``load`` is the last minute's: with other programs on its cores, a candidate of many small parallel steps looks slow.
    """
    runs = {op: choice.implementation for op, choice in rosa_kernels.explain(device).items()}
    return {
        "device": device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: _version(package) for package in ("triton", "peft", "spops")},
        "runs": runs,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M"),
    }
