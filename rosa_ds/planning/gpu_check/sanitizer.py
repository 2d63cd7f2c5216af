"""compute-sanitizer, where CUDA's toolkit is: accesses out of bounds, and races in shared memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import torch

from rosa_ds import distributed
from rosa_ds.planning.gpu_check.layer import Layer, SparseProduct
from rosa_ds.planning.gpu_check.stage import Check, NotRunError


def examine(check: Check) -> None:
    tool = shutil.which("compute-sanitizer")
    tool = tool or next(map(str, Path("/usr/local").glob("cuda*/bin/compute-sanitizer")), None)
    if tool is None:
        raise NotRunError("needs compute-sanitizer, of CUDA's toolkit")
    # in torch's cache one allocation holds many tensors, and a step from one into another is within it
    variables = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    failed = 0
    for kind in ("memcheck", "racecheck"):
        command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, "-m", __name__]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
        failed += done.returncode != 0
        lines = done.stdout.splitlines()
        check.tell(tool=kind, status=done.returncode, said=[*lines[:10], *[s for s in lines if "SUMMARY" in s]])
    if failed:
        raise SystemExit(1)


def each_kernel(device: torch.device) -> None:
    """Every kernel once, in two types, with odd sizes."""
    for dtype in (torch.bfloat16, torch.float32):
        layer = Layer.make(203, 321, 4161, dtype, device, density=0.01)
        for sparse_product in get_args(SparseProduct):
            layer.step(dropout=0.1, sparse_product=sparse_product)


if __name__ == "__main__":
    each_kernel(distributed.device())
    if torch.cuda.is_available():
        torch.cuda.synchronize()
