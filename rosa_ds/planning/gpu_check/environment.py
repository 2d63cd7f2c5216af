"""What is installed, which GPUs there are, and what state they are in."""

from __future__ import annotations

import os
import shutil
import subprocess
from itertools import chain

import torch

from rosa_ds.planning import doctor
from rosa_ds.planning.gpu_check.stage import Check

_ASKED = "name,driver_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu,mig.mode.current,ecc.mode.current"
_VARIABLES = ("CUDA_", "NCCL_", "TORCH", "PYTORCH_", "TRITON_", "ROSA_", "NVIDIA_TF32")


def look(check: Check) -> None:
    for finding in chain(doctor.versions(), doctor.accelerators(), doctor.compilers(), doctor.kernels()):
        check.tell(what=finding.what, found=finding.found, **({"advice": finding.advice} if finding.advice else {}))
    check.tell(what="cuda", found=str(torch.version.cuda), rocm=str(torch.version.hip), gpus=torch.cuda.device_count())
    given = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)]
    check.tell(what="variables", given=given)
    if check.gpu and (tool := shutil.which("nvidia-smi")):
        said = subprocess.run(
            [tool, f"--query-gpu={_ASKED}", "--format=csv"], capture_output=True, text=True, timeout=15
        )
        check.tell(what="nvidia-smi", said=(said.stdout + said.stderr).splitlines())
