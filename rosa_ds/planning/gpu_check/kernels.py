"""The kernels against float64: the tests where a checkout has them, else one product of each type."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import rosa_ds
from rosa_ds.planning import doctor
from rosa_ds.planning.gpu_check.stage import Check

TESTS = Path(rosa_ds.__file__).parents[1] / "tests" / "kernels" / "test_triton.py"
_FEW = "examples_of_the_docstrings or plan_of_a_known_mask"


def test(check: Check) -> None:
    if not TESTS.is_file() or importlib.util.find_spec("pytest") is None:
        found = doctor.probe(check.device)
        check.tell(tests="not run: needs a checkout with tests/ and pytest", **{found.what: found.found})
        if found.advice:
            raise RuntimeError(found.advice)
        return
    chosen = ["-m", "gpu"] if check.gpu else ["-k", _FEW]  # all of them take minutes in Triton's interpreter
    if check.gpu and importlib.util.find_spec("xdist"):
        chosen += ["-n", str(min(8, len(os.sched_getaffinity(0))))]  # most of their time is compiling
    command = [sys.executable, "-m", "pytest", str(TESTS), "-q", "--no-header", "-p", "no:cacheprovider", *chosen]
    done = subprocess.run(command, cwd=TESTS.parents[2], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    how = "" if check.gpu else "in Triton's interpreter, a few of them"
    check.tell(tests=lines[-1] if lines else done.stderr[-200:], status=done.returncode, how=how, failed=failed[:40])
    if done.returncode:
        sys.stderr.write(done.stdout[-6000:] + done.stderr[-2000:])
        raise SystemExit(1)
