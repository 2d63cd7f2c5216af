"""Start the project's programs as users do, with a time-out, and read what they leave."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "launch" / "train.py")
SMALL = ("--data.train", "builtin:sql[:96]", "--data.eval", "builtin:sql[:16]")


def free_port() -> int:
    """A port that nobody listens on, below those that Linux gives to outgoing connections; another at every call.

    Processes that test at the same time begin at different ones, so that none takes what another has just been given.
    """
    while True:
        port = next(_ports)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


_FIRST, _LAST = 20000, 32000
_ports = itertools.islice(itertools.cycle(range(_FIRST, _LAST)), os.getpid() * 97 % (_LAST - _FIRST), None)


def command(launcher: str, ranks: int, arguments: tuple[str, ...]) -> list[str]:
    """The command line that a user would type for ``python``, ``torchrun`` or ``deepspeed``."""
    binaries = Path(sys.executable).parent
    if launcher == "python":
        assert ranks == 1
        return [sys.executable, *arguments]
    if launcher == "torchrun":
        return [str(binaries / "torchrun"), f"--nproc_per_node={ranks}", f"--master_port={free_port()}", *arguments]
    return [
        str(binaries / "deepspeed"),
        "--num_accelerators",
        str(ranks),
        "--master_port",
        str(free_port()),
        *arguments,
    ]


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return kept | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}", "OMP_NUM_THREADS": "1"}


def start(
    launcher: str, ranks: int, *arguments: str, cwd: Path, variables: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(launcher, ranks, arguments),
        cwd=cwd,
        env=environment() | dict(variables or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill(process: subprocess.Popen[str]) -> None:
    """End a launcher and all its ranks at once, as a power failure would (each is in the launcher's session)."""
    listing = subprocess.run(["ps", "-e", "-o", "pid=,sid="], capture_output=True, text=True, check=True).stdout
    pids = [int(pid) for pid, sid in (line.split() for line in listing.splitlines()) if int(sid) == process.pid]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    process.communicate()


def run(
    launcher: str,
    ranks: int,
    *arguments: str,
    cwd: Path,
    timeout: float = 300,
    status: int = 0,
    variables: Mapping[str, str] | None = None,
) -> str:
    """Run to the end and return the output; fail with it on another exit status or after ``timeout`` seconds.

    With ``fork`` as launcher the ranks come from :mod:`forking`, without the seconds that launchers and imports take; with
    ``device`` too, and on the emulated device. ``variables``: of the environment, beside this process' own.
    """
    if launcher in ("fork", "device"):
        found, output = _fork(launcher, ranks, arguments, cwd, timeout, environment() | dict(variables or {}))
    else:
        process = start(launcher, ranks, *arguments, cwd=cwd, variables=variables)
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            kill(process)
            raise
        found = process.returncode
    if found != status:
        raise AssertionError(f"exit status {found} instead of {status}:\n{output[-6000:]}")
    return output


_forking: dict[str, subprocess.Popen[str]] = {}
_FORKED_FROM = {"fork": ROOT / "tests" / "support" / "forking.py", "device": ROOT / "tests" / "device" / "program.py"}


def _server(launcher: str) -> subprocess.Popen[str]:
    """The process that forks ranks, kept for the next run."""
    server = _forking.get(launcher)
    if server is None or server.poll() is not None:
        folders = [str(ROOT / "tests"), str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")]
        variables = environment() | {"PYTHONPATH": os.pathsep.join(folders)}
        if launcher == "device":
            variables["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        program = [sys.executable, str(_FORKED_FROM[launcher])]
        server = subprocess.Popen(program, **pipes, env=variables, text=True, start_new_session=True)
        _forking[launcher] = server
    return server


def _fork(
    launcher: str, ranks: int, arguments: tuple[str, ...], cwd: Path, timeout: float, variables: Mapping[str, str]
) -> tuple[int, str]:
    """Exit status and output of a run whose ranks are forked."""
    server = _server(launcher)
    assert server.stdin
    assert server.stdout
    with tempfile.NamedTemporaryFile("r", errors="replace") as output:
        request = {"arguments": arguments, "ranks": ranks, "port": free_port(), "cwd": str(cwd)}
        server.stdin.write(f"{json.dumps(request | {'environment': variables, 'output': output.name})}\n")
        server.stdin.flush()
        ready, _, _ = select.select([server.stdout], [], [], timeout)
        answer = server.stdout.readline() if ready else ""
        if not answer:
            kill(server)
            raise AssertionError(f"no end within {timeout} s, or no ranks:\n{output.read()[-6000:]}")
        return int(answer), output.read()


def metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def losses(folder: Path) -> list[tuple[int, str, float]]:
    """(step, event, loss) of every training step and evaluation."""
    return [(line["step"], line.get("event", "train"), line["loss"]) for line in metrics(folder) if "loss" in line]


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int, timeout: float = 200) -> None:
    """Return as soon as the run has logged ``step``."""
    end = time.monotonic() + timeout
    while not any(line["step"] >= step and "event" not in line for line in metrics(folder)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"step {step} not reached in {timeout} s"
        time.sleep(0.02)


def go_on(straight: Path, folder: Path, step: int) -> Path:
    """A copy of a finished run as if it had been killed after ``step``."""
    copy = folder / "runs" / "default"
    shutil.copytree(straight, copy)
    for path in (copy / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    return copy
