"""What ``-m gpu`` selects, and what of it is left out without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from gpu_sessions import only_gpu_tests
from launching import ROOT, environment


@pytest.mark.parametrize(
    ("expression", "only"),
    [
        ("", False),
        ("gpu", True),
        ("gpu and not nightly", True),
        ("gpu or device", True),
        ("not gpu", False),
        ("not nightly", False),
        ("device", False),
    ],
)
def test_which_sessions_keep_the_gpus(expression: str, only: bool) -> None:
    assert only_gpu_tests(expression) == only


def test_no_other_test_sees_a_gpu() -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == environment()["CUDA_VISIBLE_DEVICES"] == ""
    assert not torch.cuda.is_available()


def test_without_a_gpu_all_of_them_are_skipped_with_the_reason() -> None:
    """Also those that otherwise run in Triton's interpreter: who asks for a GPU is not shown another thing."""
    own = {name: value for name, value in environment().items() if name != "PYTEST_XDIST_WORKER"}
    hidden = own | {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    chosen = ["tests/gpu", "tests/kernels/test_triton.py", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *chosen], cwd=ROOT, env=hidden, capture_output=True, text=True
    )
    assert "needs a GPU, and torch sees none" in done.stdout
    assert " passed" not in done.stdout + done.stderr
    assert done.returncode == 0, done.stdout[-2000:]
