"""Builds ``backend.cpp`` with g++ into ``build/device`` of the checkout, once for each content and version of PyTorch."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import include_paths, library_paths

SOURCE = Path(__file__).parent / "backend.cpp"
FOLDER = Path(__file__).resolve().parents[2] / "build" / "device"
NAME = "emulated_backend"


def missing() -> str:
    """Why nothing can be built here; empty where it can."""
    if shutil.which("g++") is None:
        return "the emulated device is built by g++, which is not installed"
    if platform.system() != "Linux":
        return f"the emulated device is of Linux, this is {platform.system()}"
    return ""


def build() -> Path:
    """The extension, built if it is not there. Raises: RuntimeError with what the compiler said."""
    content = SOURCE.read_bytes() + f"{torch.__version__} {platform.python_version()}".encode()
    target = FOLDER / hashlib.sha256(content).hexdigest()[:16] / f"{NAME}.so"
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go of by the system when a process ends
        if not target.exists():
            _compile(target)
    return target


def _compile(target: Path) -> None:
    unfinished = target.with_suffix(f".{os.getpid()}")
    includes = [f"-isystem{path}" for path in (*include_paths(), sysconfig.get_paths()["include"])]
    libraries = [f"-L{path}" for path in library_paths()] + ["-ltorch_python", "-ltorch", "-ltorch_cpu", "-lc10"]
    flags = [
        "-shared",
        "-fPIC",
        "-std=c++20",
        "-O1",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    ]
    command = ["g++", *flags, *includes, str(SOURCE), "-o", str(unfinished), *libraries]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    if done.returncode:
        raise RuntimeError(f"the emulated device does not build:\n{done.stderr[-6000:]}")
    unfinished.rename(target)


def load() -> Any:
    """The extension as a module."""
    spec = importlib.util.spec_from_file_location(NAME, build())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
