"""What CUDA, NCCL and a race would do: each planted fault is refused, or found."""

from __future__ import annotations

from pathlib import Path

import pytest

from launching import run

pytestmark = [pytest.mark.ranks, pytest.mark.usefixtures("small_base")]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("mixed_devices", "Expected all tensors to be on the same device"),
        ("host_tensor_in_a_collective", "No backend type associated with device type cpu"),
        ("int16_in_a_collective", "Input tensor data type is not supported for NCCL"),
        ("strided_in_a_collective", "Tensors must be contiguous"),
    ],
)
def test_what_a_gpu_refuses_is_refused(fault: str, message: str, tmp_path: Path) -> None:
    assert message in run("device", 1, f"faults:{fault}", cwd=tmp_path, status=1, timeout=100)


@pytest.mark.parametrize(
    ("program", "finding"),
    [
        ("read_before_the_copy_is_done", "write then read: copy_"),
        ("overwritten_before_the_copy_is_done", "read then write: _to_copy"),
        ("freed_on_another_stream", "freed while in use"),
        ("read_on_another_stream", "write then read: ones"),
        ("read_after_the_copy_is_done", ""),
    ],
)
def test_a_race_is_found(program: str, finding: str, tmp_path: Path) -> None:
    output = run("device", 1, f"faults:{program}", cwd=tmp_path, timeout=100)
    assert f"findings:\n{1 if finding else 0}\n" in output
    assert finding in output
