"""Ranks on the emulated device: installs it once, then forks them as :mod:`forking` does.

A rank's words are the script and its own, behind options of this program: ``[--sanitize FILE] [--waits FILE] [--plant FAULT]``.
A script ``module:function`` is a function of this folder.
"""

from __future__ import annotations

import argparse
import importlib
import os
import runpy
import sys
from pathlib import Path

import forking
from device import emulated


def call(_: str) -> None:
    """Run what ``sys.argv`` says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sanitize", type=Path, help="write what the stream sanitizer finds, a file a rank")
    parser.add_argument("--waits", type=Path, help="write where a step waits for the device, a file a rank")
    parser.add_argument("--plant", help="a fault of device.faults")
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    given = parser.parse_args(sys.argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        emulated.interpret()
    if given.sanitize:
        from device import sanitizer

        sanitizer.install(Path(f"{given.sanitize}.{os.environ.get('RANK', '0')}"))
    if given.waits:
        from device import host_waits

        host_waits.install(Path(f"{given.waits}.{os.environ.get('RANK', '0')}"))
    if given.plant:
        from device import faults

        getattr(faults, given.plant)()
    sys.argv = [given.script, *given.arguments]
    if ":" in given.script:
        module, function = given.script.split(":")
        getattr(importlib.import_module(f"device.{module}"), function)()
    else:
        runpy.run_path(given.script, run_name="__main__")


if __name__ == "__main__":
    forking.serve(emulated.install, call)
