"""Which implementation runs, said aloud; never a silent switch."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import rosa_kernels
from rosa_kernels import dispatch


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROSA_KERNELS", raising=False)
    dispatch._choose.cache_clear()


@pytest.mark.parametrize(
    ("device", "name", "reason"),
    [
        ("cpu", "torch", "no code for cpu tensors"),
        ("mps", "torch", "no code for mps tensors"),
        ("cuda", "triton", "default on cuda"),
    ],
)
def test_default(device: str, name: str, reason: str) -> None:
    choices = rosa_kernels.explain(device)
    assert set(choices) == set(dispatch.OPS)
    for choice in choices.values():
        assert choice.implementation == name
        assert reason in choice.reason


def test_forced_for_all_and_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("ROSA_KERNELS", "triton, scatter=torch")
    choices = rosa_kernels.explain(torch.device("cpu"))
    assert choices["scatter"] == dispatch.Choice("torch", "ROSA_KERNELS=triton, scatter=torch")
    assert {choice.implementation for op, choice in choices.items() if op != "scatter"} == {"triton"}
    monkeypatch.setenv("ROSA_KERNELS", "torch")
    assert {choice.implementation for choice in rosa_kernels.explain("cuda").values()} == {"torch"}


@pytest.mark.parametrize("setting", ["tritn", "sdmm=torch", "sddmm=", "=torch=triton"])
def test_unknown_setting(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROSA_KERNELS", setting)
    with pytest.raises(ValueError, match="is neither one of torch, triton nor OP=IMPLEMENTATION"):
        rosa_kernels.explain("cpu")


def test_triton_on_the_cpu_needs_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("ROSA_KERNELS", "triton")
    with pytest.raises(ValueError, match="set TRITON_INTERPRET=1 before Python starts"):
        rosa_kernels.sddmm(torch.ones(2, 2), torch.ones(2, 2), torch.tensor([0]))


def test_a_gpu_without_triton_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install triton, or set ROSA_KERNELS=torch"):
        dispatch.choose("sddmm", "cuda")


def test_a_failing_kernel_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from rosa_kernels.sddmm import triton_kernel

    def broken(*_: object) -> None:
        raise RuntimeError("ptxas failed")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("ROSA_KERNELS", "triton")
    monkeypatch.setattr(triton_kernel, "launch_sddmm", broken)
    with pytest.raises(RuntimeError, match="ptxas failed"):
        rosa_kernels.sddmm(torch.ones(2, 2), torch.ones(2, 2), torch.tensor([0]))
